"""For how long one side of the train ratio has been waiting for the other."""

from __future__ import annotations

import time


class Standstill:
    """Measures for how long a counter has not moved while there was a reason for that."""

    def __init__(self) -> None:
        self._mark: tuple[int, float] | None = None

    def seconds(self, reason: str, counter: int) -> float:
        """Take a reading; returns 0 without a reason, else seconds since the counter moved."""
        now, mark = time.monotonic(), self._mark
        if not reason:
            self._mark = None
            return 0.0
        if mark is None or mark[0] != counter:
            self._mark = mark = (counter, now)
        return now - mark[1]


def lasting(reason: str, seconds: float) -> str:
    """Return a reason with its duration, "… for 14 s"; empty without a reason."""
    return f"{reason} for {seconds:.0f} s" if reason else ""
