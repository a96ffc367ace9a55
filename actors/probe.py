"""Does an environment keep its contract, and how fast is it: what `dreamfleet check-env` shows."""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from actors.config import ActorConfig
from actors.envs import EnvConfig
from actors.spaces import random_actions
from actors.worker import EnvFailure, EnvSlot, Observation
from dreamer.spaces import ActionSpace, ObsSpace, record_column

MOST_FAILURES = 20
"""Failures after which a check gives up."""
_RECORD_FLAGS_BYTES = 4 + 3


@dataclass(frozen=True, kw_only=True)
class Violation:
    """One way in which the environment broke its contract."""

    kind: str
    """``crash``, ``exit``, ``hang``, ``start``, ``seed``, or what was wrong with an answer: ``api
    keys shape dtype bounds not_finite reward``."""
    message: str
    """What happened the first time."""
    count: int
    """How often."""


@dataclass(frozen=True, kw_only=True)
class EnvReport:
    """What a check of an environment has found."""

    env: str
    """Name of the environment."""
    obs_space: ObsSpace
    """What it shows."""
    action_space: ActionSpace
    """What it takes."""
    action_repeat: int
    """Frames per decision."""
    steps: int
    """Valid steps that were taken."""
    steps_per_s: float
    """Decisions per second of the environment alone, resets included."""
    step_ms: float
    """Median milliseconds of a step."""
    reset_ms: float
    """Median milliseconds of a reset."""
    bytes_per_step: int
    """Uncompressed bytes of one record, without the agent's latent."""
    episodes: dict[str, int]
    """Episodes that ended, by ``terminated`` or ``truncated``."""
    length_mean: float
    """Mean decisions of the episodes that ended; NaN if none did."""
    return_mean: float
    """Mean return of those under random actions; NaN if none ended."""
    violations: tuple[Violation, ...] = ()
    """What must be mended before training."""
    notes: tuple[str, ...] = ()
    """What is worth knowing, and no violation."""

    @property
    def ok(self) -> bool:
        """Whether no violation was found."""
        return not self.violations


@dataclass
class _Tally:
    """What has been seen so far."""

    steps: int = 0
    step_s: list[float] = field(default_factory=list)
    reset_s: list[float] = field(default_factory=list)
    ends: Counter[str] = field(default_factory=Counter)
    lengths: list[int] = field(default_factory=list)
    returns: list[float] = field(default_factory=list)
    first: dict[str, str] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)

    def fail(self, failure: EnvFailure) -> None:
        """Note a failure."""
        kind = failure.label
        self.counts[kind] += 1
        self.first.setdefault(kind, str(failure).strip())

    @property
    def hopeless(self) -> bool:
        """Whether enough has gone wrong."""
        return sum(self.counts.values()) >= MOST_FAILURES


def check_env(
    env_id: str,
    config: EnvConfig | None = None,
    *,
    steps: int = 200,
    seed: int = 0,
    hang_timeout_s: float = 30.0,
) -> EnvReport:
    """Take random steps in an environment and report what it did.

    It runs in a process of its own, so that its crashes and hangs are part of the report. Blocks
    until the steps are done, or enough has gone wrong.

    Raises:
        EnvError: it cannot be made: unknown, not installed, or with spaces that do not fit.
        EnvFailure: it crashes or hangs while it is made.
    """
    config = config or EnvConfig()
    actor = ActorConfig(hang_timeout_s=hang_timeout_s)
    with EnvSlot(env_id, config, actor, seed) as slot:
        slot.open()
        tally, begin = _Tally(), time.perf_counter()
        while tally.steps < steps and not tally.hopeless:
            _play(slot, tally, steps, np.random.default_rng((seed, tally.steps)))
        elapsed = time.perf_counter() - begin
        notes = _notes(tally)
        if not tally.counts and not _repeats(env_id, config, actor, seed):
            notes.append(
                "two resets with the same seed gave different observations: runs in lockstep will "
                "not be reproducible"
            )
        return _report(env_id, slot, tally, elapsed, tuple(notes))


def _play(slot: EnvSlot, tally: _Tally, steps: int, rng: np.random.Generator) -> None:
    """Play one episode, until its end, the last step, or a failure."""
    try:
        slot.send(None)
        tally.reset_s.append(slot.receive().seconds)
        total, length = 0.0, 0
        while tally.steps < steps:
            slot.send(random_actions(slot.action_space, rng))
            seen = slot.receive()
            tally.steps += 1
            tally.step_s.append(seen.seconds)
            total, length = total + seen.reward, length + 1
            if seen.terminated or seen.truncated:
                tally.ends[_end(seen)] += 1
                tally.lengths.append(length)
                tally.returns.append(total)
                return
    except EnvFailure as failure:
        tally.fail(failure)


def _end(seen: Observation) -> str:
    return "terminated" if seen.terminated else "truncated"


def _repeats(env_id: str, config: EnvConfig, actor: ActorConfig, seed: int) -> bool:
    """Return whether the same seed begins the same episode in two new environments."""
    first = []
    slots = [EnvSlot(env_id, config, actor, seed) for _ in range(2)]
    with slots[0], slots[1]:
        for slot in slots:
            slot.open()
            slot.send(None)
            first.append(slot.receive().obs)
    return all(np.array_equal(first[0][key], first[1][key]) for key in first[0])


def _notes(tally: _Tally) -> list[str]:
    notes = []
    if not tally.lengths and tally.steps:
        notes.append(
            f"no episode ended within {tally.steps} steps: set --environment.time-limit if none "
            "ever does"
        )
    if tally.lengths and min(tally.lengths) == 1:
        notes.append("some episodes last a single decision")
    if tally.returns and not any(tally.returns):
        notes.append("every episode had a return of 0 under random actions: rewards are sparse")
    return notes


def _report(
    env_id: str, slot: EnvSlot, tally: _Tally, elapsed_s: float, notes: tuple[str, ...]
) -> EnvReport:
    columns = [record_column(spec) for spec in (slot.obs_space | slot.action_space).values()]
    size = sum(np.dtype(dtype).itemsize * math.prod(shape) for dtype, shape in columns)
    inside_s = sum(tally.step_s) + sum(tally.reset_s)
    return EnvReport(
        env=env_id,
        obs_space=slot.obs_space,
        action_space=slot.action_space,
        action_repeat=slot.action_repeat,
        steps=tally.steps,
        steps_per_s=tally.steps / inside_s if inside_s > 0 else tally.steps / elapsed_s,
        step_ms=_median_ms(tally.step_s),
        reset_ms=_median_ms(tally.reset_s),
        bytes_per_step=size + _RECORD_FLAGS_BYTES,
        episodes=dict(tally.ends),
        length_mean=float(np.mean(tally.lengths)) if tally.lengths else math.nan,
        return_mean=float(np.mean(tally.returns)) if tally.returns else math.nan,
        violations=tuple(
            Violation(kind=kind, message=tally.first[kind], count=count)
            for kind, count in tally.counts.items()
        ),
        notes=notes,
    )


def _median_ms(seconds: list[float]) -> float:
    return float(np.median(seconds)) * 1e3 if seconds else math.nan
