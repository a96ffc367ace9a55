"""`dreamfleet status`: how a run is doing, or how it ended, from what it left on the disk."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import psutil
import tyro

from deploy.config import FILE_NAME, ConfigError, load_config
from deploy.progress import ENDED, command_name, console, duration, view

STATUS_FILE = "status.json"
SILENT_S = 30.0
"""Age of a snapshot, which is written every second, above which its writer hangs."""
CLOCK_SLACK_S = 5.0
"""By how much the start of a process may seem to lie after the start that it wrote down."""


@dataclass(frozen=True, kw_only=True)
class StatusOptions:
    """Show how a run is doing, or how it ended."""

    run_dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")]
    """Run directory."""
    json: bool = False
    """Print the last snapshot as JSON, with its age in seconds and whether the run is alive."""
    healthy: bool = False
    """Say only whether the run does what it should, for health checks: it lives, reports, and
    trains or says what it waits for. Exit code 0 if so, else 1."""


def status(options: StatusOptions) -> int:
    """Print the state of a run. Returns 0 if it runs or ended as it should, 1 if it died.

    Raises:
        ConfigError: there is no run in the directory, or its files cannot be read.
    """
    config = load_config(require_run(options.run_dir) / FILE_NAME)
    snapshot = read_status(options.run_dir)
    if options.healthy:
        trouble = unhealthy(snapshot)
        console().print(trouble or "healthy", highlight=False, markup=False, soft_wrap=True)
        return 1 if trouble else 0
    if options.json:
        console().print_json(json.dumps(snapshot))
    else:
        state = _state(snapshot, options.run_dir)
        console().print(view(snapshot, f"{options.run_dir} · {config.env} · {state}"))
        if snapshot["alive"] and snapshot.get("metrics_port"):
            url = f"http://127.0.0.1:{snapshot['metrics_port']}/metrics"
            console().print(f"metrics of the learner: {url}", highlight=False, soft_wrap=True)
        if not snapshot["alive"] and config.ray != "local":
            look = f"{command_name()} stop {options.run_dir} --look"
            console().print(f"what is left of it on the cluster: {look}", soft_wrap=True)
    return 0 if snapshot["alive"] or snapshot.get("phase") in ENDED[:2] else 1


def require_run(directory: Path) -> Path:
    """Return the directory if it holds a run. Raises ConfigError, naming other runs, if not."""
    if (directory / FILE_NAME).is_file():
        return directory
    places = {directory.parent, Path("runs")}
    found = sorted(str(path.parent) for place in places for path in place.glob(f"*/{FILE_NAME}"))
    known = f"; runs here: {', '.join(found[:10])}" if found else ""
    raise ConfigError(f"there is no run in {directory}{known}")


def read_status(directory: Path) -> dict[str, Any]:
    """Return the last snapshot of a run with ``age_s`` and ``alive`` added.

    Raises:
        ConfigError: none was written yet, or it cannot be read.
    """
    path = directory / STATUS_FILE
    try:
        snapshot = json.loads(path.read_text())
        age = time.time() - path.stat().st_mtime
    except FileNotFoundError as error:
        raise ConfigError(
            f"{directory} has no {STATUS_FILE} yet: its run is starting, or ended before training"
        ) from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    return {**snapshot, "age_s": age, "alive": _alive(snapshot)}


def unhealthy(snapshot: dict[str, Any]) -> str:
    """Return what is wrong with a run of which `read_status` gave the snapshot, or nothing.

    A check of one moment: an update that takes longer than the window of the rates looks like a
    standstill, so ask a few times before you act.
    """
    if not snapshot["alive"]:
        return f"the learner does not run (phase {snapshot.get('phase')})"
    if snapshot["age_s"] > SILENT_S:
        return f"the learner has not reported for {snapshot['age_s']:.0f} s"
    if not snapshot.get("updates_per_s") and not snapshot.get("waiting_for"):
        return "no update within the last seconds, and nothing that it waits for"
    return ""


def _alive(snapshot: dict[str, Any]) -> bool:
    """Whether the process that wrote the snapshot runs: its number may belong to another by now."""
    if snapshot.get("phase") in ENDED:
        return False
    try:
        process = psutil.Process(int(snapshot["pid"]))
        started = process.create_time()
        # One that has ended stays in the table until whoever started it asks how.
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
    except (psutil.Error, KeyError, TypeError, ValueError):
        return False
    return started <= float(snapshot.get("started_at", started)) + CLOCK_SLACK_S


def _state(snapshot: dict[str, Any], directory: Path) -> str:
    age = duration(snapshot["age_s"])
    if snapshot["alive"]:
        return f"running, {age} ago"
    if snapshot.get("phase") in ENDED:
        return f"{snapshot['phase']} {age} ago"
    return f"died {age} ago: {command_name()} train --run-dir {directory} continues it"
