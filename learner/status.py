"""The state of a run at one moment, for the live view and for ``status.json``."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from learner.files import write_atomically


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What a run is doing now."""

    env_steps: int
    """Environment steps in the replay log."""
    target_steps: int
    """Environment steps at which the run ends."""
    env_steps_per_s: float
    """Over the last few seconds."""
    updates: int
    """Updates of the agent."""
    updates_per_s: float
    """Over the last few seconds."""
    ratio_actual: float
    """Replayed steps per inserted step since training began."""
    ratio_target: float
    """The ratio that the limiter keeps."""
    return_mean20: float | None
    """Mean return of the last 20 episodes; None before the first."""
    episodes: int
    """Episodes finished in training."""
    losses: dict[str, float]
    """Training metrics of the last logged update."""
    policy_version: tuple[int, int]
    """(fence, update) of the weights published last."""
    weights_age_s: float | None
    """Age of those weights in seconds; None before the first."""
    bound_by: str
    """What bounds the run, with its share of the time: now, or over all of a run that is over."""
    shares: dict[str, float]
    """Share of the learner's time in each phase, over the last few seconds."""
    eta_s: float | None
    """Estimated seconds to the end; None while unknown."""
    phase: str
    """What the learner is doing, or how the run ended."""
    waiting_for: str
    """Why no update is running, and for how long; empty while updates run."""
    inserts_wait: str
    """Why no insert is admitted, and for how long; empty while they are. Of a learner that only
    reads a replay: which servers it cannot follow now, and why."""
    pid: int
    """Process of the learner."""
    started_at: float
    """Wall-clock time at which this process started, in seconds."""
    per_actor: list[dict[str, Any]] = field(default_factory=list)
    """What each actor says about itself."""
    replay_servers: list[dict[str, Any]] = field(default_factory=list)
    """Of several replay servers each: its address, steps inserted, held and admitted, and why it is
    away, if it is."""
    eval_mean20: float | None = None
    """Mean return of the last 20 evaluation episodes; None before the first."""
    target_updates: int | None = None
    """Updates at which a run ends that only reads a replay; None for all others."""
    advice: str = ""
    """What to do about what bounds the run; empty where there is nothing."""
    metrics_port: int | None = None
    """Loopback port of the learner's Prometheus metrics; None while they are not served."""


def write_status(path: Path, snapshot: Snapshot) -> None:
    """Write the snapshot as JSON, so that a reader sees the old or the new one."""
    write_atomically(path, json.dumps(asdict(snapshot), indent=2, default=str).encode())
