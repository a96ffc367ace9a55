"""When a server has lost all its data: the account goes on, and the mirror's records go back."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Literal

from replay_service.chunk import encode_chunk, stream_id
from replay_service.client import ReplayClient, StreamEnd
from replay_service.config import Limits
from replay_service.errors import (
    ReplayConfigError,
    ReplayError,
    ReplayFenced,
    ReplayFull,
    ReplayUnavailable,
)
from replay_service.mirror import EpisodeEvent, HeldChunk, Mirror, MirroredLog
from replay_service.sharded import ShardedClient

log = logging.getLogger(__name__)

_TELL_EVERY_S = 5.0
_SENDS = 20


class Reseeder:
    """Notices that a server has lost its data, creates the replay anew, and puts back what is held.

    Guarantees:
        1. Every chunk goes back under its own stream, incarnation, number and first step, in the
           order of the old log. So whoever has read it before knows it again, and a live writer
           goes on behind it, sending what the mirror had not read from its resend ring.
        2. Inserted and replayed steps go on, and with them the train ratio's account. What is not
           put back counts as evicted.
        3. Until all is back nobody else may insert; writers wait, and say for what.
        4. No stream that begins later gets an incarnation that was given out before, whether or
           not the mirror has seen it.
        5. `run` can be repeated after any failure, of the server too, and continues. If the learner
           ends in between, its successor finds the beginning of the old log.

    Records go back as the mirror has them: stored latents are those that training wrote last.

    Args:
        client: with the rights of a learner.
        writer: returns a client with the rights of an actor; it is closed after use.
        mirror: holds all columns. Of a stream with a hole, only what follows the hole is put back.
        limits: of the replay.
        mode: ``reseed``, or ``continue`` to put back nothing but the account.
        fence: of the learner.

    Attributes:
        limits: see above.
        losses: how often data was lost and `run` has ended.
        progress: what goes on now, in words; empty if nothing does.
    """

    def __init__(
        self,
        client: ReplayClient,
        writer: Callable[[], ReplayClient],
        mirror: Mirror | MirroredLog,
        limits: Limits,
        *,
        fence: int,
        mode: Literal["reseed", "continue"] = "reseed",
        codec: Literal["auto", "zstd", "zlib", "raw"] = "auto",
    ) -> None:
        self.losses = 0
        self.progress = ""
        self._client, self._writer, self._mirror = client, writer, mirror
        self.limits = limits
        self._fence, self._mode, self._codec = fence, mode, codec
        self._born = client.stats().born
        self._token = ""
        self._refused = False
        self._events = list[EpisodeEvent]()
        kept, whole = set(mirror.columns), set(mirror.schema.by_name)
        assert kept == whole, f"a mirror without {sorted(whole - kept)} cannot put records back"

    def replaced(self) -> bool:
        """Ask the server whether its replay is another one than at the start.

        Raises:
            ReplayUnavailable: it cannot be asked, or has no replay at all.
        """
        return not self._refused and self._client.stats().born != self._born

    def run(
        self, replayed_steps: int, budget_steps: int, stopped: Callable[[], bool] = lambda: False
    ) -> list[EpisodeEvent]:
        """Create the replay anew and put back what the mirror holds. Call it where `absorb` is.

        Blocks for as long as inserting everything takes, about 20 s for a million steps of images.

        Args:
            replayed_steps, budget_steps: as for `ReplayClient.settle`.
            stopped: asked between chunks; once true, the rest is given up.

        Returns:
            Episodes of what had been fetched before and was absorbed now.

        Raises:
            ReplayUnavailable: the server is away; call again later.
            ReplayFenced: another learner has taken over.
        """
        if not self._token:
            self._token = secrets.token_hex(8)
            log.error("replay_lost server=%s mode=%s", self._client.address, self._mode)
            self._events += self._mirror.suspend()
        chunks = _without_holes(self._mirror.held_chunks()) if self._mode == "reseed" else []
        try:
            self._client.create(self._mirror.schema, self.limits, token=self._token)
            self._fill(chunks, replayed_steps, budget_steps, stopped)
        except ReplayConfigError as error:
            # A server may also come back with the data that it seemed to have lost.
            self._refused = self._client.stats().born != self._born
            (log.error if self._refused else log.warning)("replay_not_restored reason=%s", error)
            self._token, self.progress = "", ""
            self._mirror.resume("0", self._mirror.inserted_steps)
        events, self._events = self._events, []
        return events

    def _fill(
        self,
        chunks: list[HeldChunk],
        replayed_steps: int,
        budget_steps: int,
        stopped: Callable[[], bool],
    ) -> None:
        streams = self._stream_ends(chunks)
        total = self._mirror.inserted_steps
        there = self._client.restore(
            self._fence,
            self._token,
            inserted_steps=total,
            put_back_steps=sum(held.steps for held in chunks),
            replayed_steps=replayed_steps,
            budget_steps=budget_steps,
            streams=streams,
        )
        names = (stream_id(end.name, end.incarnation) for end in streams)
        last = dict(zip(names, there, strict=True))
        steps = self._put_all(chunks, last, stopped)
        newest = self._client.last_log_id()
        born = self._client.stats().born
        inserted = self._client.restored(self._fence)
        # What was put back is in the mirror already.
        self._mirror.resume(newest or "0", inserted)
        self._born, self._token, self.progress = born, "", ""
        self.losses += 1
        log.warning(
            "replay_restored steps=%d chunks=%d inserted=%d of=%d",
            steps,
            len(chunks),
            inserted,
            total,
        )

    def _put_all(
        self, chunks: list[HeldChunk], last: dict[str, int], stopped: Callable[[], bool]
    ) -> int:
        """Insert what is not there yet; return the steps that are there now."""
        done, whole, told = 0, sum(held.steps for held in chunks), time.monotonic()
        if not chunks:
            return 0
        writer = self._writer()
        try:
            for held in chunks:
                if stopped():
                    log.warning("replay_restoring_ended steps=%d of=%d", done, whole)
                    break
                if held.seq > last[stream_id(held.stream, held.incarnation)]:
                    self._put(writer, held)
                done += held.steps
                self.progress = f"the replay is put back: {done} of {whole} steps"
                if time.monotonic() - told >= _TELL_EVERY_S:
                    told = time.monotonic()
                    log.info("replay_restoring steps=%d of=%d", done, whole)
        except ReplayFull as error:
            log.error("replay_restoring_ended steps=%d of=%d error=%s", done, whole, error)
        finally:
            writer.close()
        return done

    def _put(self, writer: ReplayClient, held: HeldChunk) -> None:
        chunk = self._mirror.chunk(held)
        blob = encode_chunk(chunk, self._mirror.schema, self._codec)
        for _ in range(_SENDS):
            reply = writer.insert(
                self._mirror.schema, chunk.sid, chunk.seq, chunk.steps, blob, token=self._token
            )
            # A writer may have sent the same chunk, encoded otherwise, and not committed it.
            if reply.code != "NOPAYLOAD":
                break
        if reply.code in ("OK", "DUP"):
            return
        if reply.code == "FENCED":
            raise ReplayFenced("another learner puts back what the server has lost")
        if reply.code in ("GAP", "NONE", "NOPAYLOAD"):
            raise ReplayUnavailable(
                f"the server at {writer.address} lost data again while it was put back"
            )
        raise ReplayError(
            f"chunk {chunk.seq} of {chunk.sid} was refused with {reply.code} {list(reply.values)}"
        )

    def _stream_ends(self, chunks: list[HeldChunk]) -> list[StreamEnd]:
        """Return where every stream goes on: those to put back, and the newest of each name."""
        first = dict[str, int]()
        for held in chunks:
            first.setdefault(stream_id(held.stream, held.incarnation), held.seq)
        known = self._mirror.newest_chunks()
        newest = dict[str, int]()
        for sid in known:
            name, _, life = sid.rpartition("@")
            newest[name] = max(newest.get(name, 0), int(life))
        ends = list[StreamEnd]()
        for sid, last in known.items():
            name, _, life = sid.rpartition("@")
            live = int(life) == newest[name]
            if live or sid in first:
                ends.append(StreamEnd(name, int(life), first.get(sid, last + 1) - 1, not live))
        return ends


class ShardedReseeder:
    """Does for several servers what `Reseeder` does for one; each loses and gets back its own.

    While one is put back, nothing is settled with the others, whose inserts go on until their
    budget is used up.

    Args:
        client: of all of them.
        reseeders: one for each.
    """

    def __init__(self, client: ShardedClient, reseeders: Sequence[Reseeder]) -> None:
        self._client, self._reseeders = client, list(reseeders)
        self._lost = set[int]()

    def join(self, one: Reseeder) -> None:
        """Look after one server more, the last one of the client."""
        self._reseeders.append(one)

    @property
    def losses(self) -> int:
        """How often data was lost and put back, over all servers."""
        return sum(one.losses for one in self._reseeders)

    @property
    def progress(self) -> str:
        """What goes on now, in words; empty if nothing does."""
        return "; ".join(one.progress for one in self._reseeders if one.progress)

    def replaced(self) -> bool:
        """Ask the servers that answer whether the replay of one is another one than at the start.

        Raises:
            ReplayUnavailable: one went away just now, or has no replay at all.
        """
        for number, one in enumerate(self._reseeders):
            if not self._client.is_away(number) and one.replaced():
                self._lost.add(number)
        return bool(self._lost)

    def run(
        self, replayed_steps: int, budget_steps: int, stopped: Callable[[], bool] = lambda: False
    ) -> list[EpisodeEvent]:
        """Put back the servers that have lost their data; see `Reseeder.run`.

        Each continues with the share of the budget that it has, whatever `budget_steps` is.
        """
        self._lost.update(self._client.lost())
        events = list[EpisodeEvent]()
        for number in sorted(self._lost):
            share = self._client.reserved(number)
            events += self._reseeders[number].run(replayed_steps, share, stopped)
            self._lost.discard(number)
        return events


def continue_account(
    client: ReplayClient | ShardedClient,
    mirror: Mirror,
    *,
    fence: int,
    inserted_steps: int,
    replayed_steps: int,
    budget_steps: int,
) -> None:
    """Let an empty replay go on where an earlier one ended that nobody holds any more.

    Otherwise training would wait until actors have made up for all that was lost. Of several
    servers the first empty one counts on, from what the others do not have.

    Args:
        inserted_steps: of the earlier replay, over all servers.
        fence, replayed_steps, budget_steps: as for `ReplayClient.settle`.

    Raises:
        ReplayError: as `ReplayClient.restore`.
    """
    if isinstance(client, ShardedClient):
        number = client.empty()[0]
        missing = inserted_steps - mirror.inserted_steps
        # Its share of the budget follows with the next settlement.
        _count_on(
            client.clients[number], mirror.of(number), fence, missing, replayed_steps, missing
        )
        client.recount()
    else:
        whole = mirror.of(0)
        _count_on(client, whole, fence, inserted_steps, replayed_steps, budget_steps)


def _count_on(
    client: ReplayClient,
    mirror: MirroredLog,
    fence: int,
    inserted_steps: int,
    replayed_steps: int,
    budget_steps: int,
) -> None:
    mirror.suspend()
    client.restore(
        fence,
        secrets.token_hex(8),
        inserted_steps=inserted_steps,
        put_back_steps=0,
        replayed_steps=replayed_steps,
        budget_steps=budget_steps,
        streams=(),
    )
    mirror.resume("0", client.restored(fence))


def _without_holes(chunks: list[HeldChunk]) -> list[HeldChunk]:
    """Leave out what lies before a hole of its stream: the log is gapless."""
    begins, last = dict[str, int](), dict[str, int]()
    for held in chunks:
        sid = stream_id(held.stream, held.incarnation)
        if held.seq != last.get(sid, -1) + 1:
            begins[sid] = held.seq
        last[sid] = held.seq
    return [c for c in chunks if c.seq >= begins[stream_id(c.stream, c.incarnation)]]
