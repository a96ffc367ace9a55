"""Putting the contents of an archive into a replay, once, however often it is tried."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from replay_service.admin import Deadline, ReplayAdmin
from replay_service.archive import Archive
from replay_service.chunk import (
    MAX_CHUNK_STEPS,
    MAX_STREAM_CHARS,
    Chunk,
    decode_chunk,
    encode_chunk,
    max_blob_bytes,
)
from replay_service.client import InsertReply, ReplayClient
from replay_service.config import Limits
from replay_service.errors import (
    ChunkError,
    ReplayConfigError,
    ReplayError,
    ReplaySchemaError,
    ReplayTimeout,
    ReplayUnavailable,
)

log = logging.getLogger(__name__)

_WAIT_S = 0.5
Progress = Callable[[int, int], None]


@dataclass
class ImportResult:
    """What an import did.

    Attributes:
        chunks, steps: inserted now.
        present_chunks: those that were already there with the same contents, or had been there and
            were evicted.
        streams: of the archive.
        seconds: how long it took.
    """

    chunks: int = 0
    steps: int = 0
    present_chunks: int = 0
    streams: int = 0
    seconds: float = 0.0


def create_like(client: ReplayClient, archive: Archive) -> bool:
    """Create a replay with the schema and limits of an archive's source, unless there is one.

    Nothing limits its inserts until a learner settles.

    Returns:
        Whether it is new.
    """
    try:
        client.stats()
        return False
    except ReplayUnavailable:
        stats = archive.source_stats
    limits = Limits(
        capacity_steps=max(int(stats["capacity_steps"]), archive.steps),
        capacity_bytes=int(stats["capacity_bytes"]),
        min_size_steps=int(stats["min_size_steps"]),
    )
    return client.create(archive.schema, limits)


def import_archive(
    client: ReplayClient,
    archive: Archive,
    *,
    prefix: str = "",
    patience_s: float = 60.0,
    timeout_s: float = 3600.0,
    progress: Progress | None = None,
) -> ImportResult:
    """Insert every chunk of an archive into an existing replay, exactly once.

    Streams keep their names, incarnations and numbers, also where eviction had cut their
    beginning, so repeating an import, or continuing one that was interrupted, inserts nothing
    twice. Chunks that are already there are compared with the archive. Nothing is evicted to make
    room. Imported steps count as inserted ones for the train ratio.

    Args:
        client: the replay; a connection of its own is used.
        archive: its files are verified first.
        prefix: put before every stream's name, to tell several imports apart.
        patience_s: how long to wait while the train ratio admits nothing more.
        timeout_s: after which it gives up.
        progress: called with the chunks done and their total.

    Raises:
        ReplaySchemaError: if the replay holds other columns.
        ReplayConfigError: if the archive does not fit, or the replay's streams of the same names
            hold something else.
        ReplayTimeout: if no settlement came for `patience_s`.
        ReplayError: if the archive is damaged.
    """
    begin, deadline = time.monotonic(), Deadline(timeout_s, "the import")
    if damaged := archive.damaged_files():
        raise ReplayError(
            f"the archive {archive.directory} is damaged: the contents of {', '.join(damaged)} "
            "are not what was exported; use a copy"
        )
    with ReplayAdmin.like(client) as admin:
        work = _Import(admin, archive, prefix, patience_s)
        work.prepare()
        for done, (_, chunk) in enumerate(archive.entries(), 1):
            work.put(replace(chunk, stream=prefix + chunk.stream))
            if progress is not None:
                progress(done, archive.chunks)
            deadline.check(f"{done} of {archive.chunks} chunks")
        work.finish()
    work.result.seconds = time.monotonic() - begin
    return work.result


class _Import:
    """One import into one server."""

    def __init__(
        self, admin: ReplayAdmin, archive: Archive, prefix: str, patience_s: float
    ) -> None:
        self.result = ImportResult(streams=len(archive.streams))
        self._admin, self._archive, self._prefix = admin, archive, prefix
        self._patience_s = patience_s
        self._stats = admin.stats()
        self._used_bytes = self._stats.size_bytes
        self._last: dict[str, int] = {}

    def prepare(self) -> None:
        """Refuse what cannot work before anything is written; then make room for the names."""
        stored, ours = self._admin.schema(), self._archive.schema
        if stored.hash != ours.hash:
            raise ReplaySchemaError(
                f"the replay at {self._admin.address} holds other columns than the archive: "
                f"{stored.difference(ours)}; import it into a replay of its own"
            )
        first, newest = self._ranges()
        for sid, seq in first.items():
            if len(sid.rpartition("@")[0]) > MAX_STREAM_CHARS:
                raise ReplayConfigError(
                    f"the stream name {sid!r:.60} is longer than {MAX_STREAM_CHARS} characters; "
                    "use a shorter --prefix"
                )
            state = self._admin.stream(sid)
            if state is not None and state.last_seq < seq - 1:
                raise ReplayConfigError(
                    f"stream {sid} ends at chunk {state.last_seq} in the replay and begins at "
                    f"{seq} in the archive: they would not join; import it with a --prefix"
                )
            self._last[sid] = state.last_seq if state else 0
        self._require_room()
        for name, incarnation in newest.items():
            # Later writers of the same name must not continue a stream of the archive.
            if self._admin.incarnation(name) < incarnation:
                self._admin.open_stream(name, incarnation)
        for sid, seq in first.items():
            if not self._last[sid] and seq > 1:
                self._admin.adopt(sid, seq - 1)

    def put(self, chunk: Chunk) -> None:
        """Insert one chunk, or compare it with the one that is there."""
        if chunk.seq <= self._last[chunk.sid]:
            self._compare(chunk)
            return
        blob = encode_chunk(chunk, self._archive.schema)
        self._require_valid(chunk, blob)
        self._require_bytes(len(blob))
        reply = self._insert(chunk, blob)
        if reply.code == "DUP":
            self._compare(chunk)
        elif reply.code == "OK":
            self.result.chunks += 1
            self.result.steps += chunk.steps
            self._used_bytes += len(blob)
        else:
            raise self._refused(chunk, reply)
        self._last[chunk.sid] = chunk.seq

    def finish(self) -> None:
        """Close the imported streams, so that they are forgotten once they are evicted."""
        for sid, last in self._last.items():
            self._admin.close_stream(sid, last)

    def _ranges(self) -> tuple[dict[str, int], dict[str, int]]:
        """Return the first chunk of each stream and the newest incarnation of each name."""
        table, first, newest = self._archive.chunk_table, dict[str, int](), dict[str, int]()
        numbers, at = np.unique(table["stream"], return_index=True)
        for number, row in zip(numbers, at, strict=True):
            name, incarnation = self._archive.streams[number]
            first[f"{self._prefix}{self._archive.sid(number)}"] = int(table["seq"][row])
            name = self._prefix + name
            newest[name] = max(newest.get(name, 0), incarnation)
        return first, newest

    def _require_room(self) -> None:
        table, stats = self._archive.chunk_table, self._stats
        sids = [self._prefix + self._archive.sid(at) for at in range(len(self._archive.streams))]
        last = np.array([self._last.get(sid, 0) for sid in sids], np.int64)
        fresh = int(table["steps"][table["seq"] > last[table["stream"]]].sum())
        if stats.size_steps + fresh > stats.capacity_steps:
            raise ReplayConfigError(
                f"the replay holds {stats.size_steps} of {stats.capacity_steps} steps and the "
                f"archive would add {fresh}: the oldest would be evicted; raise "
                "--replay.capacity-steps"
            )

    def _require_valid(self, chunk: Chunk, blob: bytes) -> None:
        """Let no forged archive, whose hashes somebody has mended, into the log."""
        try:
            decode_chunk(blob, self._archive.schema, MAX_CHUNK_STEPS)
        except ChunkError as error:
            raise ReplayError(
                f"chunk {chunk.seq} of stream {chunk.sid} in the archive is not valid: {error}; "
                "export it again from a replay that `dreamfleet replay check` passes"
            ) from error

    def _require_bytes(self, size: int) -> None:
        if self._used_bytes + size > self._stats.capacity_bytes:
            raise ReplayConfigError(
                f"the replay's {self._stats.capacity_bytes} bytes are full after "
                f"{self.result.chunks} of {self._archive.chunks} chunks: the oldest would be "
                "evicted; raise --replay.redis-memory-bytes and import again, which continues"
            )

    def _insert(self, chunk: Chunk, blob: bytes) -> InsertReply:
        """Insert, waiting while the train ratio admits nothing more."""
        schema, patience, send = self._archive.schema, time.monotonic() + self._patience_s, True
        while True:
            reply = self._admin.insert(schema, chunk.sid, chunk.seq, chunk.steps, blob, send=send)
            if reply.code not in ("WAIT", "NOPAYLOAD"):
                return reply
            left = patience - time.monotonic()
            if left <= 0:
                budget, inserted = reply.values[:2] if reply.code == "WAIT" else ("?", "?")
                raise ReplayTimeout(
                    f"the train ratio admits no more inserts ({inserted} of {budget} steps) and "
                    f"no learner has settled for {self._patience_s:g} s: import while the run "
                    "trains, or into a replay of its own; importing again continues"
                )
            send = reply.code == "NOPAYLOAD"
            if reply.code == "WAIT":
                log.info("import_waits budget=%s inserted=%s", *reply.values[:2])
                self._admin.wait_settlement(reply.values[2].decode(), min(left, _WAIT_S))

    def _compare(self, chunk: Chunk) -> None:
        """Raise if the replay holds another chunk of that stream and number."""
        most = max_blob_bytes(self._archive.schema, MAX_CHUNK_STEPS)
        blob = self._admin.payload(chunk.sid, chunk.seq, most)
        if blob is not None:
            held = decode_chunk(blob, self._archive.schema, MAX_CHUNK_STEPS)
            if not _same(held, chunk):
                raise ReplayConfigError(
                    f"chunk {chunk.seq} of stream {chunk.sid} is another one in the replay than in "
                    "the archive: they come from different runs; import it with a --prefix"
                )
        self.result.present_chunks += 1

    def _refused(self, chunk: Chunk, reply: InsertReply) -> ReplayError:
        if reply.code == "TOOBIG":
            return ReplayConfigError(
                f"the replay takes chunks of at most {reply.values[0]} steps and "
                f"{reply.values[1]} bytes, the archive has one of {chunk.steps} steps; raise "
                "--replay.chunk-steps"
            )
        return ReplayError(
            f"chunk {chunk.seq} of stream {chunk.sid} was refused with {reply.code} "
            f"{list(reply.values)}: something else writes to this stream; stop it and import again"
        )


def _same(one: Chunk, other: Chunk) -> bool:
    def head(chunk: Chunk) -> tuple[object, ...]:
        versions = (chunk.version_min, chunk.version_max)
        return (chunk.sid, chunk.seq, chunk.first_step, *versions, chunk.episodes)

    return head(one) == head(other) and all(
        values.tobytes() == other.columns[name].tobytes() for name, values in one.columns.items()
    )
