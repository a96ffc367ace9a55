"""A table of how long each recovery took, printed after the tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.faults.rig import Rig

Row = tuple[str, str, str]
_FOLDER = "tests/faults/"
_ROWS = pytest.StashKey[list[Row]]()


def pytest_configure(config: pytest.Config) -> None:
    """Begin with an empty table."""
    config.stash[_ROWS] = []


@pytest.fixture
def recovered(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Return what notes a recovery: seconds until writing went on, and what was lost."""
    rows = request.config.stash.setdefault(_ROWS, [])

    def note(seconds: float, limit_s: float, lost: str = "nothing", name: str = "") -> None:
        shown = name or request.node.name.removeprefix("test_").replace("_", " ")
        rows.append((shown, f"{seconds:.2f}", lost))
        assert seconds < limit_s, f"recovery took {seconds:.1f} s, stated are {limit_s:g} s"

    return note


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    """A server that evicts nothing, its proxies, and whatever a test starts."""
    made = Rig(tmp_path)
    yield made
    made.close()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table, and which of its rows this machine did not allow."""
    rows = terminalreporter.config.stash.get(_ROWS, [])
    skipped = [one for one in terminalreporter.stats.get("skipped", []) if _FOLDER in one.nodeid]
    if not rows and not skipped:
        return
    terminalreporter.section("recovery")
    for name, seconds, lost in rows:
        terminalreporter.write_line(f"{seconds:>8} s  lost: {lost:<28}  {name}")
    for report in skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        shown = report.nodeid.partition("::")[2].removeprefix("test_").replace("_", " ")
        terminalreporter.write_line(f"not done here: {shown} ({reason})")
