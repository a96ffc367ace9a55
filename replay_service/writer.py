"""From records to committed chunks: one delivery thread per process, one writer per stream."""

from __future__ import annotations

import logging
import math
import random
import threading
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any

import numpy as np

from replay_service.chunk import (
    MAX_STREAM_CHARS,
    Chunk,
    EpisodeEnd,
    EpisodeSummary,
    decode_chunk,
    encode_chunk,
    stream_id,
)
from replay_service.client import INLINE_BYTES, ReplayClient
from replay_service.config import ReplayConfig
from replay_service.errors import (
    ChunkError,
    ReplayClosed,
    ReplayError,
    ReplayFull,
    ReplayMissing,
    ReplaySchemaError,
    ReplayTimeout,
    ReplayUnavailable,
)
from replay_service.rings import ResendRings, Sent
from replay_service.schema import Schema
from replay_service.waits import WaitClock

log = logging.getLogger(__name__)

_FIRST_DELAY_S = 0.005
_LONGEST_DELAY_S = 0.2


@dataclass
class UploadStats:
    """Counters of one uploader since it started."""

    chunks: int = 0
    """Chunks acknowledged."""
    steps: int = 0
    """Records acknowledged."""
    raw_bytes: int = 0
    """Their size before compression."""
    sent_bytes: int = 0
    """Their size on the wire."""
    replies: dict[str, int] = field(default_factory=dict)
    """Answers of the server by code, and errors by class."""
    resent_chunks: int = 0
    """Chunks that had been acknowledged and were sent again because the server lost them."""
    lost_chunks: int = 0
    """Chunks that the server lost after they had left the resend ring."""
    renewed_streams: int = 0
    """Streams that had to continue under a new incarnation."""
    resend_bytes: int = 0
    """Size of the acknowledged chunks that are kept, over all resend rings."""
    pending_chunks: int = 0
    """Chunks waiting for their acknowledgement now."""
    blocked_s: float = 0.0
    """Seconds that writers have spent waiting, up to the end of the last wait."""


@dataclass(eq=False)
class _Stream:
    name: str
    incarnation: int
    seq: int = 0
    steps: int = 0
    pending: int = 0


@dataclass
class _Parcel:
    """A chunk on its way, or (chunk None) the notice that its stream has ended."""

    stream: _Stream
    chunk: Chunk | None
    seq: int
    blob: bytes | None = None
    tried: bool = False
    payload_there: bool = False
    resent: bool = False


class Uploader:
    """Delivers the chunks of many streams over one connection, in order.

    Guarantees:
        1. A chunk takes effect exactly once, however often replies are lost.
        2. Chunks of a stream are committed in order and without gaps. If the server loses
           acknowledged chunks, they are sent again from the resend ring; where the ring no longer
           reaches back, the stream continues under a new incarnation and the loss is counted.
        3. Nothing is dropped to relieve pressure: writers wait, and `blocked_reason` says why.
        4. An error that waiting cannot mend (schema, credentials) is raised in the writers.

    Args:
        client: where to; the uploader does not close it.
        schema: columns of every record.
        config: chunk size, codec, ring and waiting limits.
    """

    def __init__(self, client: ReplayClient, schema: Schema, config: ReplayConfig) -> None:
        self.schema = schema
        self.config = config
        self.stats = UploadStats()
        self._client = client
        self._queue: deque[_Parcel] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._interrupted = False
        self._failure: ReplayError | None = None
        self._reason = ""
        self._reason_since = 0.0
        self._waits = WaitClock()
        self._rings = ResendRings(config.resend_chunks, config.resend_bytes)
        self._delay_s = _FIRST_DELAY_S
        self._thread = threading.Thread(target=self._run, name="replay-uploader", daemon=True)
        self._thread.start()

    def __enter__(self) -> Uploader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(0.0 if kind else 10.0)

    @property
    def blocked_reason(self) -> str:
        """Why nothing can be delivered now, with the seconds so far; empty while it flows."""
        reason, since = self._reason, self._reason_since
        return f"{reason} for {time.monotonic() - since:.0f} s" if reason else ""

    def waited(self) -> tuple[float, float]:
        """Return (seconds that writers waited, of these for training), the present one included."""
        with self._changed:
            return self._waits.totals()

    def open_stream(self, stream: str, incarnation: int | None = None) -> ChunkWriter:
        """Open a stream for writing.

        Args:
            stream: name of the slot, the same over its restarts.
            incarnation: which life this is; None (best) asks the server for one never used.

        Raises:
            ReplayError: if the server has to be asked and does not answer in time.
        """
        if not 0 < len(stream) <= MAX_STREAM_CHARS - 24 or not stream.isprintable():
            raise ReplaySchemaError(
                f"a stream needs a printable name of 1 to {MAX_STREAM_CHARS - 24} characters, "
                f"got {stream!r:.80}"
            )
        if incarnation is None:
            incarnation = self._client.open_stream(stream)
        return ChunkWriter(self, _Stream(stream, incarnation))

    def drain(self, timeout_s: float) -> bool:
        """Block until everything submitted is acknowledged, at most `timeout_s`.

        Returns:
            Whether it is.

        Raises:
            ReplayError: if delivery has failed for good.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._queue or self._failure, timeout_s)
            self._raise_failure()
            return not self._queue

    def interrupt(self) -> None:
        """From now on raise `ReplayClosed` in writers instead of letting them wait.

        What is queued is still delivered, and chunks for which there is room are still taken.
        """
        with self._changed:
            self._interrupted = True
            self._changed.notify_all()

    def close(self, timeout_s: float = 10.0) -> None:
        """Deliver what is queued and stop; blocks at most about `timeout_s` plus one call.

        Args:
            timeout_s: 0 gives up what has not been delivered, with a warning.

        Raises:
            ReplayTimeout: if chunks remain undelivered, saying how many and why.
        """
        try:
            delivered = self.drain(timeout_s)
        finally:
            with self._changed:
                self._closing = True
                self._changed.notify_all()
            self._thread.join(self._client.timeout_s + 1.0)
        if not delivered and timeout_s == 0:
            log.warning("upload_given_up chunks=%d", len(self._queue))
        elif not delivered:
            raise ReplayTimeout(
                f"{len(self._queue)} chunks were not delivered within {timeout_s:.0f} s: "
                f"{self._reason or 'the server is slow'}"
            )

    def submit(
        self,
        stream: _Stream,
        columns: dict[str, np.ndarray],
        versions: tuple[tuple[int, int], tuple[int, int]],
        episodes: tuple[EpisodeSummary, ...],
    ) -> None:
        """Queue one chunk of a stream; for `ChunkWriter`. Blocks while too many are pending."""
        with self._changed:
            self._wait_for_room(stream)
            stream.seq += 1
            chunk = Chunk(
                stream.name,
                stream.incarnation,
                stream.seq,
                stream.steps,
                columns,
                versions[0],
                versions[1],
                episodes,
            )
            stream.steps += chunk.steps
            stream.pending += 1
            self._push(_Parcel(stream, chunk, stream.seq))

    def submit_end(self, stream: _Stream) -> None:
        """Queue the notice that a stream has ended; for `ChunkWriter`."""
        with self._changed:
            if stream.seq and not self._closing:
                self._push(_Parcel(stream, None, stream.seq))

    def _push(self, parcel: _Parcel) -> None:
        self._queue.append(parcel)
        self.stats.pending_chunks = len(self._queue)
        self._changed.notify_all()

    def _wait_for_room(self, stream: _Stream) -> None:
        self._waits.begin()
        self._changed.wait_for(
            lambda: (
                stream.pending < self.config.pending_chunks
                or self._failure
                or self._interrupted
                or self._closing
            )
        )
        self._waits.end()
        self.stats.blocked_s = self._waits.totals()[0]
        self._raise_failure()
        if self._closing or stream.pending >= self.config.pending_chunks:
            raise ReplayClosed("the uploader was closed or interrupted")

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closing)
                if self._closing:
                    return
                parcel = self._queue[0]
            try:
                self._deliver(parcel)
            except (ReplayUnavailable, ReplayFull) as error:
                parcel.payload_there = False
                self._count(type(error).__name__)
                self._back_off(str(error))
            except ReplayError as error:
                self._fail(parcel, error)
                return
            except Exception as error:
                # Writers would otherwise wait for ever on a thread that has ended.
                self._fail(parcel, ReplayError(f"delivery ended: {error!r}"))
                raise

    def _fail(self, parcel: _Parcel, error: ReplayError) -> None:
        log.error("upload_failed stream=%s error=%s", parcel.stream.name, error)
        with self._changed:
            self._failure = error
            self._changed.notify_all()

    def _deliver(self, parcel: _Parcel) -> None:
        stream = parcel.stream
        if parcel.chunk is None:
            self._client.close_stream(stream_id(stream.name, stream.incarnation), parcel.seq)
            self._rings.drop(stream)
            self.stats.resend_bytes = self._rings.size_bytes
            self._done(parcel)
            return
        if parcel.blob is None:
            parcel.blob = encode_chunk(parcel.chunk, self.schema, self.config.codec)
        first_try, parcel.tried = not parcel.tried, True
        reply = self._client.insert(
            self.schema,
            parcel.chunk.sid,
            parcel.seq,
            parcel.chunk.steps,
            parcel.blob,
            send=not parcel.payload_there,
            meanwhile=self._encode_next,
        )
        self._count(reply.code)
        # Until the next answer: trying again, and in vain, is part of waiting for training.
        with self._changed:
            self._waits.unsettled(reply.code == "WAIT")
        if reply.code == "OK" or (reply.code == "DUP" and not first_try):
            self._acknowledge(parcel)
        elif reply.code == "WAIT":
            parcel.payload_there = len(parcel.blob) > INLINE_BYTES
            self._await_settlement(*reply.values)
        elif reply.code == "NOPAYLOAD":
            parcel.payload_there = False
        elif reply.code in ("GAP", "DUP"):
            self._recover(parcel, int(reply.values[0]), foreign=reply.code == "DUP")
        elif reply.code == "ODD":
            # What it has acknowledged stays; the rest goes on as a stream that nobody has touched.
            self._recover(parcel, 0, foreign=True)
        elif reply.code == "NONE":
            why = reply.values[0].decode() if reply.values else ""
            raise ReplayMissing(why or "no replay has been created on the server yet")
        elif reply.code == "SCHEMA":
            raise self._client.schema_error(self.schema, reply.values[0])
        else:
            raise ReplaySchemaError(
                f"a chunk of {parcel.chunk.steps} steps and {len(parcel.blob)} bytes exceeds the "
                f"server's {reply.values[0]} steps or {reply.values[1]} bytes: lower chunk_steps "
                "or raise redis_memory_bytes"
            )

    def _encode_next(self) -> None:
        """Encode the chunk that comes next while the server works on this one."""
        with self._changed:
            following = self._queue[1] if len(self._queue) > 1 else None
        if following is None or following.chunk is None or following.blob is not None:
            return
        # What cannot be encoded is reported when its own turn comes.
        with suppress(ChunkError):
            following.blob = encode_chunk(following.chunk, self.schema, self.config.codec)

    def _acknowledge(self, parcel: _Parcel) -> None:
        chunk, blob = parcel.chunk, parcel.blob
        assert chunk is not None and blob is not None
        with self._changed:
            self._rings.add(parcel.stream, Sent(parcel.seq, chunk.steps, blob))
            self.stats.resend_bytes = self._rings.size_bytes
            if not parcel.resent:
                self.stats.chunks += 1
                self.stats.steps += chunk.steps
                self.stats.raw_bytes += chunk.steps * self.schema.step_bytes
                self.stats.sent_bytes += len(blob)
        self._done(parcel)

    def _done(self, parcel: _Parcel) -> None:
        with self._changed:
            popped = self._queue.popleft()
            assert popped is parcel, "only the delivery thread removes parcels"
            if parcel.chunk is not None and not parcel.resent:
                parcel.stream.pending -= 1
            self.stats.pending_chunks = len(self._queue)
            self._reason, self._delay_s = "", _FIRST_DELAY_S
            self._changed.notify_all()

    def _recover(self, parcel: _Parcel, last: int, *, foreign: bool) -> None:
        """Bring a stream whose sequence differs from the server's back in step."""
        stream = parcel.stream
        kept = [] if foreign else self._rings.after(stream, last)
        reach = kept[0].seq if kept else parcel.seq
        log.warning(
            "stream_out_of_step stream=%s server_last=%d sending=%d ring_from=%d foreign=%s",
            stream.name,
            last,
            parcel.seq,
            reach,
            foreign,
        )
        again = [
            _Parcel(
                stream,
                decode_chunk(sent.blob, self.schema),
                sent.seq,
                sent.blob,
                tried=True,
                resent=True,
            )
            for sent in kept
        ]
        fresh = None
        if foreign or reach > last + 1:
            fresh = self._client.open_stream(stream.name, stream.incarnation + 1)
        with self._changed:
            self._rings.drop(stream, 0 if foreign else last)
            self.stats.resent_chunks += len(again)
            self._queue.extendleft(reversed(again))
            if fresh is not None:
                self.stats.renewed_streams += 1
                self.stats.lost_chunks += 0 if foreign else reach - last - 1
                self._renumber(stream, fresh)

    def _renumber(self, stream: _Stream, incarnation: int) -> None:
        """Give all queued chunks of a stream a new incarnation and numbers from 1."""
        stream.incarnation, stream.seq = incarnation, 0
        self._rings.drop(stream)
        for parcel in self._queue:
            if parcel.stream is not stream:
                continue
            if parcel.chunk is not None:
                stream.seq += 1
                parcel.chunk = replace(parcel.chunk, incarnation=incarnation, seq=stream.seq)
                parcel.blob, parcel.tried, parcel.payload_there = None, False, False
            parcel.seq = stream.seq

    def _await_settlement(self, budget: int, inserted: int, wake: bytes) -> None:
        """Wait until training has paid for more inserts."""
        self._give_reason(f"inserts wait for training ({inserted} inserted, {budget} admitted)")
        self._client.wait_settlement(wake.decode(), _LONGEST_DELAY_S)
        # Many uploaders wake together: those that waited in vain spread out.
        with self._changed:
            self._changed.wait_for(lambda: self._closing, self._delay_s * random.uniform(0.0, 0.1))
            self._delay_s = min(self._delay_s * 2, _LONGEST_DELAY_S)

    def _give_reason(self, reason: str) -> None:
        if not self._reason:
            self._reason_since = time.monotonic()
            log.info("upload_waits reason=%s", reason)
        self._reason = reason

    def _back_off(self, reason: str) -> None:
        self._give_reason(reason)
        with self._changed:
            self._waits.unsettled(False)
            self._changed.wait_for(lambda: self._closing, self._delay_s * random.uniform(0.5, 1.0))
            self._delay_s = min(self._delay_s * 2, _LONGEST_DELAY_S)

    def _count(self, code: str) -> None:
        self.stats.replies[code] = self.stats.replies.get(code, 0) + 1


@dataclass(frozen=True)
class _Slot:
    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    floating: bool


class ChunkWriter:
    """Collects the records of one stream into chunks. Use it from one thread."""

    def __init__(self, uploader: Uploader, stream: _Stream) -> None:
        self._uploader = uploader
        self._stream = stream
        self._slots = [
            _Slot(c.name, np.dtype(c.dtype), c.shape, c.dtype.startswith("float"))
            for c in uploader.schema.columns
        ]
        self._steps = uploader.config.chunk_steps
        self._flush_age_s = uploader.config.flush_age_s
        self._buffer = uploader.schema.allocate(self._steps)
        self._fill = 0
        self._started = 0.0
        self._versions: list[tuple[int, int]] = []
        self._episodes: list[EpisodeSummary] = []
        self._open = False
        self._return = 0.0
        self._length = 0

    @property
    def incarnation(self) -> int:
        """Current incarnation of the stream."""
        return self._stream.incarnation

    @property
    def written_steps(self) -> int:
        """Records appended so far, sent or not."""
        return self._stream.steps + self._fill

    def append(self, record: Mapping[str, Any], version: tuple[int, int] = (0, 0)) -> None:
        """Append the record of one step; blocks while too many chunks are unacknowledged.

        Args:
            record: name → numpy array or numpy scalar, exactly the columns of the schema.
            version: (fence, update) of the policy that chose the action.

        Raises:
            ReplaySchemaError: for a missing, extra, wrongly typed, wrongly shaped or non-finite
                value, or an episode that does not start with is_first. Nothing is appended.
            ReplayClosed: if the uploader was interrupted or closed while this waited. The record
                is kept: once there is room, `flush` sends it.
            ReplayError: if delivery has failed for good.
        """
        if self._fill == self._steps:
            self.flush()
        self._store(record)
        if self._fill == 0:
            self._started = time.monotonic()
        self._track_episode(record)
        self._versions.append(version)
        self._fill += 1
        aged = time.monotonic() - self._started >= self._flush_age_s
        if self._fill == self._steps or aged:
            self.flush()

    def flush(self) -> None:
        """Send the records collected so far; blocks as `append` does."""
        if self._fill == 0:
            return
        columns = {name: array[: self._fill] for name, array in self._buffer.items()}
        versions = (min(self._versions), max(self._versions))
        self._uploader.submit(self._stream, columns, versions, tuple(self._episodes))
        # The columns now belong to the uploader.
        self._buffer = self._uploader.schema.allocate(self._steps)
        self._fill = 0
        self._versions, self._episodes = [], []

    def close(self) -> None:
        """Send what is left and end the stream.

        An unfinished episode is reported as abandoned if records remain to carry the report.
        """
        if self._open and self._fill:
            self._end_episode("abandoned")
        self.flush()
        self._uploader.submit_end(self._stream)

    def _store(self, record: Mapping[str, Any]) -> None:
        # The inner loop of every environment: about a microsecond per column.
        if not self._open and not record.get("is_first", True):
            raise ReplaySchemaError("an episode must start with a record whose is_first is true")
        at = self._fill
        try:
            for slot in self._slots:
                value = record[slot.name]
                if value.dtype != slot.dtype or value.shape != slot.shape:
                    raise self._mistyped(slot, value)
                if slot.floating and not (
                    np.isfinite(value).all() if slot.shape else math.isfinite(value)
                ):
                    raise ReplaySchemaError(f"{slot.name!r} holds values that are not finite")
                self._buffer[slot.name][at] = value
        except (KeyError, AttributeError):
            raise self._mismatch(record) from None
        if len(record) != len(self._slots):
            raise self._mismatch(record)

    def _mismatch(self, record: Mapping[str, Any]) -> ReplaySchemaError:
        known = self._uploader.schema.by_name.keys()
        extra, missing = sorted(record.keys() - known), sorted(known - record.keys())
        if extra or missing:
            return ReplaySchemaError(f"a record has wrong keys: extra {extra}, missing {missing}")
        bare = next(slot for slot in self._slots if not hasattr(record[slot.name], "dtype"))
        return self._mistyped(bare, record[bare.name])

    def _mistyped(self, slot: _Slot, value: Any) -> ReplaySchemaError:
        return ReplaySchemaError(
            f"{slot.name!r} must be a numpy value of {slot.dtype}{list(slot.shape)}, got "
            f"{type(value).__name__} {getattr(value, 'dtype', '')}{list(np.shape(value))}"
        )

    def _track_episode(self, record: Mapping[str, Any]) -> None:
        if record["is_first"]:
            if self._open:
                self._end_episode("abandoned")
            self._open, self._return, self._length = True, 0.0, 0
        else:
            self._return += float(record["reward"])
            self._length += 1
        if record["is_last"]:
            self._end_episode("terminated" if record["is_terminal"] else "truncated")

    def _end_episode(self, end: EpisodeEnd) -> None:
        self._episodes.append(EpisodeSummary(self._return, self._length, end))
        self._open = False
