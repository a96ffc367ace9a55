"""`dreamfleet check-env`: does an environment keep its contract, and how fast is it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from actors.envs import EnvConfig
from deploy.config import ConfigError
from deploy.progress import console, count, number

if TYPE_CHECKING:
    from actors.probe import EnvReport


@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """Take random steps in an environment and report spaces, ends, speed, size and violations."""

    env: str = "CartPole-v1"
    """Environment, named as for training."""
    steps: int = 1000
    """Steps to take."""
    seed: int = 0
    """Seed of the environment and of the actions."""
    hang_timeout_s: float = 30.0
    """Seconds without an answer after which a step counts as hung."""
    environment: EnvConfig = field(default_factory=EnvConfig)
    """What the environment shows and how it is stepped."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"--steps must be at least 1, got {self.steps}")
        if not self.hang_timeout_s > 0:
            raise ConfigError(f"--hang-timeout-s must be above 0, got {self.hang_timeout_s}")


def check_env(options: CheckOptions) -> int:
    """Check an environment and print what was found. Returns 1 if it breaks its contract.

    Raises:
        EnvError, SpaceError, EnvFailure: it cannot be made, or the agent cannot take its spaces.
    """
    from actors import probe

    with console().status(f"taking {options.steps} steps in {options.env} …"):
        report = probe.check_env(
            options.env,
            options.environment,
            steps=options.steps,
            seed=options.seed,
            hang_timeout_s=options.hang_timeout_s,
        )
    console().print(_facts(report))
    console().print(_findings(report))
    return 0 if report.ok else 1


def _facts(report: EnvReport) -> Table:
    table = _grid()
    table.add_row("environment", report.env)
    table.add_row("observations", _space(report.obs_space))
    table.add_row("actions", _space(report.action_space))
    table.add_row("action repeat", str(report.action_repeat))
    speed = f"{count(report.steps_per_s)}/s alone, {_ms(report.step_ms)} a step"
    table.add_row("speed", f"{speed}, {_ms(report.reset_ms)} a reset")
    table.add_row("size", f"{count(report.bytes_per_step)} bytes a step, without latents")
    table.add_row("episodes", _episodes(report))
    return table


def _findings(report: EnvReport) -> Table:
    table = _grid()
    for violation in report.violations:
        times = "once" if violation.count == 1 else f"{violation.count} times"
        what = Text(violation.kind, "bold red")
        table.add_row(what, f"{' '.join(violation.message.split())} ({times})")
    for note in report.notes:
        table.add_row(Text("note", "yellow"), note)
    verdict = "broken: mend the above before training" if report.violations else "fit for training"
    table.add_row(Text("verdict", "bold"), f"{verdict}, after {count(report.steps)} steps")
    return table


def _grid() -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True, min_width=13)
    table.add_column(overflow="fold")
    return table


def _space(space: dict[str, Any]) -> str:
    return "\n".join(f"{name}: {_spec(spec)}" for name, spec in space.items())


def _spec(spec: Any) -> str:
    """Return a spec as words: its kind, and its fields on one line."""
    kind = type(spec).__name__.removesuffix("Spec").removesuffix("Action").lower()
    values = ", ".join(f"{item.name} {_value(getattr(spec, item.name))}" for item in fields(spec))
    return f"{kind}, {values}"


def _value(value: Any) -> str:
    """Return a field's value; long tuples of one number are shortened."""
    if isinstance(value, tuple) and len(value) > 3 and len(set(value)) == 1:
        return f"{value[0]:g} × {len(value)}"
    return str(value)


def _episodes(report: EnvReport) -> str:
    if not report.episodes:
        return "none ended"
    ends = ", ".join(f"{times} {end}" for end, times in sorted(report.episodes.items()))
    mean = f"{number(report.length_mean)} steps, return {number(report.return_mean)}"
    return f"{ends}; on average {mean} under random actions"


def _ms(milliseconds: float) -> str:
    return "-" if math.isnan(milliseconds) else f"{milliseconds:.3g} ms"
