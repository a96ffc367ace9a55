"""What takes the place of actors, limiter and weight hub where a learner only reads a replay."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from learner.publish import PublishStats


class OfflinePace:
    """Updates without end or, with a target, until it is reached; nothing is waited for."""

    def __init__(self, mirror: Any, target_updates: int) -> None:
        self.reason, self.limiter = "", None
        self._mirror, self._target = mirror, target_updates

    def may_update(self, updates: int) -> bool:
        """Return whether there is a window to train on."""
        self.reason = "" if self._mirror.valid_starts else "updates wait for the first whole window"
        return not self.reason

    def more(self, updates: int, timeout_s: float) -> None:
        """Block until a chunk arrives, at most for the timeout."""
        self._mirror.wait(timeout_s)

    def at_rest(self, updates: int) -> bool:
        """Return whether all updates are done."""
        return updates >= self._target

    def saved(self) -> None:
        """Do nothing: there are no actors."""


class NoAccount:
    """The limiter of a learner that nobody waits for: it owes nothing and pays for nothing."""

    i0 = min_size_steps = room_steps = 0
    train_ratio = Fraction(0)

    def __init__(self, batch_steps: int) -> None:
        self.batch_steps = batch_steps

    def drift(self, inserted: int, updates: int) -> Fraction:
        """Return 0: there is no account."""
        return Fraction(0)

    def budget(self, updates: int) -> int:
        """Return 0: nothing is inserted."""
        return 0

    def why_inserts_wait(self, size: int, inserted: int, updates: int) -> str:
        """Return nothing: whoever inserts waits for another learner."""
        return ""


class NoServer:
    """The server of a learner that only reads: what it has replayed is settled with nobody."""

    trouble, away, shards = "", 0, ()

    def settle(self, fence: int, replayed_steps: int, budget_steps: int) -> None:
        """Do nothing."""

    def memory(self) -> tuple[int, int]:
        """Return 0 used bytes of no limit: the server's memory is its owner's to watch."""
        return 0, 0


class NoPublisher:
    """The publisher of a learner whose weights nobody acts with."""

    def __init__(self) -> None:
        self.stats = PublishStats()

    def publish(self, update: int) -> bool:
        """Return True: there is nothing to deliver."""
        return True
