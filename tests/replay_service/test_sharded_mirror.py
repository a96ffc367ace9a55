"""One mirror of a replay on two servers: filled by both logs, and one of them put back from it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis

from replay_service import (
    EmbeddedServer,
    Limits,
    Mirror,
    ReplayClient,
    ReplayMissing,
    ReplayTimeout,
    ReplayUnavailable,
    Reseeder,
    ShardedClient,
    ShardedReseeder,
    check_server,
    continue_account,
)
from tests.replay_service.records import SCHEMA, absorb_until, chunk, contents, insert, insert_many

LIMITS = Limits(capacity_steps=10**6, capacity_bytes=2**27, min_size_steps=8)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[EmbeddedServer]]:
    with ExitStack() as stack:
        directories: list[Path] = [tmp_path_factory.mktemp(f"shard{at}") for at in range(2)]
        yield [
            stack.enter_context(EmbeddedServer(one, max_memory_bytes=2**28)) for one in directories
        ]


@pytest.fixture
def client(pair: list[EmbeddedServer]) -> Iterator[ShardedClient]:
    """A client of two servers with an empty replay, in charge of it."""
    for server in pair:
        empty(server)
    made = ShardedClient([ReplayClient(server.url) for server in pair], chunk_steps=8)
    made.create(SCHEMA, LIMITS)
    made.settle(made.acquire_fence(), 0, 10**6)
    made.settle(1, 0, 10**6)
    yield made
    made.close()


def empty(server: EmbeddedServer) -> None:
    with redis.Redis.from_url(server.url) as admin:
        admin.flushall()


@contextmanager
def following(client: ShardedClient, **options: Any) -> Iterator[Mirror]:
    options = {"capacity_steps": 10_000, "window_steps": 8, "page_steps": 8} | options
    mirror = Mirror(client.clients, SCHEMA, **options)
    mirror.start()
    yield mirror
    mirror.stop()


def test_mirror_holds_what_both_logs_hold(client: ShardedClient) -> None:
    insert_many(client.clients[0], 0, 5)
    with following(client) as mirror:
        for _ in mirror.rebuild():
            pass
        assert mirror.size_steps == 40
        insert_many(client.clients[1], 1, 7)
        insert_many(client.clients[0], 2, 3)
        absorb_until(mirror, lambda: mirror.inserted_steps == 120)
        held = contents(mirror)
        assert mirror.missed_steps == 0 and len(held) == 120 == mirror.size_steps
        assert {slot for slot, _ in held} == {0, 1, 2}
        assert mirror.of(0).inserted_steps == 64 and mirror.of(1).inserted_steps == 56
        assert [one.stream for one in mirror.of(1).held_chunks()] == ["s1"] * 7
        assert mirror.of(0).newest_chunks() == {"s0@1": 5, "s2@1": 3}
    # A restarted learner finds all of it.
    with following(client) as again:
        for _ in again.rebuild():
            pass
        assert contents(again) == held and again.rebuild_share == 1.0


def test_windows_are_drawn_from_both_in_proportion(client: ShardedClient) -> None:
    insert_many(client.clients[0], 0, 30)
    insert_many(client.clients[1], 1, 10)
    with following(client, online=False) as mirror:
        for _ in mirror.rebuild():
            pass
        total = mirror.valid_starts
        uniforms, _ = mirror.draw(0, 0, 4000)
        starts = (uniforms * total).astype(int)
        rows = mirror.columns["slot"].numpy()
        cumulative = mirror.valid_cumsum.numpy()
        pages = cumulative.searchsorted(starts, side="right")
        share = (rows[pages * mirror.page_steps] == 1).mean()
        # 73 of 306 starts; four standard deviations of 4000 draws are 0.027.
        assert abs(share - 73 / (73 + 233)) < 0.03


def test_capacity_is_shared_and_the_oldest_arrivals_go_first(client: ShardedClient) -> None:
    with following(client, capacity_steps=160) as mirror:
        insert_many(client.clients[0], 0, 10)
        absorb_until(mirror, lambda: mirror.inserted_steps == 80)
        insert_many(client.clients[1], 1, 15)
        absorb_until(mirror, lambda: mirror.inserted_steps == 200)
        held = contents(mirror)
        assert {step for slot, step in held if slot == 1} == set(range(120))
        assert {step for slot, step in held if slot == 0} == set(range(40, 80))


def test_one_log_is_away_and_the_other_goes_on(
    client: ShardedClient, pair: list[EmbeddedServer]
) -> None:
    insert_many(client.clients[1], 1, 2)
    with following(client) as mirror:
        absorb_until(mirror, lambda: mirror.inserted_steps == 16)
        pair[1].stop()
        try:
            insert_many(client.clients[0], 0, 4)
            absorb_until(mirror, lambda: mirror.inserted_steps == 48)
            absorb_until(mirror, lambda: pair[1].url in mirror.trouble)
        finally:
            pair[1].start()
        insert_many(client.clients[1], 1, 2, start=3)
        absorb_until(mirror, lambda: mirror.inserted_steps == 64)
        assert mirror.trouble == "" and mirror.missed_steps == 0


def test_rebuilding_names_a_log_that_sends_nothing(
    client: ShardedClient, pair: list[EmbeddedServer]
) -> None:
    insert_many(client.clients[0], 0, 2)
    insert_many(client.clients[1], 1, 300)
    with following(client, queue_bytes=2 * 16 * SCHEMA.step_bytes) as mirror:
        assert mirror.wait(5)
        pair[1].stop()
        try:
            with pytest.raises(ReplayTimeout, match="sent nothing for 1 s"):
                for _ in mirror.rebuild(patience_s=1.0):
                    pass
        finally:
            pair[1].start()


def test_a_shard_that_lost_everything_gets_its_own_back(
    client: ShardedClient, pair: list[EmbeddedServer]
) -> None:
    fence = client.clients[0].stats().fence
    with following(client) as mirror:
        reseeder = ShardedReseeder(
            client,
            [
                Reseeder(
                    one,
                    lambda url=one.url: ReplayClient(url),
                    mirror.of(at),
                    LIMITS,
                    fence=fence,
                )
                for at, one in enumerate(client.clients)
            ],
        )
        insert_many(client.clients[0], 0, 6)
        insert_many(client.clients[1], 1, 9)
        absorb_until(mirror, lambda: mirror.inserted_steps == 120)
        before, held = client.clients[0].stats(), contents(mirror)
        client.settle(fence, 10, 500)
        empty(pair[1])
        with pytest.raises(ReplayMissing, match=pair[1].url):
            for _ in range(100):
                client.settle(fence, 20, 500)
        assert client.lost() == [1]
        reseeder.run(20, 500)
        assert reseeder.losses == 1 and not reseeder.replaced() and reseeder.progress == ""
        client.settle(fence, 20, 500)
        assert client.lost() == [] and client.trouble == ""
        assert client.clients[1].stats().inserted_steps == 72
        assert client.clients[0].stats().born == before.born
        assert client.stats().budget_steps <= 500
        # The stream goes on behind its last chunk, and the mirror follows.
        assert insert(client.clients[1], chunk(1, 10)) == "OK"
        absorb_until(mirror, lambda: mirror.inserted_steps == 128)
        assert contents(mirror).items() >= held.items() and mirror.missed_steps == 0
    for server in pair:
        report = check_server(ReplayClient(server.url))
        assert not report.findings.found, report


def test_an_account_goes_on_in_the_shard_that_is_empty(client: ShardedClient) -> None:
    insert_many(client.clients[0], 0, 6)
    fence = client.clients[0].stats().fence
    with following(client) as mirror:
        absorb_until(mirror, lambda: mirror.inserted_steps == 48)
        continue_account(
            client, mirror, fence=fence, inserted_steps=100, replayed_steps=50, budget_steps=200
        )
        assert mirror.inserted_steps == 100 and client.stats().inserted_steps == 100
        assert client.settle(fence, 50, 200)[0] == 100 and client.stats().budget_steps <= 200
        assert client.empty() == [1]


def test_a_log_that_joins_is_followed_and_one_that_cannot_changes_nothing(
    pair: list[EmbeddedServer],
) -> None:
    for server in pair:
        empty(server)
    first, second = clients = [ReplayClient(server.url) for server in pair]
    for one in clients:
        one.create(SCHEMA, LIMITS)
    mirror = Mirror(first, SCHEMA, capacity_steps=10_000, window_steps=8, page_steps=8)
    mirror.start()
    insert_many(first, 0, 5)
    absorb_until(mirror, lambda: mirror.inserted_steps == 40)
    nowhere = ReplayClient("unix:///nowhere/redis.sock")
    with pytest.raises(ReplayUnavailable):
        mirror.follow([second, nowhere])
    mirror.follow([second])
    insert_many(second, 1, 7)
    insert_many(first, 0, 2, start=6)
    absorb_until(mirror, lambda: mirror.inserted_steps == 112)
    assert mirror.of(1).inserted_steps == 56 and mirror.of(1).newest_chunks() == {"s1@1": 7}
    assert len(contents(mirror)) == 112 == mirror.size_steps and mirror.missed_steps == 0
    # What comes from the log that joined is new, and trained on first, as what comes from others.
    assert mirror.caught_up and len(mirror.online_state()) == 14
    mirror.stop()
    for one in (*clients, nowhere):
        one.close()
