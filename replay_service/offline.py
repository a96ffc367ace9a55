"""A log that is only read: that of a server, or one that comes from an archive."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from replay_service.archive import Archive
from replay_service.chunk import encode_chunk
from replay_service.client import ReplayClient
from replay_service.entries import LogEntry

log = logging.getLogger(__name__)


class ServerLog:
    """What a mirror needs of a server, and nothing that changes it.

    Any number of them may follow the log that one learner paces: they settle nothing, take no
    fence, and leave a damaged chunk where it is. A reader that is slower than the eviction misses
    steps, which its mirror counts.

    Args:
        client: of the server; it stays the caller's to close.
    """

    def __init__(self, client: ReplayClient) -> None:
        self._client = client

    @property
    def timeout_s(self) -> float:
        """Longest time of one call in seconds."""
        return self._client.timeout_s

    def last_log_id(self) -> str | None:
        """Return the id of the newest entry, or None for an empty log."""
        return self._client.last_log_id()

    def read_log(self, after: str, count: int, block_s: float) -> list[LogEntry]:
        """Return up to `count` entries after an id; waits for the first at most `block_s`."""
        return self._client.read_log(after, count, block_s)

    def fetch(self, entries: Sequence[LogEntry]) -> list[bytes | None]:
        """Return the chunks of some entries, None for one that was evicted."""
        return self._client.fetch(entries)

    def quarantine(self, entry: LogEntry, blob: bytes, reason: str) -> None:
        """Leave a damaged chunk to the learner that owns the replay."""


class ArchiveLog:
    """The chunks of an archive as the log that they were, without a server.

    Chunks pass the same checks as those of a server, from the same encoding.

    Args:
        archive: opened; its files are read while the log is.
    """

    timeout_s = 1.0

    def __init__(self, archive: Archive) -> None:
        self._archive = archive

    def last_log_id(self) -> str | None:
        """Return the id of the last chunk, or None if there is none."""
        return _entry_id(self._archive.chunks - 1) if self._archive.chunks else None

    def read_log(self, after: str, count: int, block_s: float) -> list[LogEntry]:
        """Return up to `count` entries after an id, at once; [] behind the last."""
        begin = int(after.rpartition("-")[2])
        numbers = range(begin, min(begin + count, self._archive.chunks))
        return [
            self._archive.entry(at)[0]._replace(entry_id=_entry_id(at), key=str(at))
            for at in numbers
        ]

    def fetch(self, entries: Sequence[LogEntry]) -> list[bytes | None]:
        """Return the chunks of some entries, encoded."""
        chunks = (self._archive.entry(int(entry.key))[1] for entry in entries)
        return [encode_chunk(chunk, self._archive.schema, "raw") for chunk in chunks]

    def quarantine(self, entry: LogEntry, blob: bytes, reason: str) -> None:
        """Leave the archive as it is."""


def _entry_id(number: int) -> str:
    return f"1-{number + 1}"
