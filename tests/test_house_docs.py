"""What the documentation says is there: links, files, commands and numbers that come from code."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from deploy.cli import COMMANDS, parse, parse_train
from deploy.presets import PRESETS, cost, preset
from deploy.replaycmd import ACTIONS

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
CODE_PATH = re.compile(
    r"\b(?:dreamer|replay_service|actors|learner|deploy|benchmarks|tests)/[\w/]*(?:\.\w+)?"
)


def commands(text: str) -> list[list[str]]:
    """Return the words of every dreamfleet command in code of a page."""
    code = "\n".join(re.findall(r"```(?:sh|bash)\n(.*?)```", text, re.DOTALL))
    code += "\n" + "\n".join(re.findall(r"`([^`\n]+)`", text))
    found = []
    for part in re.split(r"\n|;|&&| -- (?=dreamfleet)", code.replace("\\\n", " ")):
        match = re.match(r"(?:do )?\s*(?:\.venv/bin/)?dreamfleet (\w.*)", part.strip())
        if match:
            found.append(shlex.split(match[1].replace("$s", "0"), comments=True))
    return found


COMMANDS_IN_PAGES = [
    pytest.param(words, id=f"{page.name}: {' '.join(words)}")
    for page in PAGES
    for words in commands(page.read_text())
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing, missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_code_files_exist(page: Path) -> None:
    named = set(CODE_PATH.findall(page.read_text()))
    missing = [name for name in named if "<" not in name and not (ROOT / name).exists()]
    assert not missing, missing


@pytest.mark.parametrize("words", COMMANDS_IN_PAGES)
def test_commands_in_pages_are_understood(words: list[str]) -> None:
    name, args = words[0], words[1:]
    assert name in COMMANDS
    if not args or "--help" in args:
        return
    if name == "train":
        assert parse_train(args)
    elif name == "replay":
        action = ACTIONS[args[0]]
        assert not args[1:] or parse(action.options, args[1:], command=f"replay {args[0]}")
    else:
        assert parse(_options(name), args, command=name)


def _options(command: str) -> type:
    from deploy.bench import BenchOptions
    from deploy.checkenv import CheckOptions
    from deploy.doctor import DoctorOptions
    from deploy.evaluate import EvalOptions
    from deploy.export import ExportOptions
    from deploy.left import StopOptions
    from deploy.play import PlayOptions
    from deploy.report import ReportOptions
    from deploy.runs import RunsOptions
    from deploy.scale import ScaleOptions
    from deploy.secretscmd import SecretsOptions
    from deploy.status import StatusOptions

    return {
        "bench": BenchOptions,
        "check-env": CheckOptions,
        "doctor": DoctorOptions,
        "eval": EvalOptions,
        "export": ExportOptions,
        "play": PlayOptions,
        "report": ReportOptions,
        "runs": RunsOptions,
        "scale": ScaleOptions,
        "secrets": SecretsOptions,
        "status": StatusOptions,
        "stop": StopOptions,
    }[command]


@pytest.mark.parametrize("name", PRESETS)
def test_table_of_presets_says_what_the_presets_say(name: str) -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    row = next(line for line in page.splitlines() if line.startswith(f"| `{name}` |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    config = preset(name)
    assert f"`{config.env}`" in cells[1]
    assert cells[2:6] == [
        config.size,
        f"{config.steps:,}",
        f"{config.train_ratio:g}",
        f"{config.actors} × {config.envs_per_actor}",
    ]
    assert cells[6] == cost(config)


def test_readme_shows_every_command() -> None:
    page = (ROOT / "README.md").read_text()
    assert all(f"`dreamfleet {name}" in page for name in COMMANDS)
