"""How far a mirror has come in each of the logs that it follows."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from replay_service.entries import LogEntry
from replay_service.errors import ReplayMissing, ReplayUnavailable
from replay_service.schema import Schema
from replay_service.tail import Arrival, LogSource, LogTail


class FollowedLog:
    """One log: a thread that reads it, and what of it has arrived.

    Args:
        source, schema, queue_bytes, changed: see `LogTail`.

    Attributes:
        inserted_steps: that led up to what has arrived.
    """

    def __init__(
        self, source: LogSource, schema: Schema, *, queue_bytes: int, changed: threading.Condition
    ) -> None:
        self.inserted_steps = 0
        self._source, self._schema = source, schema
        self._queue_bytes, self._changed = queue_bytes, changed
        self.tail = self._fresh_tail()
        self._expected: int | None = None
        self._absorbed = self._target = (0, 0)

    @property
    def caught_up(self) -> bool:
        """Whether everything that the log held at `start` has arrived."""
        return self._absorbed >= self._target

    @property
    def rebuild_chunks(self) -> tuple[int, int]:
        """Chunks that have arrived of those that the log held at `start`, and the number of them.

        After a restart of the server in between, all or nothing.
        """
        if self.caught_up:
            return self._target[1], self._target[1]
        same = self._absorbed[0] == self._target[0]
        return (self._absorbed[1] if same else 0), self._target[1]

    def start(self) -> None:
        """Begin at the oldest retained entry. Raises ReplayError if the server cannot be used."""
        newest = self._source.last_log_id()
        self._target = _order(newest) if newest else (0, 0)
        self.tail.start()

    def bound(self, queue_bytes: int) -> None:
        """Let so many bytes wait from now on."""
        self._queue_bytes = queue_bytes
        self.tail.bound(queue_bytes)

    def resume(self, after: str, inserted_steps: int) -> None:
        """Begin again behind an entry, after the tail was stopped."""
        self.tail = self._fresh_tail()
        self._expected = self.inserted_steps = inserted_steps
        self.tail.start(after)

    def require_target(self) -> None:
        """Raise ReplayMissing if the log does not reach any more to where it did at `start`."""
        if self.caught_up or self.tail.trouble:
            return
        try:
            newest = self._source.last_log_id()
        except ReplayUnavailable:
            return  # the tail meets it too, says so, and tries again
        if newest is None or _order(newest) < self._target:
            raise ReplayMissing(
                "the server has lost its data while the mirror was rebuilt from it "
                f"({self._absorbed[1]} of {self._target[1]} chunks had come); start again to "
                "continue from the newest checkpoint with a new replay"
            )

    def note(self, arrival: Arrival) -> tuple[bool, int]:
        """Take account of the next arrival.

        Returns:
            Whether it was there at `start`, and how many steps were missed before or with it.
        """
        entry = arrival.entry
        self._absorbed = _order(entry.entry_id)
        if entry.flaw:
            return self._absorbed <= self._target, 0
        missed = self._missed(entry) + (0 if arrival.chunk is not None else entry.steps)
        self.inserted_steps = self._expected = entry.position + entry.steps
        return self._absorbed <= self._target, missed

    def _missed(self, entry: LogEntry) -> int:
        return max(entry.position - self._expected, 0) if self._expected is not None else 0

    def _fresh_tail(self) -> LogTail:
        return LogTail(
            self._source, self._schema, queue_bytes=self._queue_bytes, changed=self._changed
        )


class FollowedLogs:
    """All logs of a mirror. Arrivals of one keep their order; between logs there is none.

    Args:
        sources: of the logs.
        schema, queue_bytes: see `LogTail`; the bytes are for all logs together.
    """

    def __init__(self, sources: Sequence[LogSource], schema: Schema, *, queue_bytes: int) -> None:
        assert sources, "a mirror needs a log to follow"
        self._changed = threading.Condition()
        self._schema, self._queue_bytes = schema, queue_bytes
        each = queue_bytes // len(sources)
        self._logs = [
            FollowedLog(source, schema, queue_bytes=each, changed=self._changed)
            for source in sources
        ]

    def join(self, sources: Sequence[LogSource]) -> None:
        """Follow further logs too, from their oldest entries.

        Raises:
            ReplayError: a server cannot be used; then only the others are followed, as before.
        """
        each = self._queue_bytes // (len(self._logs) + len(sources))
        joined = [
            FollowedLog(source, self._schema, queue_bytes=each, changed=self._changed)
            for source in sources
        ]
        try:
            for one in joined:
                one.start()
        except BaseException:
            for one in joined:
                one.tail.stop()
            raise
        for known in self._logs:
            known.bound(each)
        self._logs.extend(joined)

    def __getitem__(self, number: int) -> FollowedLog:
        return self._logs[number]

    def __len__(self) -> int:
        return len(self._logs)

    @property
    def inserted_steps(self) -> int:
        """Steps that led up to what has arrived, over all logs."""
        return sum(one.inserted_steps for one in self._logs)

    @property
    def lag_chunks(self) -> int:
        """Chunks that were fetched but not taken."""
        return sum(len(one.tail) for one in self._logs)

    @property
    def queue_share(self) -> float:
        """Share of the memory for fetched chunks that is taken, of the log with the largest."""
        return max(one.tail.queued_share for one in self._logs)

    @property
    def trouble(self) -> str:
        """Why logs cannot be read now; empty while they can."""
        return "; ".join(one.tail.trouble for one in self._logs if one.tail.trouble)

    @property
    def caught_up(self) -> bool:
        """Whether everything that the logs held at `start` has arrived."""
        return all(one.caught_up for one in self._logs)

    @property
    def rebuild_share(self) -> float:
        """Share of the chunks that the logs held at `start` that has arrived, in [0, 1]."""
        if self.caught_up:
            return 1.0
        there, whole = zip(*(one.rebuild_chunks for one in self._logs), strict=True)
        # The newest entry may be one that no insert has made, whose number says nothing.
        return float(sum(there) / max(sum(whole), 1))

    def start(self) -> None:
        """Begin to follow all of them. Raises ReplayError if a server cannot be used."""
        for one in self._logs:
            one.start()

    def stop(self) -> None:
        """Stop following; blocks until the threads have ended."""
        for one in self._logs:
            one.tail.stop()

    def require_targets(self) -> None:
        """Raise ReplayMissing if a log does not reach any more to where it did at `start`."""
        for one in self._logs:
            one.require_target()

    def take(self) -> list[tuple[int, Arrival]]:
        """Take everything that has arrived, with the number of its log. Does not wait.

        Raises:
            ReplayError: if reading a log has failed for good and nothing is left of it.
        """
        return [(at, arrival) for at, one in enumerate(self._logs) for arrival in one.tail.take()]

    def wait(self, timeout_s: float) -> bool:
        """Block until something has arrived or failed, at most `timeout_s`; say whether."""
        with self._changed:
            return self._changed.wait_for(
                lambda: any(one.tail.ready for one in self._logs), timeout_s
            )


def _order(entry_id: str) -> tuple[int, int]:
    epoch, _, number = entry_id.partition("-")
    return int(epoch), int(number)
