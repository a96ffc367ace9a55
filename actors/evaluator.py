"""An evaluation actor: whole episodes with one version of the policy, beside training."""

from __future__ import annotations

import time
from collections import Counter, deque
from contextlib import ExitStack
from typing import Any

from actors.actor import ActorProcess, ActorSpec
from actors.loop import ActingLoop
from actors.weights import Refresher, WeightSource
from dreamer.weights import Version

SCORES = 256
"""Episodes that an answer carries: far more than end between two questions of the fleet."""
_LOOK_S = 0.25


class Evaluator(ActorProcess):
    """Play episodes with the newest weights, report them, and rest until there are newer ones.

    Guarantees:
        1. All episodes of a round are played to their end with the same weights, one after the
           other, so that short ones count no more than long ones.
        2. Nothing is written to the replay, and the replay is not connected to.
        3. An episode that its environment did not survive is not a score.

    Args:
        spec: what to do; its split is "eval", and it has one environment.
        source: where weights come from.
    """

    def __init__(self, spec: ActorSpec, source: WeightSource) -> None:
        assert spec.split == "eval" and spec.envs == 1 and not spec.lockstep, spec
        self._scores: deque[dict[str, Any]] = deque(maxlen=SCORES)
        self._played = 0
        self._resting = ""
        self._referee = _Referee()
        super().__init__(spec, source)

    def stats(self) -> dict[str, Any]:
        """Return what `ActorProcess.stats` does, and the newest scores.

        `scores` has {number, return, length, end, version} for each episode; the numbers count
        from 1 in every life.
        """
        found = super().stats() | {"scores": list(self._scores)}
        return found | {"blocked": self._resting} if self._resting else found

    def _open_streams(self, stack: ExitStack) -> list[Any]:
        return [_Unwritten(self._spec.life)]

    def _observer(self) -> Any:
        self._referee.metrics = self._metrics
        return self._referee

    def _act(self) -> None:
        refresher, loop = self._refresher, self._loop
        assert refresher is not None and loop is not None
        while not self._stop.is_set():
            begin = time.monotonic()
            refresher.refresh(self._policy)
            self._play(loop, refresher.version)
            self._rest(refresher, begin + self._spec.rest_s)

    def _play(self, loop: ActingLoop, version: Version) -> None:
        """Play one round; what an unfinished or broken episode brought is forgotten."""
        left = self._spec.episodes
        while left and not self._stop.is_set():
            ends, lost = Counter(loop.stats.ends), _failures(loop)
            while loop.stats.ends == ends and not self._stop.is_set():
                loop.step()
            if _failures(loop) == lost and loop.stats.ends != ends:
                (end,) = loop.stats.ends - ends
                self._note(end, version)
                left -= 1

    def _note(self, end: str, version: Version) -> None:
        ret, length = self._referee.last
        self._played += 1
        self._scores.append(
            {
                "number": self._played,
                "return": ret,
                "length": length,
                "end": end,
                "version": list(version),
            }
        )

    def _rest(self, refresher: Refresher, until: float) -> None:
        """Wait for the next round: the time between rounds, and then for newer weights."""
        fence, update = refresher.version
        self._resting = "rests until its next evaluation"
        while not self._stop.wait(min(_LOOK_S, max(until - time.monotonic(), 0.0))):
            if time.monotonic() >= until:
                self._resting = "rests until there are newer weights"
                if refresher.wait((fence, update + 1), _LOOK_S):
                    break
        self._resting = ""


class _Unwritten:
    """A writer that keeps nothing."""

    def __init__(self, incarnation: int) -> None:
        self.incarnation = incarnation

    def append(self, record: dict[str, Any], version: Version) -> None:
        """Drop one record."""


class _Referee:
    """Hears of the end of an episode, and tells the metrics."""

    def __init__(self) -> None:
        self.metrics: Any = None
        self.last = (0.0, 0)

    def step(self, *, policy_s: float, env_s: float, write_s: float) -> None:
        """One step is done."""
        self.metrics.step(policy_s=policy_s, env_s=env_s, write_s=write_s)

    def episode(self, ret: float, length: int) -> None:
        """An episode has ended."""
        self.last = ret, length
        self.metrics.episode(ret, length)


def _failures(loop: ActingLoop) -> int:
    return sum(loop.stats.restarts.values()) + sum(loop.stats.rejected.values())
