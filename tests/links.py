"""Links from the documentation to lines of code: where each symbol is defined now.

A link into code names a symbol and the line of its file that defines it:
``[`Symbol`](path/to/file.py#L1)``. Code moves; ``make links`` writes the numbers again.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
LINK = re.compile(r"\[`(?P<symbol>[\w.]+)`\]\((?P<file>[^)#\s]+\.py)#L(?P<line>\d+)\)")


@cache
def definitions(file: Path) -> dict[str, int]:
    """Return the line of every class, function and name that a file defines, by dotted symbol."""
    found: dict[str, int] = {}
    for symbol, line in _walk(ast.parse(file.read_text()).body, ""):
        found.setdefault(symbol, line)
    return found


def _walk(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, int]]:
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield prefix + node.name, node.lineno
            if isinstance(node, ast.ClassDef):
                yield from _walk(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for name in (name for target in targets for name in ast.walk(target)):
                if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store):
                    yield prefix + name.id, node.lineno


def unknown(page: Path) -> list[str]:
    """Return the links of a page whose file does not define their symbol."""
    return [
        f"{page.name}: {link['file']} defines no {link['symbol']}"
        for link in LINK.finditer(page.read_text())
        if _line(page, link) is None
    ]


def renumbered(page: Path) -> str:
    """Return the text of a page with the lines as they are now; unknown symbols keep theirs."""

    def now(link: re.Match[str]) -> str:
        line = _line(page, link) or link["line"]
        return f"[`{link['symbol']}`]({link['file']}#L{line})"

    return LINK.sub(now, page.read_text())


def _line(page: Path, link: re.Match[str]) -> int | None:
    file = page.parent / link["file"]
    return definitions(file.resolve()).get(link["symbol"]) if file.exists() else None


def main() -> None:
    """Write the numbers of all pages again. Raises SystemExit on symbols that are not there."""
    for page in PAGES:
        page.write_text(renumbered(page))
    if wrong := [line for page in PAGES for line in unknown(page)]:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
