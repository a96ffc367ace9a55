"""Messages that others can cause as often as they like."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

EVERY_S = 10.0


class Seldom:
    """Logs the first of many like messages at once, and of the others only how many there are.

    Every ten seconds at most it says how many and what the newest is. For one thread.

    Args:
        log, level: where to, and how loudly.
        clock: seconds that only grow.
    """

    def __init__(
        self, log: logging.Logger, level: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._log, self._level, self._clock = log, level, clock
        self._silent_until = float("-inf")
        self._untold, self._newest = 0, ""

    def say(self, text: str) -> None:
        """Log a message, or count it."""
        self.catch_up()
        if self._clock() >= self._silent_until:
            self._tell(text)
        else:
            self._untold, self._newest = self._untold + 1, text

    def catch_up(self) -> None:
        """Say how many were counted, once it is time; call it now and then."""
        if self._untold and self._clock() >= self._silent_until:
            self._tell(f"{self._newest} (and {self._untold - 1} more since the last such line)")
            self._untold = 0

    def _tell(self, text: str) -> None:
        self._log.log(self._level, "%s", text)
        self._silent_until = self._clock() + EVERY_S
