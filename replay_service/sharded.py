"""The learner's calls to a replay that is spread over several servers."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from replay_service.client import ReplayClient
from replay_service.config import Limits
from replay_service.counters import ReplayStats
from replay_service.errors import (
    ReplayConfigError,
    ReplayError,
    ReplayFenced,
    ReplayMissing,
    ReplayOwned,
    ReplayUnavailable,
)
from replay_service.schema import Schema
from replay_service.shards import BudgetSplit

log = logging.getLogger(__name__)

PATIENCE_S = 0.25
"""Time in which a shard has to answer a settlement before the others go on without it."""
RETRY_S = 0.5
_BEGIN_MEANWHILE = 16
"""Incarnations that streams may take while they are evened out over the shards."""
_APART = 2**20
"""Incarnations that a stream may still take elsewhere after a shard has joined to which it moves:
more than an actor could in years, whichever process has not heard of the shard yet."""


class _Call(NamedTuple):
    """A settlement under way."""

    budget: int
    answer: Future[tuple[int, int]]


@dataclass
class _Link:
    """What is known of one shard."""

    client: ReplayClient
    thread: ThreadPoolExecutor
    call: _Call | None = None
    turn: int = 0
    size_steps: int = 0
    reason: str = ""
    """Why it does not answer; empty while it does."""
    since: float = 0.0
    retry_at: float = 0.0
    lost: bool = False
    """Whether it answers and holds no replay any more."""


class ShardedClient:
    """What a learner does with a replay server, done with several that share the work.

    Guarantees:
        1. `settle` never waits for a shard that does not answer, apart from once `patience_s`;
           `trouble` says which it is and for how long. The others go on.
        2. The budgets of the shards never exceed the total together; see `BudgetSplit`.
        3. A stream gets no incarnation on one shard that it had on another.
        4. Every other call needs all shards, and raises if one is away.

    `settle` and `join` are for one thread, `trouble`, `away` and `shards` for any.

    Args:
        clients: of the shards, with the rights of a learner; they are closed with this.
        chunk_steps: longest chunk that is inserted at once.
        patience_s: see above.
    """

    def __init__(
        self, clients: Sequence[ReplayClient], *, chunk_steps: int, patience_s: float = PATIENCE_S
    ) -> None:
        assert clients, "a replay needs a server"
        self.clients = tuple(clients)
        self.address = ", ".join(client.address for client in clients)
        self._chunk_steps, self._patience_s = chunk_steps, patience_s
        self._min_size = 0
        self._links = [_Link(client, _one_thread(at)) for at, client in enumerate(clients)]
        self._split: BudgetSplit | None = None

    def close(self) -> None:
        """Close all connections; a call under way ends by itself."""
        for link in self._links:
            link.thread.shutdown(wait=False, cancel_futures=True)
            link.client.close()

    @classmethod
    def of_one(
        cls, client: ReplayClient, schema: Schema, limits: Limits, *, chunk_steps: int, total: int
    ) -> ShardedClient:
        """Return a client of one shard, in the place of a learner's client of one server.

        Args:
            client: of the learner in charge, who settles with it no more.
            schema, limits: what the replay was created with.
            chunk_steps: longest chunk that is inserted at once.
            total: the largest budget that was ever sent: such a call may still be on its way.

        Raises:
            ReplayError: the server cannot be used; then nothing has changed.
        """
        sharded = cls([client], chunk_steps=chunk_steps)
        sharded._min_size = limits.min_size_steps
        client.stats()  # raises if it has lost the replay, which must not begin anew here
        try:
            client.create(schema, sharded.limits_of_each(limits))
            # What it has inserted is asked for when its minimum has gone: from now on its budget
            # alone counts.
            sharded.recount()
        except ReplayError:
            with suppress(ReplayError):
                client.create(schema, limits)
            raise
        sharded._shared().sent(0, total)
        return sharded

    def join(self, client: ReplayClient, stats: ReplayStats) -> None:
        """Share the budget with one server more from now on; see `prepare_shard`.

        It admits nothing yet. Sends nothing, so it cannot fail; for the thread of `settle`.

        Args:
            client: of the server, with the rights of a learner.
            stats: what it holds.
        """
        self._shared().join(stats.budget_steps, stats.inserted_steps)
        link = _Link(client, _one_thread(len(self._links)), size_steps=stats.size_steps)
        self._links.append(link)
        self.clients = (*self.clients, client)
        self.address = ", ".join(one.address for one in self.clients)

    @property
    def shards(self) -> list[dict[str, Any]]:
        """What is known of each: {address, inserted_steps, size_steps, budget_steps, away}."""
        split, now = self._split, time.monotonic()
        return [
            {
                "address": link.client.address,
                "inserted_steps": split.inserted(at) if split else 0,
                "size_steps": link.size_steps,
                "budget_steps": split.reserved(at) if split else 0,
                "away": f"{link.reason} for {now - link.since:.0f} s" if link.reason else "",
            }
            for at, link in enumerate(list(self._links))
        ]

    @property
    def trouble(self) -> str:
        """Which shards do not answer, why and for how many seconds; empty if all do."""
        return "; ".join(one["away"] for one in self.shards if one["away"])

    @property
    def away(self) -> int:
        """How many shards do not answer."""
        return sum(bool(link.reason) for link in self._links)

    def is_away(self, shard: int) -> bool:
        """Whether a shard did not answer the last settlement."""
        return bool(self._links[shard].reason)

    def lost(self) -> list[int]:
        """Return the shards that answer and hold no replay any more."""
        return [at for at, link in enumerate(self._links) if link.lost]

    def empty(self) -> list[int]:
        """Ask all shards, and return those into which nothing has ever been inserted."""
        found = [client.stats().committed_chunks for client in self.clients]
        return [at for at, chunks in enumerate(found) if not chunks]

    def recount(self) -> None:
        """Ask all shards again for their budgets and what they hold."""
        found = [client.stats() for client in self.clients]
        for link, stats in zip(self._links, found, strict=True):
            link.size_steps = stats.size_steps
        self._split = BudgetSplit(
            [stats.budget_steps for stats in found],
            [stats.inserted_steps for stats in found],
            chunk_steps=self._chunk_steps,
        )

    def reserved(self, shard: int) -> int:
        """Return the budget of a shard as far as it may be in force."""
        return self._shared().reserved(shard)

    def create(
        self,
        schema: Schema,
        limits: Limits,
        *,
        token: str | None = None,
        take_over: bool = False,
    ) -> bool:
        """Create the replay on every shard, or update the limits; see `ReplayClient.create`.

        Each gets the whole capacity, so that streams may be spread unevenly. The minimum size is
        left to `settle`, which knows that of all together.

        Returns:
            Whether it is new on all of them.

        Raises:
            ReplayConfigError: two addresses lead to the same server.
            ReplayOwned: one holds the replay of another owner.
        """
        self._require_distinct()
        self._min_size = limits.min_size_steps
        each = self.limits_of_each(limits)
        new = [
            client.create(schema, each, token=token, take_over=take_over) for client in self.clients
        ]
        if len(self.clients) > 1:
            highest = max(client.highest_incarnation() for client in self.clients)
            base = highest + 1 + _BEGIN_MEANWHILE
            for client in self.clients:
                client.create(schema, each, token=token, incarnations_from=base)
        return all(new)

    def limits_of_each(self, limits: Limits) -> Limits:
        """Return what one shard enforces where the limits are those of all."""
        return replace(limits, min_size_steps=0, budget_steps=0)

    def acquire_fence(self, at_least: int = 0) -> int:
        """Return a fence that is the newest on every shard; see `ReplayClient.acquire_fence`."""
        fences = [client.acquire_fence(at_least) for client in self.clients]
        while len(set(fences)) > 1:
            top = max(fences)
            fences = [
                fence if fence == top else client.acquire_fence(top)
                for client, fence in zip(self.clients, fences, strict=True)
            ]
        # From here on no other learner changes a budget.
        self.recount()
        for link in self._links:
            link.turn = 0
        return fences[0]

    def restored(self, fence: int) -> int:
        """Let everybody insert again on every shard; return the inserted steps of all."""
        return sum(client.restored(fence) for client in self.clients)

    def stats(self) -> ReplayStats:
        """Read all counters of all shards and add them up; fence and epochs are the newest."""
        return ReplayStats.together([client.stats() for client in self.clients])

    def memory(self) -> tuple[int, int]:
        """Return bytes used and the limit of the fullest shard, of those that answer."""
        found = [link.client.memory() for link in self._links if not link.reason]
        if not found:
            raise ReplayUnavailable(self.trouble)
        return max(found, key=lambda pair: pair[0] / pair[1] if pair[1] else 0.0)

    def settle(self, fence: int, replayed_steps: int, budget_steps: int) -> tuple[int, int]:
        """Publish how much has been replayed, and share out the inserts that it pays for.

        Blocks for at most about twice `patience_s`.

        Args:
            fence, replayed_steps: as for `ReplayClient.settle`.
            budget_steps: total of inserted steps that all shards together may reach.

        Returns:
            Inserted steps and size over all shards, as far as they are known.

        Raises:
            ReplayFenced: if a newer fence exists on a shard.
            ReplayMissing: a shard has lost its replay; see `lost`.
            ReplayUnavailable: no shard answers.
        """
        split, now = self._shared(), time.monotonic()
        self._hear(range(len(self._links)))
        asked = [
            at for at, link in enumerate(self._links) if link.call is None and now >= link.retry_at
        ]
        total = self._total(budget_steps)
        goals = split.goals(total, asked)
        lowered = split.lowered(goals)
        self._send(fence, replayed_steps, lowered)
        rest = {at: goal for at, goal in goals.items() if at not in lowered}
        self._send(fence, replayed_steps, split.raised(rest, total))
        if lost := self.lost():
            raise ReplayMissing(
                f"no replay is left on {', '.join(self.clients[at].address for at in lost)}"
            )
        if all(link.reason for link in self._links):
            raise ReplayUnavailable(self.trouble)
        return split.committed, sum(link.size_steps for link in self._links)

    def _total(self, budget_steps: int) -> int:
        """Return the budget, or what the minimum size needs: below it inserts are always paid."""
        size = sum(link.size_steps for link in self._links)
        if size >= self._min_size:
            return budget_steps
        room = len(self._links) * (self._chunk_steps + 2)
        return max(budget_steps, self._shared().committed + self._min_size - size + room)

    def _send(self, fence: int, replayed_steps: int, budgets: dict[int, int]) -> None:
        """Tell some shards their budgets, and wait for those that have answered lately."""
        split = self._shared()
        for at, budget in budgets.items():
            link = self._links[at]
            link.turn += 1
            split.sent(at, budget)
            answer = link.thread.submit(
                link.client.settle, fence, replayed_steps, budget, turn=link.turn
            )
            link.call = _Call(budget, answer)
        answering = [self._links[at] for at in budgets]
        calls = [link.call for link in answering if link.lost or not link.reason]
        wait([call.answer for call in calls if call is not None], self._patience_s)
        self._hear(budgets)
        for at in budgets:
            if self._links[at].call is not None:
                late = f"the server at {self.clients[at].address} does not answer"
                self._note(at, late)

    def _hear(self, shards: Iterable[int]) -> None:
        """Take the answers that have come."""
        for at in shards:
            link = self._links[at]
            if link.call is None or not link.call.answer.done():
                continue
            call, link.call = link.call, None
            try:
                inserted, link.size_steps = call.answer.result()
            except ReplayMissing as error:
                link.lost = True
                self._note(at, str(error))
            except ReplayUnavailable as error:
                link.retry_at = time.monotonic() + RETRY_S
                self._note(at, str(error))
            else:
                self._shared().heard(at, call.budget, inserted)
                self._note(at, "")

    def _note(self, shard: int, reason: str) -> None:
        link, now = self._links[shard], time.monotonic()
        if reason and not link.reason:
            link.since = now
            log.warning("shard_away shard=%d reason=%s", shard, reason)
        elif link.reason and not reason:
            link.lost = False
            log.warning("shard_back address=%s after_s=%.1f", link.client.address, now - link.since)
        link.reason = reason

    def _shared(self) -> BudgetSplit:
        assert self._split is not None, "acquire_fence comes first"
        return self._split

    def _require_distinct(self) -> None:
        _require_distinct(self.clients)


def _require_distinct(clients: Iterable[ReplayClient]) -> None:
    known = dict[str, str]()
    for client in clients:
        same = known.setdefault(client.server_id(), client.address)
        if same != client.address:
            raise ReplayConfigError(
                f"{same} and {client.address} are the same server, and a server is one shard: "
                "give each server once"
            )


def prepare_shard(
    newcomer: ReplayClient,
    others: Sequence[ReplayClient],
    schema: Schema,
    limits: Limits,
    *,
    fence: int,
) -> ReplayStats:
    """Make a server ready to join those of a replay that is in use, and return what it holds.

    It gets schema, limits and fence of the learner, and admits no insert until that has settled
    with it. At the others nothing changes; they must all be there. May be repeated, and be called
    from any thread.

    Args:
        newcomer: with the rights and the owner's mark of the learner.
        others: the servers of the replay.
        schema, limits: what it was created with; the limits are those of all servers.
        fence: of the learner.

    Raises:
        ReplayOwned, ReplaySchemaError, ReplayConfigError: the newcomer holds the replay of another
            run, one with other columns, or steps, or it is one of the others.
        ReplayUnavailable, ReplayAuthError: one of them cannot be used.
        ReplayFenced: a newer learner has prepared it.
    """
    newcomer.check()
    _require_distinct([*others, newcomer])
    _require_unused(newcomer, schema)
    # Raises if one of them has just lost its replay, and with it what it has given out.
    for client in others:
        client.stats()
    base = max(client.highest_incarnation() for client in others) + _APART
    each = replace(limits, min_size_steps=0, budget_steps=0)
    newcomer.create(schema, each, incarnations_from=base)
    newest = newcomer.stats().fence
    if newest > fence:
        raise ReplayFenced(
            f"a learner with fence {newest} has prepared the server at {newcomer.address}, and "
            f"this one has {fence}: two learners were started for one run"
        )
    if newest < fence:
        newcomer.acquire_fence(fence)
    return newcomer.stats()


def _require_unused(newcomer: ReplayClient, schema: Schema) -> None:
    try:
        known = newcomer.counters()
    except ReplayMissing:
        return
    owner = known.get("owner", b"").decode()
    if owner and owner.split()[0] != newcomer.owner.split(" ")[0]:
        raise ReplayOwned(
            f"the server at {newcomer.address} holds the replay of another run, "
            f"{owner.partition(' ')[2]}: give a server that holds none"
        )
    if known and known["schema"].decode() != schema.hash.hex():
        raise newcomer.schema_error(schema, known["schema_text"])
    if int(known.get("inserted", 0)):
        raise ReplayConfigError(
            f"the server at {newcomer.address} holds a replay of {int(known['inserted'])} inserted "
            "steps already, and one that joins a training must hold nothing: empty it (redis-cli "
            "flushall), or, if its steps are this run's, stop the training and continue it with "
            "--redis and all addresses"
        )


def _one_thread(shard: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix=f"replay-shard-{shard}")
