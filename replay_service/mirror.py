"""The learner's decoded copy of the log, from which windows are sampled without the network."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from replay_service.chunk import Chunk, EpisodeEnd, EpisodeSummary
from replay_service.config import SamplingConfig
from replay_service.errors import ReplayEmpty, ReplayTimeout
from replay_service.following import FollowedLogs
from replay_service.memory import QUEUE_BYTES
from replay_service.pages import PageIndex, Segment, page_count
from replay_service.sampler import Sampler
from replay_service.schema import Schema
from replay_service.seldom import Seldom
from replay_service.tail import Arrival, LogSource

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EpisodeEvent:
    """An episode that ended, in the order of the log.

    Attributes:
        env_steps: inserted steps up to and including the chunk that reports it.
        stream: slot that played it.
        ret, length, end: see `EpisodeSummary`.
        version: newest policy (fence, update) that acted in the chunk.
    """

    env_steps: int
    stream: str
    ret: float
    length: int
    end: EpisodeEnd
    version: tuple[int, int]


@dataclass(frozen=True, slots=True)
class HeldChunk:
    """What a mirror remembers of a chunk besides its records.

    Attributes:
        segment, offset: where its first record is.
        log: number of the log that it came from.
        stream, incarnation, seq, first_step, steps, version_min, version_max, episodes: see
            `Chunk`.
    """

    segment: Segment
    offset: int
    log: int
    stream: str
    incarnation: int
    seq: int
    first_step: int
    steps: int
    version_min: tuple[int, int]
    version_max: tuple[int, int]
    episodes: tuple[EpisodeSummary, ...]


class Mirror:
    """A paged ring with all columns of the newest steps, filled from the log.

    Guarantees:
        1. Rows only change inside `absorb`, so windows are never torn. `absorb` and everything
           about sampling belong to one thread, the learner's.
        2. A window holds consecutive records of one stream; gaps are never bridged.
        3. Content is a function of the log: a chunk is placed once, whatever is resent, and a new
           mirror rebuilds itself from the log that the server retains. With several logs it is one
           of the order in which their chunks were absorbed, and each keeps its own order in it.
        4. What could not be read (evicted first, or damaged) is counted in `missed_steps`.
        5. `columns`, `valid_cumsum` and `next_page` keep their storage for life.

    Args:
        client, schema: the replay to follow; one client for each shard if there are several.
        keep: names of the columns that are kept; None keeps all.
        capacity_steps: records kept; whole oldest pages are given up above it.
        window_steps: records per window, including context records.
        page_steps: rows per page.
        placement, device, directory: where the columns live, see `storage.DeviceStorage`.
        online: collect every non-overlapping new window for `online_starts`.
        sampling: how `draw` fills a batch; None draws every window alike.
        queue_bytes: decoded chunks that may wait for `absorb`.

    Raises:
        ReplayConfigError: if the columns do not fit where they are placed.
    """

    def __init__(
        self,
        client: LogSource | Sequence[LogSource],
        schema: Schema,
        *,
        capacity_steps: int,
        window_steps: int,
        page_steps: int = 64,
        placement: Literal["auto", "cuda", "ram", "disk"] = "auto",
        device: str = "cpu",
        directory: Path | None = None,
        online: bool = True,
        sampling: SamplingConfig | None = None,
        keep: Collection[str] | None = None,
        queue_bytes: int = QUEUE_BYTES,
    ) -> None:
        from replay_service.storage import DeviceStorage

        pages = page_count(capacity_steps, page_steps)
        self.schema = schema
        kept = Schema(tuple(c for c in schema.columns if keep is None or c.name in keep))
        self.page_steps = page_steps
        self.window_steps = window_steps
        self.missed_steps = 0
        self._missed = Seldom(log, logging.WARNING)
        self._storage = DeviceStorage(
            kept,
            rows=pages * page_steps,
            pages=pages,
            placement=placement,
            device=device,
            directory=directory,
        )
        self._index = PageIndex(
            pages=pages,
            page_steps=page_steps,
            window_steps=window_steps,
            capacity_steps=capacity_steps,
            next_page=self._storage.host_next_page,
            valid_cumsum=self._storage.host_cumsum,
        )
        self._sampling = sampling or SamplingConfig()
        self._sampler = Sampler(self._index, self._sampling)
        sources = client if isinstance(client, Sequence) else [client]
        self._logs = FollowedLogs(sources, schema, queue_bytes=queue_bytes)
        self._collect_online = online
        most = pages * page_steps // window_steps + 1
        self._online: deque[tuple[Segment, int]] = deque(maxlen=most)
        self._chunks: deque[HeldChunk] = deque()
        self._origin: dict[str, int] = {}

    @property
    def inserted_steps(self) -> int:
        """Steps that were inserted up to what has been absorbed."""
        return self._logs.inserted_steps

    @property
    def columns(self) -> dict[str, Tensor]:
        """Name → (rows, *shape) tensor on the device of the placement."""
        return self._storage.columns

    @property
    def valid_cumsum(self) -> Tensor:
        """(pages,) int64 cumulative number of valid window starts, updated in place."""
        return self._storage.valid_cumsum

    @property
    def next_page(self) -> Tensor:
        """(pages,) int64 successor of each page or -1, updated in place."""
        return self._storage.next_page

    @property
    def placement(self) -> Literal["cuda", "ram", "disk"]:
        """Where the columns ended up."""
        return self._storage.placement

    @property
    def size_steps(self) -> int:
        """Records held."""
        return self._index.size_steps

    @property
    def valid_starts(self) -> int:
        """Rows at which a whole window starts."""
        return self._index.valid_starts

    @property
    def prioritised(self) -> bool:
        """Whether `write_priorities` has any effect."""
        return self._sampling.prioritised > 0

    @property
    def generation(self) -> int:
        """Number that `write_priorities` takes with losses of windows that are drawn now."""
        return self._index.generation

    @property
    def lag_chunks(self) -> int:
        """Chunks that were fetched but not absorbed."""
        return self._logs.lag_chunks

    @property
    def queue_share(self) -> float:
        """Share of the memory for fetched chunks that is taken, 0 to 1."""
        return self._logs.queue_share

    def memory(self) -> tuple[int, int]:
        """Return the bytes of the full mirror, and how many there is room for where it is."""
        pages = min(self._index.generation, len(self._index.next_page))
        return self._storage.memory(pages * self.page_steps)

    @property
    def trouble(self) -> str:
        """Why the log cannot be read now; empty while it can."""
        return self._logs.trouble

    @property
    def caught_up(self) -> bool:
        """Whether everything that the log held at `start` has been absorbed."""
        return self._logs.caught_up

    @property
    def rebuild_share(self) -> float:
        """Share of the chunks retained at `start` that has been absorbed, in [0, 1]."""
        return self._logs.rebuild_share

    def start(self) -> None:
        """Begin to follow the log from its oldest retained entry.

        Raises:
            ReplayError: if the server cannot be used.
        """
        self._logs.start()

    def rebuild(self, patience_s: float = 60.0) -> Iterator[list[EpisodeEvent]]:
        """Absorb everything that the log held at `start`, yielding what `absorb` returns.

        Blocks while chunks arrive, and for `patience_s` after the last one.

        Raises:
            ReplayMissing: the server has lost its log since.
            ReplayTimeout: nothing has come for `patience_s`.
            ReplayError: if the log cannot be read for a reason that waiting does not mend.
        """
        deadline = time.monotonic() + patience_s
        while not self.caught_up:
            if self.wait(1.0):
                deadline = time.monotonic() + patience_s
            else:
                self._logs.require_targets()
            yield self.absorb()
            if time.monotonic() > deadline:
                raise ReplayTimeout(
                    f"the mirror is {self.rebuild_share:.0%} rebuilt, and the server has sent "
                    f"nothing for {patience_s:.0f} s ({self.trouble or 'it gives no reason'}); "
                    "look after the server, then start again: nothing is lost"
                )

    def follow(self, clients: Sequence[LogSource]) -> None:
        """Follow further logs from now on, of servers that join; they are numbered on.

        It is for the thread of `absorb`. Blocks for one call to each server.

        Raises:
            ReplayError: a server cannot be used; then nothing has changed.
        """
        self._logs.join(clients)

    def stop(self) -> None:
        """Stop following the log; what was absorbed stays readable."""
        self._logs.stop()

    def of(self, number: int) -> MirroredLog:
        """Return what this mirror has of one log alone."""
        return MirroredLog(self, number)

    def suspend(self, number: int = 0) -> list[EpisodeEvent]:
        """Stop following a log, and absorb what was fetched; returns what `absorb` does."""
        self._logs[number].tail.stop()
        return self.absorb()

    def resume(self, after: str, inserted_steps: int, number: int = 0) -> None:
        """Follow again after `suspend`, behind the log entry of an id ("0" for all there are).

        Args:
            inserted_steps: that led up to it.
            number: of the log.
        """
        self._logs[number].resume(after, inserted_steps)

    def wait(self, timeout_s: float) -> bool:
        """Block until there is something to absorb, at most `timeout_s`; say whether."""
        return self._logs.wait(timeout_s)

    def absorb(self) -> list[EpisodeEvent]:
        """Apply everything that has been fetched; call it between updates. Does not wait.

        Returns:
            Episodes that ended, including those of a retained log that is being rebuilt.

        Raises:
            ReplayError: if the log cannot be read for a reason that waiting does not mend.
        """
        self._missed.catch_up()
        arrivals = self._logs.take()
        events = [event for number, arrival in arrivals for event in self._apply(number, arrival)]
        if arrivals:
            self._index.refresh()
            self._storage.publish_index()
            while self._chunks and not self._holds(self._chunks[0]):
                self._chunks.popleft()
        return events

    def online_starts(self, count: int) -> np.ndarray:
        """Take up to `count` windows that were never trained on, newest first.

        Returns:
            (count,) int64 rows at which they start, padded with -1.
        """
        starts = np.full(count, -1, np.int64)
        found = 0
        while found < count and self._online:
            starts[found] = self._index.row_of(*self._online.pop())
            found += bool(starts[found] >= 0)
        return starts

    def online_state(self) -> list[tuple[str, int]]:
        """Return the windows still waiting, oldest first, as (stream, first step)."""
        return [(segment.sid, segment.first_step + offset) for segment, offset in self._online]

    def restore_online(self, state: Sequence[tuple[str, int]]) -> None:
        """Replace the waiting windows by those of `online_state` that are still held."""
        found = (self._index.find(sid, step) for sid, step in state)
        self._online.clear()
        self._online.extend(window for window in found if window is not None)

    def held(self) -> Iterator[tuple[str, int, np.ndarray]]:
        """Yield every gapless stretch: its stream, its first step, and the rows of its records."""
        for segment in self._index.segments():
            first = segment.first_step + segment.dropped_pages * self.page_steps
            yield segment.sid, first, self._index.rows(segment)

    def held_chunks(self) -> list[HeldChunk]:
        """Return the chunks all of whose records are held, in the order of the log."""
        return [held for held in self._chunks if self._holds(held)]

    def chunk(self, held: HeldChunk) -> Chunk:
        """Return a chunk with the records as they are now, stored latents as written back last."""
        rows = self._index.rows(held.segment, held.offset, held.offset + held.steps)
        return Chunk(
            held.stream,
            held.incarnation,
            held.seq,
            held.first_step,
            {name: column[rows].cpu().numpy() for name, column in self.columns.items()},
            held.version_min,
            held.version_max,
            held.episodes,
        )

    def newest_chunks(self) -> dict[str, int]:
        """Return the newest chunk ever placed of every stream, by stream with incarnation."""
        return self._index.newest_chunks()

    def origin(self, sid: str) -> int:
        """Return the number of the log that a stream with its incarnation is in."""
        return self._origin[sid]

    def inserted_into(self, number: int) -> int:
        """Return the steps that were inserted into one log up to what has been absorbed of it."""
        return self._logs[number].inserted_steps

    def draw(self, seed: int, update: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Choose the windows of an update: new ones first, the rest as `sampling` has it.

        Returns:
            (count,) float64 uniforms and (count,) int64 rows, as `storage.window_rows` takes them:
            a window starts at its row or, where that is -1, where the uniform number says.

        Raises:
            ReplayEmpty: if there is no whole window to sample.
        """
        self._require_windows()
        rng = _random(seed, update)
        uniforms, fresh = rng.random(count), np.full(count, -1, np.int64)
        new = int(self._sampling.online * count)
        fresh[:new] = self.online_starts(new)
        return self._sampler.draw(rng, uniforms, fresh)

    def write_priorities(self, rows: np.ndarray, losses: np.ndarray, generation: int) -> int:
        """Let losses decide how often steps are drawn, see `Sampler.write_priorities`."""
        return self._sampler.write_priorities(rows, losses, generation)

    def priority_state(self) -> dict[str, Any]:
        """Return the priorities of all steps, see `Sampler.state`; {} where there are none."""
        return self._sampler.state()

    def restore_priorities(self, state: dict[str, Any]) -> None:
        """Put back priorities of `priority_state`, for the steps that are still held."""
        self._sampler.restore(state)

    def uniforms(self, seed: int, update: int, count: int) -> np.ndarray:
        """Return (count,) float64 in [0, 1) that depend on seed and update number only.

        Raises:
            ReplayEmpty: if there is no whole window to sample.
        """
        self._require_windows()
        return _random(seed, update).random(count)

    def _require_windows(self) -> None:
        if not self.valid_starts:
            raise ReplayEmpty(
                f"no stream holds {self.window_steps} consecutive steps yet "
                f"({self.size_steps} steps in all)"
            )

    def _apply(self, number: int, arrival: Arrival) -> list[EpisodeEvent]:
        entry, chunk = arrival.entry, arrival.chunk
        rebuilding, missed = self._logs[number].note(arrival)
        if missed:
            self.missed_steps += missed
            self._missed.say(f"mirror_missed steps={missed} total={self.missed_steps}")
        if chunk is None:
            return []
        known = self._index.last_seq(entry.sid) >= entry.seq
        self._place(chunk, number, collect=self._collect_online and not rebuilding)
        if known:
            return []
        now, newest = self.inserted_steps, chunk.version_max
        return [
            EpisodeEvent(now, chunk.stream, e.ret, e.length, e.end, newest) for e in chunk.episodes
        ]

    def _holds(self, held: HeldChunk) -> bool:
        # Records are given up from the oldest on.
        return self._index.row_of(held.segment, held.offset) >= 0

    def _place(self, chunk: Chunk, number: int, *, collect: bool) -> None:
        pieces = self._index.place(chunk.sid, chunk.seq, chunk.first_step, chunk.steps)
        done = 0
        for row, count in pieces:
            part = slice(done, done + count)
            values = {name: chunk.columns[name][part] for name in self.columns}
            self._storage.write(row, values)
            done += count
        if pieces:
            self._note_chunk(chunk, number)
            flags = (chunk.columns[name] for name in ("is_first", "is_last"))
            self._sampler.follow(self._index.segment(chunk.sid), *flags)
            fresh = self._index.new_windows(chunk.sid)
            if collect:
                self._online.extend(fresh)

    def _note_chunk(self, chunk: Chunk, number: int) -> None:
        self._origin[chunk.sid] = number
        segment = self._index.segment(chunk.sid)
        self._chunks.append(
            HeldChunk(
                segment,
                segment.length - chunk.steps,
                number,
                chunk.stream,
                chunk.incarnation,
                chunk.seq,
                chunk.first_step,
                chunk.steps,
                chunk.version_min,
                chunk.version_max,
                chunk.episodes,
            )
        )


class MirroredLog:
    """What a mirror has of one of its logs, for whoever puts that log's server back in order.

    Args:
        mirror: of which it is a part.
        number: of the log.
    """

    def __init__(self, mirror: Mirror, number: int) -> None:
        self._mirror, self._number = mirror, number
        self.schema = mirror.schema

    @property
    def columns(self) -> dict[str, Tensor]:
        """All columns of the mirror."""
        return self._mirror.columns

    @property
    def inserted_steps(self) -> int:
        """Steps that were inserted into this log up to what has been absorbed."""
        return self._mirror.inserted_into(self._number)

    def held_chunks(self) -> list[HeldChunk]:
        """Return the chunks of this log all of whose records are held, in its order."""
        return [held for held in self._mirror.held_chunks() if held.log == self._number]

    def chunk(self, held: HeldChunk) -> Chunk:
        """Return a chunk with the records as they are now; see `Mirror.chunk`."""
        return self._mirror.chunk(held)

    def newest_chunks(self) -> dict[str, int]:
        """Return the newest chunk ever placed of every stream of this log."""
        known = self._mirror.newest_chunks()
        return {sid: seq for sid, seq in known.items() if self._mirror.origin(sid) == self._number}

    def suspend(self) -> list[EpisodeEvent]:
        """Stop following this log, and absorb what was fetched of all."""
        return self._mirror.suspend(self._number)

    def resume(self, after: str, inserted_steps: int) -> None:
        """Follow this log again after `suspend`; see `Mirror.resume`."""
        self._mirror.resume(after, inserted_steps, self._number)


def _random(seed: int, update: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, update]))
