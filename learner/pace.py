"""When the learner may update, and how it gets more experience when it may not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol


class Pace(Protocol):
    """Decides between updating and waiting."""

    reason: str
    """Why no update may start now; empty if one may."""
    limiter: Any
    """The account that is kept."""

    def may_update(self, updates: int) -> bool:
        """Return whether the next update may start."""

    def more(self, updates: int, timeout_s: float) -> None:
        """Block until more experience may be there."""

    def at_rest(self, updates: int) -> bool:
        """Return whether a checkpoint may be written, and the run may end, at this point."""

    def saved(self) -> None:
        """Take note that a checkpoint has just been written."""


class FreePace:
    """Actors and learner run side by side; the limiter holds both inside its band."""

    def __init__(self, mirror: Any, limiter: Any) -> None:
        self.reason = ""
        self._mirror, self.limiter = mirror, limiter

    def may_update(self, updates: int) -> bool:
        """Return whether the limiter allows the next update on what has been absorbed."""
        mirror = self._mirror
        allowed = self.limiter.may_start_update(mirror.size_steps, mirror.inserted_steps, updates)
        if allowed and not mirror.valid_starts:
            self.reason = "updates wait for the first whole window"
            return False
        self.reason = self.limiter.reason
        return bool(allowed)

    def more(self, updates: int, timeout_s: float) -> None:
        """Block until a chunk arrives, at most for the timeout."""
        self._mirror.wait(timeout_s)

    def at_rest(self, updates: int) -> bool:
        """Return True: any point between two updates is as good as another."""
        return True

    def saved(self) -> None:
        """Do nothing: actors go on."""


class LockstepPace:
    """Actor and learner take turns: a round of steps, then every update that they pay for.

    What happens depends on the seed and the configuration alone, not on the speed of anything.

    Args:
        mirror: the learner's mirror.
        limiter: whose account is kept without any tolerance.
        collect: takes the number of updates, collects a round with the weights after them, and
            returns the steps inserted since the beginning.
        cut: ends every episode and starts the environments again from fresh seeds.
    """

    def __init__(
        self,
        mirror: Any,
        limiter: Any,
        collect: Callable[[int], int],
        cut: Callable[[], None],
    ) -> None:
        self.reason = ""
        self._mirror, self.limiter = mirror, limiter
        self._collect, self._cut = collect, cut
        self._expected = 0
        self._cut_due = False

    def may_update(self, updates: int) -> bool:
        """Return whether a whole round has been absorbed, and an update is owed for it."""
        mirror, limiter = self._mirror, self.limiter
        if mirror.inserted_steps < self._expected:
            self.reason = "updates wait for the rest of the round"
            return False
        owed = limiter.drift(mirror.inserted_steps, updates) >= limiter.batch_steps
        ready = mirror.size_steps >= limiter.min_size_steps and mirror.valid_starts > 0
        self.reason = "" if owed and ready else "updates wait for their turn"
        return bool(owed and ready)

    def more(self, updates: int, timeout_s: float) -> None:
        """Wait for the rest of the round, or collect the next one with the current weights."""
        if self._mirror.inserted_steps < self._expected:
            self._mirror.wait(timeout_s)
            return
        if self._cut_due:
            self._cut()
            self._cut_due = False
        self._expected = self._collect(updates)

    def at_rest(self, updates: int) -> bool:
        """Return whether the round has arrived and all its updates are done."""
        return self._mirror.inserted_steps >= self._expected and not self.may_update(updates)

    def saved(self) -> None:
        """Plan to cut what a resumed run could not continue, if this one goes on."""
        self._cut_due = True
