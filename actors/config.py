"""How actors run and recover; free of torch, Ray and every environment library."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from actors.envs.config import EnvConfig
from replay_service import is_loopback

__all__ = ["ActorConfig", "EnvConfig", "EvalConfig", "FleetConfig"]


@dataclass(frozen=True, kw_only=True)
class ActorConfig:
    """How actors run and recover."""

    isolation: Literal["process", "inline"] = "process"
    """Where each environment runs: a process of its own, which may crash or hang without harm, or
    the actor's process, which is faster for cheap environments but survives exceptions only."""
    hang_timeout_s: float = 60.0
    """Seconds without an answer after which an environment's process is killed and restarted."""
    start_timeout_s: float = 120.0
    """Seconds that an environment's process may take to start and to make the environment."""
    late_after_s: float = 1.0
    """Seconds for which one environment without an answer holds up the others of its actor; then
    they go on without it until it answers. Environments in the actor's process cannot be left
    behind (isolation inline)."""
    max_failures: int = 10
    """Failures of one environment (crash, hang, invalid observation or reward) in a row, with no
    valid step between them, after which its actor gives up."""
    max_policy_age_s: float = 600.0
    """Age of the policy in seconds above which an actor warns; it keeps acting on what it has."""
    metrics_listen: str = "127.0.0.1"
    """Address at which every actor serves its metrics, on a free port; beyond loopback it needs a
    token."""
    metrics_token_file: Path | None = None
    """File on the actor's node whose first line readers of its metrics must send as a bearer token,
    readable by its owner alone."""
    metrics_host: str | None = None
    """Name or address at which Prometheus reaches the actor's node, if it is not the one that the
    node has in Ray. It is the same for all nodes."""

    def __post_init__(self) -> None:
        if self.isolation not in ("process", "inline"):
            raise ValueError(f"--actor.isolation must be process or inline, got {self.isolation!r}")
        for name in ("hang_timeout_s", "start_timeout_s", "late_after_s", "max_policy_age_s"):
            if not getattr(self, name) > 0:
                flag = name.replace("_", "-")
                raise ValueError(f"--actor.{flag} must be above 0, got {getattr(self, name)}")
        if self.metrics_token_file is None and not is_loopback(self.metrics_listen):
            raise ValueError(
                f"--actor.metrics-listen {self.metrics_listen} would show metrics to anybody on "
                "the network: give --actor.metrics-token-file with a file that only you can read "
                "and whose first line is a long random word, or listen at 127.0.0.1"
            )
        if self.max_failures < 1:
            raise ValueError(f"--actor.max-failures must be at least 1, got {self.max_failures}")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Actors that play whole episodes with one version of the policy, beside training.

    They act as the agent's publication evaluates it, write nothing to the replay, and their scores
    are the rows of scores.jsonl whose split is eval.
    """

    actors: int = 0
    """Evaluation actors, on top of the others; 0 for none."""
    episodes: int = 5
    """Episodes that each of them plays with the same weights, one after the other."""
    every_s: float = 60.0
    """Least seconds between the beginnings of two evaluations by the same actor; it also waits
    until there are newer weights."""

    def __post_init__(self) -> None:
        if self.actors < 0:
            raise ValueError(f"--eval.actors must be at least 0, got {self.actors}")
        if self.episodes < 1:
            raise ValueError(f"--eval.episodes must be at least 1, got {self.episodes}")
        if not self.every_s >= 0:
            raise ValueError(f"--eval.every-s must be at least 0, got {self.every_s}")


@dataclass(frozen=True, kw_only=True)
class FleetConfig:
    """What becomes of the actors on a Ray cluster when their learner is away.

    They go on until the train ratio admits no more, and then wait; the next learner of the same run
    directory takes them over. With a private Ray, or in lockstep, they end with their learner.
    """

    keep: bool = False
    """Leave the actors running for the next learner when a signal stops this one, and not only when
    it dies. `dreamfleet stop RUN_DIR` ends them."""
    orphan_after_s: float = 1800.0
    """Seconds without a learner after which actors and hub end by themselves."""

    def __post_init__(self) -> None:
        if not self.orphan_after_s > 0:
            raise ValueError(
                f"--fleet.orphan-after-s must be above 0 seconds, got {self.orphan_after_s}"
            )
