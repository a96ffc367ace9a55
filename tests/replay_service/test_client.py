from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import redis

from replay_service import (
    Column,
    EmbeddedServer,
    Limits,
    ReplayAuthError,
    ReplayClient,
    ReplayConfigError,
    ReplayError,
    ReplayFenced,
    ReplayFull,
    ReplayOwned,
    ReplaySchemaError,
    ReplayTimeout,
    ReplayUnavailable,
    Schema,
    encode_chunk,
)
from replay_service.client import INLINE_BYTES
from tests.replay_service.records import (
    SCHEMA,
    UNBOUNDED,
    chunk,
    insert,
    insert_many,
    renamed,
)


def limits(**changes: int) -> Limits:
    return replace(UNBOUNDED, **changes)


def test_create_is_idempotent_and_keeps_what_is_there(client: ReplayClient) -> None:
    assert client.create(SCHEMA, UNBOUNDED)
    insert_many(client, 0, 3)
    epoch = client.stats().epoch
    assert not client.create(SCHEMA, limits(capacity_steps=100))
    after = client.stats()
    assert (after.inserted_steps, after.capacity_steps, after.epoch) == (24, 100, epoch)
    assert client.schema() == SCHEMA


def test_create_with_other_columns_names_the_difference(client: ReplayClient) -> None:
    client.create(SCHEMA, UNBOUNDED)
    other = Schema((*SCHEMA.columns[:-1], Column("vector2", "float32", (2,))))
    want = r"step: int64\[\] is missing; vector2: float32\[2\] is extra"
    with pytest.raises(ReplaySchemaError, match=want):
        client.create(other, UNBOUNDED)


def test_a_replay_without_an_owner_is_anybodys_and_one_with_an_owner_is_kept(
    client: ReplayClient,
) -> None:
    ann = ReplayClient(client.url, owner="1a /runs/ann on here")
    bob = ReplayClient(client.url, owner="2b /runs/bob on there")
    assert client.create(SCHEMA, UNBOUNDED)
    # Who brings no mark, such as an import, takes part; the first who does becomes the owner.
    assert not ann.create(SCHEMA, UNBOUNDED)
    with pytest.raises(ReplayOwned, match="belongs to another run, /runs/ann on here:"):
        bob.create(SCHEMA, replace(UNBOUNDED, capacity_steps=10))
    assert client.stats().capacity_steps == UNBOUNDED.capacity_steps
    assert not client.create(SCHEMA, UNBOUNDED) and not ann.create(SCHEMA, UNBOUNDED)
    assert not bob.create(SCHEMA, UNBOUNDED, take_over=True)
    with pytest.raises(ReplayOwned, match="/runs/bob on there"):
        ann.create(SCHEMA, UNBOUNDED)
    ann.close()
    bob.close()


def test_nothing_works_before_create_and_says_so(client: ReplayClient) -> None:
    calls: list[Callable[[], object]] = [client.schema, client.acquire_fence, client.stats]
    for call in calls:
        with pytest.raises(ReplayUnavailable, match="no replay has been created"):
            call()


def test_insert_replies(client: ReplayClient) -> None:
    client.create(SCHEMA, limits(capacity_steps=64, max_chunk_steps=16))
    other = Schema(SCHEMA.columns[:-1])
    made = chunk(0, 1)
    assert insert(client, made) == "OK"
    assert insert(client, made) == "DUP"
    assert insert(client, chunk(0, 3)) == "GAP"
    assert insert(client, chunk(0, 2, 17)) == "TOOBIG"
    cols = {k: v for k, v in made.columns.items() if k != "step"}
    assert insert(client, renamed(made, columns=cols), other) == "SCHEMA"
    blob = encode_chunk(chunk(0, 2), SCHEMA)
    assert client.insert(SCHEMA, "s0@1", 2, 8, blob, send=False).code == "NOPAYLOAD"
    assert client.stats().inserted_steps == 8


def test_foreign_orphan_under_the_same_key_is_replaced(
    client: ReplayClient, server: EmbeddedServer
) -> None:
    client.create(SCHEMA, UNBOUNDED)
    with redis.Redis.from_url(server.url) as admin:
        admin.set(client.payload_key("s0@1", 1), b"left behind", ex=600)
        # One that travels inside the call takes its place.
        assert insert(client, chunk(0, 1)) == "OK"
        admin.set(client.payload_key("s0@1", 2), b"left behind", ex=600)
        # One that was sent before does not, and has to be sent again.
        assert client.insert(SCHEMA, "s0@1", 2, 8, b"x", send=False).code == "NOPAYLOAD"
        assert not admin.exists(client.payload_key("s0@1", 2))
        large = encode_chunk(chunk(0, 2, steps=400), SCHEMA, "raw")
        assert len(large) > INLINE_BYTES
        admin.set(client.payload_key("s0@1", 2), b"left behind", ex=600)
        assert client.insert(SCHEMA, "s0@1", 2, 400, large).code == "NOPAYLOAD"
        assert client.insert(SCHEMA, "s0@1", 2, 400, large).code == "OK"
        assert admin.ttl(client.payload_key("s0@1", 2)) == -1


@pytest.mark.parametrize("steps", [8, 400])
def test_the_server_works_on_an_insert_while_the_caller_does_something_else(
    client: ReplayClient, server: EmbeddedServer, steps: int
) -> None:
    client.create(SCHEMA, UNBOUNDED)
    seen: list[int] = []

    def look() -> None:
        until = time.monotonic() + 10.0
        with closing(ReplayClient(server.url)) as other:
            while not (inserted := other.stats().inserted_steps) and time.monotonic() < until:
                pass
        seen.append(inserted)

    blob = encode_chunk(chunk(0, 1, steps=steps), SCHEMA, "raw")
    assert client.insert(SCHEMA, "s0@1", 1, steps, blob, meanwhile=look).code == "OK"
    assert seen == [steps]


def test_a_payload_of_another_length_than_announced_is_not_kept(client: ReplayClient) -> None:
    client.create(SCHEMA, UNBOUNDED)
    keys = ["{rp0}:meta", "{rp0}:log", "{rp0}:seq", client.payload_key("s0@1", 1)]
    words = (SCHEMA.hash.hex(), "s0@1", "1", "8", "99", "", b"short")
    assert client._fcall("replay_insert", keys, *words) == [b"NOPAYLOAD"]
    assert client.stats().committed_chunks == 0 and not client._command("EXISTS", keys[-1])


def test_committed_payload_never_expires_even_after_a_resend(
    client: ReplayClient, server: EmbeddedServer
) -> None:
    client.create(SCHEMA, UNBOUNDED)
    insert_many(client, 0, 1)
    assert insert(client, chunk(0, 1)) == "DUP"
    with redis.Redis.from_url(server.url) as admin:
        assert admin.ttl(client.payload_key("s0@1", 1)) == -1


def test_capacity_in_steps_is_exact_and_evicts_the_oldest(
    client: ReplayClient, server: EmbeddedServer
) -> None:
    client.create(SCHEMA, limits(capacity_steps=80))
    insert_many(client, 0, 40)
    got = client.stats()
    assert (got.size_steps, got.chunks, got.inserted_steps) == (80, 10, 320)
    assert got.evicted_steps == 240 and got.committed_chunks == 40
    entries = client.read_log("0", 100, 0.1)
    assert [entry.seq for entry in entries] == list(range(31, 41))
    assert sum(entry.size_bytes for entry in entries) == got.size_bytes
    with redis.Redis.from_url(server.url) as admin:
        assert len(list(admin.scan_iter("*:c:*"))) == 10


def test_capacity_in_bytes_is_kept(client: ReplayClient) -> None:
    size = len(encode_chunk(chunk(0, 1), SCHEMA))
    client.create(SCHEMA, limits(capacity_bytes=int(size * 5.5)))
    insert_many(client, 0, 30)
    got = client.stats()
    assert got.chunks == 5 and got.size_bytes <= size * 5.5


def test_large_chunk_displaces_as_many_small_ones_as_it_needs(client: ReplayClient) -> None:
    client.create(SCHEMA, limits(capacity_steps=64))
    for slot in range(64):
        assert insert(client, chunk(slot, 1, 1)) == "OK"
    assert insert(client, chunk(99, 1, 40)) == "OK"
    assert client.stats().size_steps == 64


def test_lowered_capacity_is_reached_in_bounded_steps(client: ReplayClient) -> None:
    client.create(SCHEMA, UNBOUNDED)
    insert_many(client, 0, 40)
    client.create(SCHEMA, limits(capacity_steps=40))
    insert_many(client, 0, 1, start=41)
    assert client.stats().chunks == 40 + 1 - 8
    insert_many(client, 0, 5, start=42)
    assert client.stats().size_steps == 40
    assert client.evict(16, 2**40) == 24


def test_closed_stream_is_forgotten_with_its_last_chunk(
    client: ReplayClient, server: EmbeddedServer
) -> None:
    client.create(SCHEMA, limits(capacity_steps=16))
    insert_many(client, 0, 2)
    client.close_stream("s0@1", 2)
    insert_many(client, 1, 2)
    client.close_stream("s0@1", 2)
    with redis.Redis.from_url(server.url) as admin:
        assert set(admin.hkeys("{rp0}:seq")) == {b"s1@1"}


def test_stream_closed_after_its_eviction_is_forgotten_at_once(
    client: ReplayClient, server: EmbeddedServer
) -> None:
    client.create(SCHEMA, limits(capacity_steps=16))
    insert_many(client, 0, 2)
    insert_many(client, 1, 2)
    client.close_stream("s0@1", 2)
    with redis.Redis.from_url(server.url) as admin:
        assert set(admin.hkeys("{rp0}:seq")) == {b"s1@1"}


@pytest.mark.parametrize("reply_lost", [True, False])
def test_evicted_chunk_that_was_sent_again_keeps_no_ended_stream(
    client: ReplayClient, server: EmbeddedServer, reply_lost: bool
) -> None:
    client.create(SCHEMA, limits(capacity_steps=400))
    assert client.open_stream("s0") == 1
    large = encode_chunk(chunk(0, 1, steps=400), SCHEMA, "raw")
    assert client.insert(SCHEMA, "s0@1", 1, 400, large).code == "OK"
    assert insert(client, chunk(1, 1)) == "OK"
    key = client.payload_key("s0@1", 1)
    with redis.Redis.from_url(server.url) as admin:
        assert not admin.exists(key)
        if reply_lost:
            assert client.insert(SCHEMA, "s0@1", 1, 400, large).code == "DUP"
            assert admin.ttl(key) > 0
            client.close_stream("s0@1", 1)
        else:
            # Its writer died between the two commands, and has a successor.
            admin.set(key, large, ex=600, nx=True)
            assert client.open_stream("s0") == 2
        assert set(admin.hkeys("{rp0}:seq")) == {b"s1@1"} and not admin.exists(key)


def test_stream_whose_writer_died_is_forgotten_once_it_was_evicted(
    client: ReplayClient, server: EmbeddedServer
) -> None:
    client.create(SCHEMA, limits(capacity_steps=16))
    for life in range(1, 6):
        assert client.open_stream("s0") == life
        for seq in (1, 2):
            assert insert(client, chunk(0, seq, incarnation=life)) == "OK"
        insert_many(client, 1, 2, start=2 * life - 1)
    with redis.Redis.from_url(server.url) as admin:
        assert set(admin.hkeys("{rp0}:seq")) == {b"s0@5", b"s1@1"}


def test_replaced_writer_that_comes_back_leaves_nothing_behind(
    client: ReplayClient, server: EmbeddedServer
) -> None:
    client.create(SCHEMA, limits(capacity_steps=16))
    assert client.open_stream("s0") == 1
    assert insert(client, chunk(0, 1)) == "OK"
    assert client.open_stream("s0") == 2
    assert insert(client, chunk(0, 2)) == "OK"
    insert_many(client, 1, 2)
    with redis.Redis.from_url(server.url) as admin:
        assert set(admin.hkeys("{rp0}:seq")) == {b"s1@1"}


def test_log_of_an_emptied_server_continues_above_the_old_one(
    client: ReplayClient, server: EmbeddedServer
) -> None:
    newest = ""
    with redis.Redis.from_url(server.url) as admin:
        for _ in range(20):
            client.create(SCHEMA, UNBOUNDED)
            insert_many(client, 0, 2)
            # What follows the log would otherwise never see the new chunks.
            assert len(client.read_log(newest or "0", 9, 0.01)) == 2
            newest = client.last_log_id() or ""
            admin.flushall()


def test_incarnation_that_a_power_cut_took_from_the_log_is_not_given_out_again(
    client: ReplayClient, server: EmbeddedServer
) -> None:
    client.create(SCHEMA, UNBOUNDED)
    assert client.open_stream("s0", at_least=7) == 7
    with redis.Redis.from_url(server.url) as admin:
        admin.hdel("{rp0}:meta", "incarnation:s0")
    assert insert(client, chunk(0, 1, incarnation=7)) == "OK"
    assert client.open_stream("s0") == 8


def test_learner_whose_fence_a_power_cut_took_from_the_log_stays_in_charge(
    client: ReplayClient, server: EmbeddedServer
) -> None:
    client.create(SCHEMA, UNBOUNDED)
    older, newer = client.acquire_fence(), client.acquire_fence()
    with redis.Redis.from_url(server.url) as admin:
        admin.hset("{rp0}:meta", "fence", older)
    client.settle(newer, 10, 10)
    with pytest.raises(ReplayFenced):
        client.settle(older, 20, 20)
    assert client.acquire_fence() == newer + 1


def test_incarnations_never_repeat(client: ReplayClient) -> None:
    client.create(SCHEMA, UNBOUNDED)
    assert [client.open_stream("a") for _ in range(3)] == [1, 2, 3]
    assert client.open_stream("a", 10) == 10
    assert client.open_stream("b") == 1


def test_admission_below_the_minimum_and_within_the_budget(client: ReplayClient) -> None:
    client.create(SCHEMA, limits(min_size_steps=16, budget_steps=24))
    insert_many(client, 0, 3)
    assert client.stats().insert_credit_steps == 0
    assert insert(client, chunk(0, 4)) == "WAIT"
    fence = client.acquire_fence()
    assert client.settle(fence, 100, 32) == (24, 24)
    assert insert(client, chunk(0, 4)) == "OK"


def test_settlement_wakes_those_who_wait(client: ReplayClient) -> None:
    client.create(SCHEMA, limits(min_size_steps=8, budget_steps=8))
    insert_many(client, 0, 1)
    blob = encode_chunk(chunk(0, 2), SCHEMA)
    reply = client.insert(SCHEMA, "s0@1", 2, 8, blob)
    wake = reply.values[2].decode()
    assert not client.wait_settlement(wake, 0.05)
    fence = client.acquire_fence()
    timer = threading.Timer(0.1, lambda: client.settle(fence, 8, 16))
    timer.start()
    assert client.wait_settlement(wake, 2.0)
    timer.join()


def test_settlements_only_move_forward_within_a_fence(client: ReplayClient) -> None:
    client.create(SCHEMA, UNBOUNDED)
    first = client.acquire_fence()
    client.settle(first, 100, 50)
    client.settle(first, 90, 40)
    assert (client.stats().replayed_steps, client.stats().budget_steps) == (100, 50)
    second = client.acquire_fence()
    with pytest.raises(ReplayFenced, match=f"fence {first} was replaced by {second}"):
        client.settle(first, 200, 99)
    client.settle(second, 30, 20)
    assert (client.stats().replayed_steps, client.stats().budget_steps) == (30, 20)


def test_full_server_refuses_and_recovers_without_restart(
    client: ReplayClient, server: EmbeddedServer
) -> None:
    client.create(SCHEMA, UNBOUNDED)
    insert_many(client, 0, 2)
    fence = client.acquire_fence()
    with redis.Redis.from_url(server.url) as admin:
        admin.config_set("maxmemory", 1)
        try:
            with pytest.raises(ReplayFull, match="memory limit"):
                insert(client, chunk(0, 3))
            client.settle(fence, 1, 1000)
            assert client.evict(8, 2**40) == 8
        finally:
            admin.config_set("maxmemory", 2**28)
    assert insert(client, chunk(0, 3)) == "OK"


@contextmanager
def fake_server(answer: bytes | None) -> Iterator[str]:
    """Listen on a port, and answer everything with the same bytes, or with silence."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        connections: list[socket.socket] = []

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                    connections.append(connection)
                    while answer is not None and connection.recv(4096):
                        connection.sendall(answer)
                except OSError:
                    return

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield f"redis://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            for connection in connections:
                connection.close()
    thread.join(5)


def info(version: str) -> bytes:
    body = f"# Server\r\nredis_version:{version}\r\n".encode()
    return b"$%d\r\n%s\r\n" % (len(body), body)


@pytest.mark.parametrize(
    ("answer", "kind", "want"),
    [
        (None, ReplayTimeout, "did not answer in time"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", ReplayConfigError, "does not speak"),
        (info("6.2.14"), ReplayConfigError, "version 6.2.14; replay needs Redis 7.0"),
        (b"-NOAUTH Authentication required.\r\n", ReplayAuthError, "credentials"),
        (b"-LOADING Redis is loading\r\n", ReplayUnavailable, "loading"),
    ],
)
def test_wrong_server_is_one_clear_error_in_time(
    answer: bytes | None, kind: type[ReplayError], want: str
) -> None:
    with fake_server(answer) as url:
        started = time.monotonic()
        with pytest.raises(kind, match=want):
            ReplayClient(url, timeout_s=2.0).create(SCHEMA, UNBOUNDED)
        assert time.monotonic() - started < 2.2


def test_dead_server_is_one_clear_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(ReplayUnavailable, match=f"127.0.0.1:{port}"):
        ReplayClient(f"redis://127.0.0.1:{port}").check()
    with pytest.raises(ReplayUnavailable):
        ReplayClient("unix:///nonexistent/redis.sock").check()


def test_address_that_is_none_is_refused() -> None:
    with pytest.raises(ReplayConfigError, match="is not an address"):
        ReplayClient("localhost:6379")


def test_wrong_password_is_an_error_without_the_password(tmp_path: Path) -> None:
    with EmbeddedServer(tmp_path, max_memory_bytes=2**26) as guarded:
        with redis.Redis.from_url(guarded.url) as admin:
            admin.config_set("requirepass", "right")
        url = guarded.url.replace("unix://", "unix://:hunter2@")
        for address in (guarded.url, url):
            client = ReplayClient(address)
            with pytest.raises(ReplayAuthError, match="check user and password") as caught:
                client.check()
            assert "hunter2" not in f"{caught.value} {client!r}"
            client.close()
        right = ReplayClient(guarded.url.replace("unix://", "unix://:right@"))
        assert right.check()
        right.close()
