"""`dreamfleet runs`: the run directories in a folder, as a table."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from deploy.config import FILE_NAME, ConfigError, load_config
from deploy.progress import ENDED, console, count, duration, number
from deploy.status import read_status

PIPE_WIDTH = 200


@dataclass(frozen=True, kw_only=True)
class RunsOptions:
    """List run directories: preset, agent, environment, steps, return and state."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")] = Path("runs")
    """Folder that holds run directories."""
    json: bool = False
    """Print one JSON object for each run instead of a table."""


def runs(options: RunsOptions) -> int:
    """Print the runs, the one that was active last at the top.

    Raises:
        ConfigError: there is no such folder.
    """
    if not options.folder.is_dir():
        raise ConfigError(f"there is no folder {options.folder}; `dreamfleet train` makes runs/")
    found = sorted(
        (describe(path.parent) for path in options.folder.glob(f"*/{FILE_NAME}")),
        key=lambda run: float("inf") if run["age_s"] is None else run["age_s"],
    )
    if options.json:
        for run in found:
            console().print_json(json.dumps(run))
    elif found:
        # In a pipe nothing needs to be cut to the width of a terminal.
        piped = Console(width=PIPE_WIDTH, highlight=False, emoji=False)
        wide = console() if console().is_terminal else piped
        wide.print(_table(found))
    else:
        console().print(f"no runs in {options.folder}")
    return 0


def describe(directory: Path) -> dict[str, Any]:
    """Return what is known about a run; values that cannot be read are None, `state` says why.

    `state` is running, finished, stopped, failed, died, starting or unreadable.
    """
    run: dict[str, Any] = {"run": str(directory)}
    keys = ("age_s", "preset", "agent", "env", "size", "steps", "target_steps", "updates", "return")
    run |= dict.fromkeys(keys)
    try:
        config = load_config(directory / FILE_NAME)
    except ConfigError as error:
        return run | {"state": "unreadable", "why": str(error)}
    run |= {"preset": config.preset, "agent": config.agent.name, "env": config.env}
    run |= {"size": config.size, "target_steps": config.steps}
    try:
        snapshot = read_status(directory)
    except ConfigError as error:
        return run | {"state": "starting", "why": str(error)}
    run |= {"steps": snapshot.get("env_steps"), "updates": snapshot.get("updates")}
    run |= {"return": snapshot.get("return_mean20"), "age_s": snapshot["age_s"]}
    return run | {"state": _state(snapshot), "bound_by": snapshot.get("bound_by")}


def _state(snapshot: dict[str, Any]) -> str:
    if snapshot["alive"]:
        return "running"
    return snapshot["phase"] if snapshot.get("phase") in ENDED else "died"


def _table(found: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("run", "preset", "agent", "environment"):
        table.add_column(name, overflow="fold", min_width=8)
    for name in ("steps", "return"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for run in found:
        ended = run["state"] != "running" and run["age_s"] is not None
        table.add_row(
            Path(run["run"]).name,
            run["preset"] or "-",
            " ".join(filter(None, (run["agent"], run["size"]))) or "-",
            run["env"] or "-",
            f"{count(run['steps'])}/{count(run['target_steps'])}",
            number(run["return"]),
            run["state"] + (f", {duration(run['age_s'])} ago" if ended else ""),
        )
    return table
