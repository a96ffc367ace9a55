"""One replay on two servers: the learner's calls, and one of the servers away for a while."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace

import pytest
import redis

from replay_service import (
    CreditLimiter,
    EmbeddedServer,
    Limits,
    ReplayAuthError,
    ReplayClient,
    ReplayConfig,
    ReplayConfigError,
    ReplayFenced,
    ReplayMissing,
    ReplayOwned,
    ReplaySchemaError,
    ReplayUnavailable,
    Schema,
    ShardedClient,
    Uploader,
    check_server,
    prepare_shard,
    shard_of,
)
from tests.replay_service.records import SCHEMA, UNBOUNDED, insert_many, write_until

CHUNK = 8
CONFIG = ReplayConfig(chunk_steps=CHUNK, redis_memory_bytes=2**28)
LIMITS = Limits(
    capacity_steps=10**6, capacity_bytes=2**27, min_size_steps=64, max_chunk_steps=CHUNK
)
LIMITER = CreditLimiter(
    train_ratio=4,
    batch_steps=32,
    chunk_steps=CHUNK,
    min_size_steps=64,
    capacity_steps=10**6,
    shards=2,
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[EmbeddedServer]]:
    """Two servers that keep what they are told through their own death."""
    with ExitStack() as stack:
        directories = (tmp_path_factory.mktemp(f"shard{at}") for at in range(2))
        yield [
            stack.enter_context(EmbeddedServer(directory, max_memory_bytes=2**28))
            for directory in directories
        ]


@pytest.fixture
def servers(pair: list[EmbeddedServer]) -> list[EmbeddedServer]:
    """Two servers that hold nothing."""
    for server in pair:
        with redis.Redis.from_url(server.url) as admin:
            admin.flushall()
    return pair


@pytest.fixture
def sharded(servers: list[EmbeddedServer]) -> Iterator[ShardedClient]:
    made = connect(servers)
    yield made
    made.close()


def connect(servers: list[EmbeddedServer]) -> ShardedClient:
    clients = [ReplayClient(server.url, timeout_s=1.0) for server in servers]
    return ShardedClient(clients, chunk_steps=CHUNK)


@dataclass
class Writing:
    """Some streams that are written by a thread each, every one to its own shard."""

    uploaders: list[Uploader]
    homes: list[int]
    stop: threading.Event
    threads: list[threading.Thread]

    def on(self, shard: int) -> list[Uploader]:
        return [one for one, home in zip(self.uploaders, self.homes, strict=True) if home == shard]


@pytest.fixture
def writing(servers: list[EmbeddedServer]) -> Iterator[Callable[..., Writing]]:
    stop = threading.Event()
    with ExitStack() as stack:

        def begin(streams: int, shard: int | None = None) -> Writing:
            urls = [server.url for server in servers]
            names = [f"s{slot}" for slot in range(streams)]
            # Unix sockets have another path in every run: even is chosen here, not by their hash.
            homes = [slot % len(servers) if shard is None else shard for slot in range(streams)]
            uploaders = [Uploader(ReplayClient(urls[home]), SCHEMA, CONFIG) for home in homes]
            threads = []
            for slot, (name, uploader) in enumerate(zip(names, uploaders, strict=True)):
                stack.callback(uploader.close, 0.0)
                writer = uploader.open_stream(name)
                thread = threading.Thread(target=write_until, args=(writer, slot, stop))
                threads.append(thread)
                thread.start()
            made.append(Writing(uploaders, homes, stop, threads))
            return made[-1]

        made = list[Writing]()
        yield begin
        stop.set()
        for one in made:
            for uploader in one.uploaders:
                uploader.interrupt()
            for thread in one.threads:
                thread.join(10)


def inserted(servers: list[EmbeddedServer]) -> list[int]:
    found = []
    for server in servers:
        client = ReplayClient(server.url)
        found.append(client.stats().inserted_steps)
        client.close()
    return found


def wait_for(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def train(
    client: ReplayClient | ShardedClient,
    fence: int,
    updates: int,
    until: Callable[[int], bool],
    limiter: CreditLimiter = LIMITER,
) -> int:
    """Settle and update as the limiter allows until a condition on the steps holds."""
    deadline = time.monotonic() + 20
    steps, size = client.settle(fence, limiter.replayed_steps(updates), limiter.budget(updates))
    while not until(steps):
        assert time.monotonic() < deadline, (steps, size, updates, limiter.reason, client.trouble)
        if limiter.may_start_update(size, steps, updates):
            updates += 1
        steps, size = client.settle(fence, limiter.replayed_steps(updates), limiter.budget(updates))
    return updates


def test_both_shards_fill_within_one_band(
    servers: list[EmbeddedServer], sharded: ShardedClient, writing: Callable[..., Writing]
) -> None:
    assert sharded.create(SCHEMA, LIMITS)
    fence = sharded.acquire_fence()
    began = writing(5)
    most = list[int]()

    def enough(steps: int) -> bool:
        # What the servers have may never exceed what was paid for by the last settlement.
        most.append(sum(inserted(servers)))
        return steps > 1500

    updates = train(sharded, fence, 0, enough)
    began.stop.set()
    assert most[-1] <= LIMITER.budget(updates) and min(inserted(servers)) > 200
    assert sharded.stats().inserted_steps == sum(inserted(servers))
    assert sharded.stats().replayed_steps == LIMITER.replayed_steps(updates)
    for server in servers:
        report = check_server(ReplayClient(server.url))
        assert not report.findings.found, report


def test_inserts_stop_at_the_budget_of_all(
    servers: list[EmbeddedServer], sharded: ShardedClient, writing: Callable[..., Writing]
) -> None:
    sharded.create(SCHEMA, LIMITS)
    fence = sharded.acquire_fence()
    began = writing(4)
    for _ in range(40):
        sharded.settle(fence, 0, LIMITER.budget(0))
        assert sum(inserted(servers)) <= LIMITER.budget(0)
        time.sleep(0.01)
    assert all("inserts wait for training" in one.blocked_reason for one in began.uploaders)
    assert sum(inserted(servers)) > LIMITER.budget(0) - 4 * CHUNK


def test_a_stopped_shard_is_named_and_the_other_goes_on(
    servers: list[EmbeddedServer], sharded: ShardedClient, writing: Callable[..., Writing]
) -> None:
    sharded.create(SCHEMA, LIMITS)
    fence = sharded.acquire_fence()
    began = writing(4)
    updates = train(sharded, fence, 0, lambda steps: steps > 500)
    before = inserted(servers)
    os.kill(servers[1].process_id, signal.SIGSTOP)
    try:
        goal = sum(before) + 800
        slowest = 0.0

        def enough(steps: int) -> bool:
            nonlocal slowest, at
            slowest, at = max(slowest, time.monotonic() - at), time.monotonic()
            return steps > goal

        at = time.monotonic()
        updates = train(sharded, fence, updates, enough)
        assert sharded.is_away(1) and not sharded.is_away(0)
        assert servers[1].url in sharded.trouble and slowest < 1.0
    finally:
        os.kill(servers[1].process_id, signal.SIGCONT)
    back = inserted(servers)[1] + 200
    updates = train(sharded, fence, updates, lambda _: inserted(servers)[1] > back)
    assert sharded.trouble == "" and sum(inserted(servers)) <= LIMITER.budget(updates)
    check_all(servers, began)


def test_a_killed_shard_that_returns_has_everything_once(
    servers: list[EmbeddedServer], sharded: ShardedClient, writing: Callable[..., Writing]
) -> None:
    sharded.create(SCHEMA, LIMITS)
    fence = sharded.acquire_fence()
    began = writing(4)
    updates = train(sharded, fence, 0, lambda steps: steps > 500)
    os.kill(servers[1].process_id, signal.SIGKILL)
    updates = train(sharded, fence, updates, lambda steps: steps > 1000)
    assert any(one.blocked_reason for one in began.on(1)) and sharded.is_away(1)
    wait_for(lambda: not servers[1].running)
    servers[1].start()
    back = inserted(servers)[1] + 200
    train(sharded, fence, updates, lambda _: inserted(servers)[1] > back)
    assert sharded.trouble == ""
    check_all(servers, began)


def check_all(servers: list[EmbeddedServer], began: Writing) -> None:
    """End the writers; every acknowledged step is on its shard, and nothing is there twice."""
    began.stop.set()
    for uploader in began.uploaders:
        uploader.interrupt()
    for thread in began.threads:
        thread.join(10)
    for uploader in began.uploaders:
        uploader.close(0.0)
    for at, server in enumerate(servers):
        report = check_server(ReplayClient(server.url))
        assert not report.findings.found, report
        acknowledged = sum(one.stats.steps for one in began.on(at))
        assert inserted(servers)[at] >= acknowledged
        assert inserted(servers)[at] - acknowledged <= CHUNK * len(began.on(at))


def test_all_away_is_unavailable_and_a_newer_learner_fences_the_old_one(
    servers: list[EmbeddedServer], sharded: ShardedClient
) -> None:
    sharded.create(SCHEMA, LIMITS)
    old = sharded.acquire_fence()
    # The shards disagree about the fences there were.
    sharded.clients[1].acquire_fence(old + 7)
    newer = connect(servers)
    assert newer.acquire_fence() == old + 8
    assert [client.stats().fence for client in newer.clients] == [old + 8] * 2
    with pytest.raises(ReplayFenced):
        sharded.settle(old, 0, 100)
    newer.settle(old + 8, 0, 100)
    assert sum(client.stats().budget_steps for client in newer.clients) == 100
    for server in servers:
        os.kill(server.process_id, signal.SIGSTOP)
    try:
        with pytest.raises(ReplayUnavailable, match="does not answer"):
            newer.settle(old + 8, 0, 100)
    finally:
        for server in servers:
            os.kill(server.process_id, signal.SIGCONT)
        newer.close()


def test_no_incarnation_is_given_out_on_two_shards(servers: list[EmbeddedServer]) -> None:
    first = connect(servers[:1])
    first.create(SCHEMA, LIMITS)
    lives = {first.clients[0].open_stream("s0") for _ in range(5)}
    both = connect(servers)
    both.create(SCHEMA, LIMITS)
    later = [client.open_stream("s0") for client in both.clients]
    assert min(later) > max(lives)
    both.create(SCHEMA, LIMITS)
    assert min(client.open_stream("s0") for client in both.clients) > max(later)
    first.close()
    both.close()


def test_two_names_of_one_server_are_refused(servers: list[EmbeddedServer]) -> None:
    url = servers[0].url
    twice = ShardedClient([ReplayClient(url), ReplayClient(url + "?db=0")], chunk_steps=CHUNK)
    with pytest.raises(ReplayConfigError, match="are the same server"):
        twice.create(SCHEMA, UNBOUNDED)
    twice.close()


def test_a_late_settlement_does_not_replace_a_newer_one(servers: list[EmbeddedServer]) -> None:
    client = ReplayClient(servers[0].url)
    client.create(SCHEMA, LIMITS)
    fence = client.acquire_fence()
    client.settle(fence, 100, 500, turn=2)
    client.settle(fence, 100, 900, turn=1)
    assert client.stats().budget_steps == 500
    client.settle(fence, 100, 300, turn=3)
    assert client.stats().budget_steps == 300
    # One that was sent without a number, before there were several servers, is late too.
    client.settle(fence, 400, 2000)
    assert client.stats().budget_steps == 300
    # A learner that went back, and numbers anew or not at all.
    for at, turn in enumerate((1, 0, 1)):
        fence = client.acquire_fence()
        client.settle(fence, 50, 200 + at, turn=turn)
        assert client.stats().budget_steps == 200 + at
    client.close()


def test_writers_find_the_shard_of_their_stream(servers: list[EmbeddedServer]) -> None:
    urls = [server.url for server in servers]
    assert {shard_of(f"s{slot}", urls) for slot in range(40)} == set(urls)


@pytest.mark.parametrize("before", [8, 700])
def test_a_server_joins_one_that_is_written_to_and_no_budget_is_ever_exceeded(
    servers: list[EmbeddedServer], writing: Callable[..., Writing], before: int
) -> None:
    alone, newcomer = (ReplayClient(server.url, timeout_s=1.0) for server in servers)
    account = LIMITER.over(1)
    alone.create(SCHEMA, replace(LIMITS, budget_steps=account.budget(0)))
    fence = alone.acquire_fence()
    first = writing(3, 0)
    updates = train(alone, fence, 0, lambda steps: steps >= before, account)
    stats = prepare_shard(newcomer, [alone], SCHEMA, LIMITS, fence=fence)
    # Prepared, it admits nothing; the training goes on without it.
    assert (stats.fence, stats.budget_steps, stats.min_size_steps) == (fence, 0, 0)
    second = writing(2, 1)
    updates = train(alone, fence, updates, lambda steps: steps >= before + 100, account)
    assert newcomer.stats().inserted_steps == 0
    both = ShardedClient.of_one(
        alone, SCHEMA, LIMITS, chunk_steps=CHUNK, total=account.budget(updates)
    )
    both.join(newcomer, stats)
    assert both.clients == (alone, newcomer) and servers[1].url in both.address
    # All of the total may be in force at the first one until it has acknowledged less.
    assert both.reserved(0) >= account.budget(updates) and both.reserved(1) == 0
    given = list[int]()

    def enough(steps: int) -> bool:
        found = [client.stats() for client in both.clients]
        given.append(sum(max(one.budget_steps, one.inserted_steps) for one in found))
        return min(one.inserted_steps for one in found) > 400

    updates = train(both, fence, updates, enough)
    # The total only grows.
    assert max(given) <= LIMITER.budget(updates) and both.trouble == ""
    assert [one["address"] for one in both.shards] == [server.url for server in servers]
    assert all(one["inserted_steps"] > 0 and not one["away"] for one in both.shards)
    everything = Writing(
        first.uploaders + second.uploaders,
        first.homes + second.homes,
        first.stop,
        first.threads + second.threads,
    )
    check_all(servers, everything)
    both.close()


def test_a_newcomer_that_is_killed_at_once_holds_up_nobody_and_returns(
    servers: list[EmbeddedServer], writing: Callable[..., Writing]
) -> None:
    alone, newcomer = (ReplayClient(server.url, timeout_s=1.0) for server in servers)
    account = LIMITER.over(1)
    alone.create(SCHEMA, replace(LIMITS, budget_steps=account.budget(0)))
    fence = alone.acquire_fence()
    first = writing(3, 0)
    updates = train(alone, fence, 0, lambda steps: steps > 300, account)
    stats = prepare_shard(newcomer, [alone], SCHEMA, LIMITS, fence=fence)
    both = ShardedClient.of_one(
        alone, SCHEMA, LIMITS, chunk_steps=CHUNK, total=account.budget(updates)
    )
    both.join(newcomer, stats)
    os.kill(servers[1].process_id, signal.SIGKILL)
    updates = train(both, fence, updates, lambda steps: steps > 1000)
    assert both.is_away(1) and both.away == 1 and servers[1].url in both.trouble
    assert both.shards[1]["away"] and not both.shards[0]["away"]
    wait_for(lambda: not servers[1].running)
    servers[1].start()
    second = writing(2, 1)
    updates = train(both, fence, updates, lambda _: inserted(servers)[1] > 200)
    assert both.trouble == "" and sum(inserted(servers)) <= LIMITER.budget(updates)
    everything = Writing(
        first.uploaders + second.uploaders,
        first.homes + second.homes,
        first.stop,
        first.threads + second.threads,
    )
    check_all(servers, everything)
    both.close()


def test_a_server_that_cannot_join_is_named_and_left_as_it_is(
    servers: list[EmbeddedServer],
) -> None:
    there = ReplayClient(servers[0].url, owner="1a /runs/ours on here")
    newcomer = ReplayClient(servers[1].url, owner="1a /runs/ours on here")
    there.create(SCHEMA, LIMITS)
    fence = there.acquire_fence(7)
    before = there.counters()

    def refused(kind: type[Exception], words: str, client: ReplayClient = newcomer) -> None:
        with pytest.raises(kind, match=words):
            prepare_shard(client, [there], SCHEMA, LIMITS, fence=fence)
        assert there.counters() == before

    nowhere = ReplayClient("unix:///nowhere/redis.sock")
    refused(ReplayUnavailable, "nowhere/redis.sock", nowhere)
    twin = ReplayClient(servers[0].url + "?db=0")
    refused(ReplayConfigError, "are the same server", twin)
    stranger = ReplayClient(servers[1].url, owner="2b /runs/theirs on there")
    stranger.create(SCHEMA, LIMITS)
    refused(ReplayOwned, "holds the replay of another run, /runs/theirs on there: give a server")
    assert stranger.stats().min_size_steps == LIMITS.min_size_steps
    with redis.Redis.from_url(servers[1].url) as admin:
        admin.flushall()
    other = Schema(SCHEMA.columns[1:])
    newcomer.create(other, LIMITS)
    refused(ReplaySchemaError, "holds other columns than this program: .*image")
    with redis.Redis.from_url(servers[1].url) as admin:
        admin.flushall()
    newcomer.create(SCHEMA, LIMITS)
    insert_many(newcomer, 0, 2)
    refused(ReplayConfigError, "holds a replay of 16 inserted steps already")
    with redis.Redis.from_url(servers[1].url) as admin:
        admin.flushall()
    newcomer.create(SCHEMA, LIMITS)
    newcomer.acquire_fence(fence + 5)
    refused(ReplayFenced, f"a learner with fence {fence + 5} has prepared")
    with redis.Redis.from_url(servers[1].url) as admin:
        admin.flushall()
    with redis.Redis.from_url(servers[1].url) as admin:
        admin.config_set("requirepass", "word")
        refused(ReplayAuthError, "refuses connections without credentials")
        admin.config_set("requirepass", "")
    # One that was prepared before, by a learner that ended or was not heard, is as good as new.
    for _ in range(2):
        stats = prepare_shard(newcomer, [there], SCHEMA, LIMITS, fence=fence)
        assert stats.fence == fence and stats.inserted_steps == 0
    with redis.Redis.from_url(servers[0].url) as admin:
        admin.flushall()
    with pytest.raises(ReplayMissing, match=servers[0].url):
        prepare_shard(newcomer, [there], SCHEMA, LIMITS, fence=fence)
    for client in (there, newcomer, nowhere, twin, stranger):
        client.close()


def test_a_stream_that_moves_to_a_newcomer_gets_an_incarnation_it_never_had(
    servers: list[EmbeddedServer],
) -> None:
    there, newcomer = (ReplayClient(server.url) for server in servers)
    there.create(SCHEMA, LIMITS)
    fence = there.acquire_fence()
    lives = [there.open_stream("s0") for _ in range(3)]
    prepare_shard(newcomer, [there], SCHEMA, LIMITS, fence=fence)
    # Whoever has not heard of the newcomer yet may begin a few more where the stream was.
    lives += [there.open_stream("s0") for _ in range(100)]
    moved = [newcomer.open_stream("s0") for _ in range(100)]
    assert min(moved) > max(lives)
    there.close()
    newcomer.close()


def test_a_client_of_one_server_stays_what_it_was_if_the_server_is_away(
    servers: list[EmbeddedServer],
) -> None:
    alone = ReplayClient(servers[0].url, timeout_s=0.5)
    alone.create(SCHEMA, LIMITS)
    alone.acquire_fence()
    os.kill(servers[0].process_id, signal.SIGSTOP)
    try:
        with pytest.raises(ReplayUnavailable):
            ShardedClient.of_one(alone, SCHEMA, LIMITS, chunk_steps=CHUNK, total=100)
    finally:
        os.kill(servers[0].process_id, signal.SIGCONT)
    assert alone.stats().min_size_steps == LIMITS.min_size_steps
    alone.close()
