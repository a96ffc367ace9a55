"""How long writers wait for room, and how much of that is for training."""

from __future__ import annotations

import time


class WaitClock:
    """Adds up waits while they go on; the caller holds a lock around every call."""

    def __init__(self) -> None:
        self._blocked_s = self._limited_s = 0.0
        self._unsettled_s = 0.0
        self._unsettled_since: float | None = None
        self._wait: tuple[float, float] | None = None

    def unsettled(self, waits: bool) -> None:
        """Take note of whether training admits no insert, until told otherwise."""
        now = time.monotonic()
        if waits and self._unsettled_since is None:
            self._unsettled_since = now
        elif not waits and self._unsettled_since is not None:
            self._unsettled_s += now - self._unsettled_since
            self._unsettled_since = None

    def begin(self) -> None:
        """Take note that a writer begins to wait."""
        now = time.monotonic()
        self._wait = now, self._unsettled(now)

    def end(self) -> None:
        """Take note that it waits no more."""
        self._blocked_s, self._limited_s = self.totals()
        self._wait = None

    def totals(self) -> tuple[float, float]:
        """Return (seconds waited, of these for training), the wait that goes on now included."""
        if self._wait is None:
            return self._blocked_s, self._limited_s
        now, (since, unsettled_s) = time.monotonic(), self._wait
        limited_s = min(now - since, self._unsettled(now) - unsettled_s)
        return self._blocked_s + now - since, self._limited_s + limited_s

    def _unsettled(self, now: float) -> float:
        since = self._unsettled_since
        return self._unsettled_s + (now - since if since is not None else 0.0)
