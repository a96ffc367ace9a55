"""Following the log: a thread that fetches, decodes and verifies chunks ahead of the learner."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from replay_service.chunk import MAX_CHUNK_STEPS, Chunk, decode_chunk
from replay_service.entries import LogEntry
from replay_service.errors import ChunkError, ReplayError, ReplayUnavailable
from replay_service.schema import Schema
from replay_service.seldom import Seldom

log = logging.getLogger(__name__)

_ENTRIES_PER_READ = 256
_FETCH_BYTES = 8 * 1024**2
_BLOCK_S = 0.5
_RETRY_S = 0.2
_IDLE_S = 0.01


class LogSource(Protocol):
    """Where a log is read: a `ReplayClient`, or something that only reads (see `offline`)."""

    @property
    def timeout_s(self) -> float:
        """Longest time of one call in seconds."""

    def last_log_id(self) -> str | None:
        """Return the id of the newest entry, or None for an empty log."""

    def read_log(self, after: str, count: int, block_s: float) -> list[LogEntry]:
        """Return up to `count` entries after an id; may wait for the first at most `block_s`."""

    def fetch(self, entries: Sequence[LogEntry]) -> list[bytes | None]:
        """Return the chunks of some entries, None for one that is gone."""

    def quarantine(self, entry: LogEntry, blob: bytes, reason: str) -> None:
        """Put a damaged chunk, or what is kept of an entry with a flaw, aside."""


@dataclass(frozen=True)
class Arrival:
    """A log entry with its chunk, or without it if the chunk is gone or damaged."""

    entry: LogEntry
    chunk: Chunk | None


class LogTail:
    """Reads the log in order into a queue that is bounded in bytes.

    Guarantees:
        1. Every entry arrives exactly once and in order; at the bound the thread waits.
        2. A damaged chunk is quarantined on the server and arrives without content, as does an
           entry that no insert can have made.
        3. Outages are waited for, with `trouble` saying what is wrong; an error that waiting
           cannot mend is raised by `take`.

    Args:
        client, schema: whose log, and what its chunks hold.
        queue_bytes: the bound.
        changed: notified of everything that happens; for whoever waits for one of several tails.
    """

    def __init__(
        self,
        client: LogSource,
        schema: Schema,
        *,
        queue_bytes: int,
        changed: threading.Condition | None = None,
    ) -> None:
        self._client = client
        self._schema = schema
        self._limit = queue_bytes
        self._queue: deque[Arrival] = deque()
        self._queued_bytes = 0
        self._changed = changed or threading.Condition()
        self._stopping = threading.Event()
        self._failure: ReplayError | None = None
        self._cursor = "0"
        self._thread: threading.Thread | None = None
        self._rejected = Seldom(log, logging.ERROR)
        self.trouble = ""

    def start(self, after: str = "0") -> None:
        """Start reading behind the entry of an id, or from the oldest retained one."""
        assert self._thread is None, "a tail can only be started once"
        self._cursor = after
        self._thread = threading.Thread(target=self._run, name="replay-tail", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop reading; blocks until the thread has ended (at most one call to the server)."""
        self._stopping.set()
        with self._changed:
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(self._client.timeout_s + 1.0)

    def bound(self, queue_bytes: int) -> None:
        """Let so many bytes be queued from now on."""
        with self._changed:
            self._limit = queue_bytes
            self._changed.notify_all()

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def ready(self) -> bool:
        """Whether something has arrived or failed."""
        return bool(self._queue or self._failure)

    @property
    def queued_share(self) -> float:
        """Share of the bound in bytes that is taken, 0 to 1."""
        return min(self._queued_bytes / self._limit, 1.0)

    def take(self) -> list[Arrival]:
        """Take everything that has arrived, without waiting.

        Raises:
            ReplayError: if reading has failed for good and nothing is left.
        """
        with self._changed:
            arrivals = list(self._queue)
            self._queue.clear()
            self._queued_bytes = 0
            self._changed.notify_all()
            if not arrivals and self._failure is not None:
                raise self._failure
            return arrivals

    def wait(self, timeout_s: float) -> bool:
        """Block until something has arrived or failed, at most `timeout_s`; say whether."""
        with self._changed:
            return self._changed.wait_for(lambda: self.ready, timeout_s)

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._read_once()
                self.trouble = ""
            except ReplayUnavailable as error:
                if not self.trouble:
                    log.warning("tail_waits reason=%s", error)
                self.trouble = str(error)
                self._stopping.wait(_RETRY_S)
            except ReplayError as error:
                self._fail(error)
                return
            except Exception as error:
                # The learner would otherwise wait for ever on a thread that has ended.
                self._fail(ReplayError(f"reading the log ended: {error!r}"))
                raise

    def _fail(self, error: ReplayError) -> None:
        log.error("tail_failed error=%s", error)
        with self._changed:
            self._failure = error
            self._changed.notify_all()

    def _read_once(self) -> None:
        self._rejected.catch_up()
        entries = self._client.read_log(self._cursor, _ENTRIES_PER_READ, _BLOCK_S)
        if not entries:
            self._stopping.wait(_IDLE_S)  # a source that ends does not wait
        for batch in _batches([entry.judged(self._schema) for entry in entries]):
            blobs = self._client.fetch(batch)
            for entry, blob in zip(batch, blobs, strict=True):
                if not self._put(Arrival(entry, self._decode(entry, blob))):
                    return
                self._cursor = entry.entry_id

    def _decode(self, entry: LogEntry, blob: bytes | None) -> Chunk | None:
        if entry.flaw:
            self._rejected.say(f"entry_quarantined id={entry.entry_id} flaw={entry.flaw}")
            reason = f"entry {entry.entry_id} of the log is none of an insert's: {entry.flaw}"
            self._client.quarantine(entry, b"", reason)
            return None
        if blob is None:
            return None
        try:
            chunk = decode_chunk(blob, self._schema, MAX_CHUNK_STEPS)
            if (chunk.sid, chunk.seq, chunk.steps) != (entry.sid, entry.seq, entry.steps):
                raise ChunkError("the chunk is not the one that its log entry names")
        except ChunkError as error:
            self._rejected.say(
                f"chunk_quarantined stream={entry.sid} seq={entry.seq} error={error}"
            )
            self._client.quarantine(entry, blob, str(error))
            return None
        return chunk

    def _put(self, arrival: Arrival) -> bool:
        size = arrival.entry.steps * self._schema.step_bytes
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self._stopping.is_set()
                    or not self._queue
                    or self._queued_bytes + size <= self._limit
                )
            )
            if self._stopping.is_set():
                return False
            self._queue.append(arrival)
            self._queued_bytes += size
            self._changed.notify_all()
            return True


def _batches(entries: list[LogEntry]) -> Iterator[list[LogEntry]]:
    """Split entries so that one fetch stays small, whatever the chunks' size."""
    batch, size = list[LogEntry](), 0
    for entry in entries:
        if batch and size + entry.size_bytes > _FETCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(entry)
        size += entry.size_bytes
    if batch:
        yield batch
