"""What checking, exporting and importing need beyond what actors and learners may do."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import NamedTuple

from replay_service.client import ReplayClient
from replay_service.entries import LogEntry
from replay_service.errors import ReplayTimeout
from replay_service.schema import Schema

_ENTRIES_PER_READ = 256
_FETCH_BYTES = 8 * 1024**2
_KEYS_PER_SCAN = 1000
_MOMENT_S = 0.001
_NO_EXPIRY, _NO_KEY = -1, -2
_NUMBER = re.compile("[0-9]{1,16}")


class StreamState(NamedTuple):
    """What the server remembers of one stream, whether or not the log still holds any of it."""

    sid: str
    last_seq: int
    closed: bool
    flaw: str = ""
    """What stands there instead of a number; else empty."""


class Payload(NamedTuple):
    """One stored chunk: its stream and number, and whether it stays until it is evicted."""

    sid: str
    seq: int
    kept: bool


class Rejected(NamedTuple):
    """One quarantined chunk."""

    sid: str
    seq: int
    reason: str


class Deadline:
    """A moment that a long job of many short calls must not pass.

    Args:
        seconds: from now.
        job: what it is, for the message.
    """

    def __init__(self, seconds: float, job: str) -> None:
        self._seconds, self._job = seconds, job
        self._end = time.monotonic() + seconds

    @property
    def left_s(self) -> float:
        """Seconds that are left, at least 0."""
        return max(self._end - time.monotonic(), 0.0)

    def check(self, progress: str) -> None:
        """Raise ReplayTimeout once the moment has passed, saying how far the job got."""
        if not self.left_s:
            raise ReplayTimeout(
                f"{self._job} was not done within {self._seconds:g} s ({progress}); allow more "
                "with --timeout-s"
            )


class ReplayAdmin(ReplayClient):
    """A client that can list what a server holds, page by page, and adopt streams.

    Guarantees:
        1. Memory is bounded by one page (8 MiB of chunks, or 1,000 keys), whatever the log's size.
        2. Nothing but `adopt` writes.
        3. Every call ends within `timeout_s`; an iteration makes as many as there are pages.
    """

    @classmethod
    def like(cls, client: ReplayClient) -> ReplayAdmin:
        """Return a connection of its own to the server and shard of another client."""
        return cls(client.url, shard=client.shard, timeout_s=client.timeout_s)

    def __enter__(self) -> ReplayAdmin:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def pages(self, until: int, schema: Schema) -> Iterator[list[LogEntry]]:
        """Yield the retained log, oldest first, up to chunk number `until`.

        One page's chunks fit in 8 MiB, or it is a single chunk. Entries that are evicted before
        they are reached are missing.
        """
        cursor, page, size, ended = "0", list[LogEntry](), 0, False
        while not ended and (entries := self.read_log(cursor, _ENTRIES_PER_READ, _MOMENT_S)):
            cursor = entries[-1].entry_id
            for entry in (one.judged(schema) for one in entries):
                # The number of an entry that no insert has made says nothing.
                if not entry.flaw and entry.number >= until:
                    ended = True
                    if entry.number > until:
                        break
                if page and size + entry.size_bytes > _FETCH_BYTES:
                    yield page
                    page, size = [], 0
                page.append(entry)
                size += entry.size_bytes
        if page:
            yield page

    def sizes(self, keys: Sequence[str]) -> list[int]:
        """Return the stored bytes of these keys, 0 where there are none."""
        return [int(size) for size in self._together([("STRLEN", key) for key in keys])]

    def payload(self, sid: str, seq: int, most_bytes: int) -> bytes | None:
        """Return a stored chunk as far as `most_bytes` reach, None if it is not there."""
        found: bytes = self._command("GETRANGE", self.payload_key(sid, seq), 0, most_bytes - 1)
        return found or None

    def streams(self) -> Iterator[StreamState]:
        """Yield every stream that the server remembers; some may come twice."""
        cursor = 0
        while True:
            cursor, found = self._command("HSCAN", self._seq, cursor, "COUNT", _KEYS_PER_SCAN)
            for sid, last in found.items():
                yield _state(_text(sid), last)
            if not int(cursor):
                return

    def stream(self, sid: str) -> StreamState | None:
        """Return what the server remembers of one stream, or None."""
        last = self._command("HGET", self._seq, sid)
        return None if last is None else _state(sid, last)

    def payloads(self) -> Iterator[Payload]:
        """Yield every stored chunk, committed or not; some may come twice."""
        cursor, pattern = 0, f"{self._prefix}:c:*"
        while True:
            words = ("SCAN", cursor, "MATCH", pattern, "COUNT", _KEYS_PER_SCAN)
            cursor, keys = self._command(*words)
            expiries = self._together([("TTL", key) for key in keys])
            for key, expiry in zip(keys, expiries, strict=True):
                sid, _, seq = _text(key).removeprefix(f"{self._prefix}:c:").rpartition(":")
                if expiry != _NO_KEY and _NUMBER.fullmatch(seq):
                    yield Payload(sid, int(seq), expiry == _NO_EXPIRY)
            if not int(cursor):
                return

    def rejected(self) -> list[Rejected]:
        """Return the newest quarantined chunks, at most 100, oldest first."""
        rows = self._command("XREVRANGE", self._dead, "+", "-", "COUNT", 100)
        found = []
        for _, fields in reversed(rows):
            fields = dict(zip(fields[::2], fields[1::2], strict=True))
            reason = fields[b"reason"].decode(errors="replace")
            found.append(Rejected(fields[b"s"].decode(), int(fields[b"q"]), reason))
        return found

    def incarnation(self, stream: str) -> int:
        """Return the newest incarnation that the server has given out for a stream, 0 for none."""
        return int(self._command("HGET", self._meta, f"incarnation:{stream}") or 0)

    def adopt(self, sid: str, last_seq: int) -> bool:
        """Let a stream that the server has never seen continue after chunk `last_seq`.

        Returns:
            Whether it was unknown. A known stream stays as it is, so the call can be repeated.
        """
        return bool(self._command("HSETNX", self._seq, sid, last_seq))


def _state(sid: str, last: bytes) -> StreamState:
    number, closed = _text(last).removesuffix("c"), last.endswith(b"c")
    if not _NUMBER.fullmatch(number):
        return StreamState(sid, 0, False, repr(last[:40]))
    return StreamState(sid, int(number), closed)


def _text(name: bytes) -> str:
    """Return a name that anybody may have given, as it can be shown."""
    return name.decode(errors="backslashreplace")
