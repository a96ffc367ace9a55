"""`dreamfleet bench`: run benchmarks, show their tables and keep their numbers."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import platform
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tyro
from rich.table import Table

from deploy.config import ConfigError
from deploy.progress import console

What = Literal[
    "learner",
    "replay",
    "replay_limits",
    "actors",
    "pipeline",
    "scaling",
    "weights",
    "metrics",
    "all",
]
BENCHMARKS = tuple(name for name in get_args(What) if name != "all")


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """Measure a part, or all one after the other; nothing else should run meanwhile."""

    what: Annotated[What, tyro.conf.Positional] = "all"
    """learner: ms per update and where they go; replay: insert and sampling against raw SET and
    memcpy; replay_limits: many writers, processor time, growth, start-up; actors: environment
    steps/s bare, with policy, as an actor; pipeline: end to end; scaling: 1 to 32 actors with
    environments that sleep; weights: learner to 1 to 64 actors; metrics: what
    counting and scrapes take."""
    json: Path | None = None
    """File for the numbers, with what they were measured on."""
    quick: bool = False
    """Small sizes, to see that everything runs; the numbers mean little."""

    def __post_init__(self) -> None:
        if self.json is not None and not self.json.absolute().parent.is_dir():
            raise ConfigError(f"--json {self.json}: there is no folder {self.json.parent}")


def bench(options: BenchOptions) -> int:
    """Run the benchmarks that were asked for, one after the other. Blocks for minutes."""
    names = BENCHMARKS if options.what == "all" else (options.what,)
    results: dict[str, Any] = {"machine": machine()}
    for name in names:
        module = importlib.import_module(f"benchmarks.{name}")
        takes_quick = "quick" in inspect.signature(module.run).parameters
        begin = time.monotonic()
        if not console().is_terminal:
            # Nobody sees a line that turns.
            console().print(f"measuring {name} …")
        with console().status(f"measuring {name} …"):
            result = module.run(quick=options.quick) if takes_quick else module.run()
        results[name] = {**result, "seconds": round(time.monotonic() - begin, 1)}
        console().print(shown(name, module.table(result)))
        if options.json is not None:
            options.json.write_text(json.dumps(results, indent=2) + "\n")
    if options.json is not None:
        console().print(f"written to {options.json}")
    return 0


def machine() -> dict[str, Any]:
    """Return what numbers depend on: processor, cores, versions, accelerator."""
    import torch

    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ray": version("ray"),
        "dreamfleet": version("dreamfleet"),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    models = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor())


def report(title: str, result: dict[str, Any], rows: list[list[str]], file: Path | None) -> None:
    """Show what a benchmark that runs by itself has found, and keep it if there is a file for it.

    Args:
        title: of the table, and the key in the file.
        result: all numbers, with the machine's ``load`` at the beginning.
        rows: a header and rows of text.
        file: where to keep the numbers.
    """
    console().print(shown(title, rows))
    console().print(f"load at the beginning {result['load']:.1f}")
    if file is not None:
        file.write_text(json.dumps({"machine": machine(), title: result}, indent=2) + "\n")


def shown(title: str, content: Table | list[list[str]]) -> Table:
    """Return a table; benchmarks give one, or a header and rows of text."""
    if isinstance(content, Table):
        return content
    table = Table(*content[0], title=title)
    for row in content[1:]:
        table.add_row(*row)
    return table
