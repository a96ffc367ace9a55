"""Where the learner's time goes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

PHASES = (
    "warmup",
    "environments",
    "data_wait",
    "compile",
    "update",
    "publish",
    "checkpoint",
    "settle",
    "log",
    "other",
)
"""Where the learner's time goes. ``warmup``: the replay is not yet large enough. ``environments``:
the train ratio allows no update until more steps arrive. ``data_wait``: an update was allowed, and
its data was not ready. ``compile``: an update that is compiled while it runs. The rest is named
after what runs."""


class PhaseClock:
    """Add up the wall-clock time of each phase. Phases do not nest: an inner one pauses the outer.

    Reading from another thread is safe.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._total = dict.fromkeys(PHASES, 0.0)
        self._phase = "other"
        self._since = clock()

    @property
    def phase(self) -> str:
        """Name of the current phase."""
        return self._phase

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Count the time inside the block as this phase."""
        outer = self._enter(phase)
        try:
            yield
        finally:
            self._enter(outer)

    def totals(self) -> dict[str, float]:
        """Return the seconds spent in each phase so far, the current one included."""
        with self._lock:
            total = dict(self._total)
            total[self._phase] += self._clock() - self._since
        return total

    def _enter(self, phase: str) -> str:
        with self._lock:
            now, outer = self._clock(), self._phase
            self._total[outer] += now - self._since
            self._phase, self._since = phase, now
        return outer


def shares(now: Mapping[str, float], before: Mapping[str, float]) -> dict[str, float]:
    """Return the share of each phase in the time between two totals of a clock."""
    spent = {phase: now[phase] - before.get(phase, 0.0) for phase in now}
    whole = sum(spent.values())
    return {phase: seconds / whole if whole > 0 else 0.0 for phase, seconds in spent.items()}
