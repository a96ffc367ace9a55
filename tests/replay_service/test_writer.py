from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import redis

from benchmarks.faults.proxy import FaultProxy
from replay_service import (
    EmbeddedServer,
    EpisodeSummary,
    Limits,
    ReplayClient,
    ReplayClosed,
    ReplayConfig,
    ReplaySchemaError,
    ReplayTimeout,
    Schema,
    Uploader,
    decode_chunk,
)
from replay_service.chunk import Chunk
from tests.replay_service.records import SCHEMA, UNBOUNDED, record, write

CONFIG = ReplayConfig(chunk_steps=8, redis_memory_bytes=2**28)


def committed(client: ReplayClient) -> list[Chunk]:
    """Return every chunk in the log, in its order."""
    entries = client.read_log("0", 10**6, 0.1)
    blobs = client.fetch(entries) if entries else []
    return [decode_chunk(blob, SCHEMA) for blob in blobs if blob is not None]


def steps_of(chunks: list[Chunk], slot: int) -> list[int]:
    return [int(s) for c in chunks if c.stream == f"s{slot}" for s in c.columns["step"]]


@pytest.fixture
def uploader(client: ReplayClient) -> Iterator[Uploader]:
    client.create(SCHEMA, UNBOUNDED)
    made = Uploader(client, SCHEMA, CONFIG)
    yield made
    made.close(0.0)


def test_records_arrive_complete_and_in_order(client: ReplayClient, uploader: Uploader) -> None:
    writers = [uploader.open_stream(f"s{slot}") for slot in range(3)]
    for start in range(0, 100, 20):
        for slot, writer in enumerate(writers):
            write(writer, slot, start, start + 20)
    for writer in writers:
        writer.close()
    assert uploader.drain(10)
    chunks = committed(client)
    for slot in range(3):
        assert steps_of(chunks, slot) == list(range(100))
        mine = [c for c in chunks if c.stream == f"s{slot}"]
        assert [c.seq for c in mine] == list(range(1, 14))
        assert [c.first_step for c in mine] == list(range(0, 100, 8))
    np.testing.assert_array_equal(chunks[0].columns["vector"][3], record(0, 3)["vector"])
    assert uploader.stats.steps == 300 and uploader.stats.replies == {"OK": 39}


def test_versions_and_episodes_travel_with_their_chunk(
    client: ReplayClient, uploader: Uploader
) -> None:
    writer = uploader.open_stream("s0")
    write(writer, 0, 0, 22, episode=10)
    writer.append(record(0, 0), (1, 22))
    writer.close()
    uploader.drain(10)
    chunks = committed(client)
    assert [(c.version_min, c.version_max) for c in chunks] == [
        ((1, 0), (1, 7)),
        ((1, 8), (1, 15)),
        ((1, 16), (1, 22)),
    ]
    assert [c.episodes for c in chunks] == [
        (),
        (EpisodeSummary(9.0, 9, "terminated"),),
        (
            EpisodeSummary(9.0, 9, "truncated"),
            EpisodeSummary(1.0, 1, "abandoned"),
            EpisodeSummary(0.0, 0, "abandoned"),
        ),
    ]


def test_old_records_are_sent_although_the_chunk_is_not_full(client: ReplayClient) -> None:
    client.create(SCHEMA, UNBOUNDED)
    with Uploader(client, SCHEMA, replace(CONFIG, flush_age_s=1e-9)) as uploader:
        write(uploader.open_stream("s0"), 0, 0, 3)
        assert uploader.drain(10)
    assert [c.steps for c in committed(client)] == [1, 1, 1]


@pytest.mark.parametrize(
    ("change", "want"),
    [
        ({"reward": 1.0}, "'reward' must be a numpy value of float32"),
        ({"reward": np.float64(1)}, r"got float64 float64\[\]"),
        ({"reward": np.float32("nan")}, "'reward' holds values that are not finite"),
        ({"vector": np.full(3, np.inf, np.float32)}, "'vector' holds values that are not finite"),
        ({"vector": np.zeros(4, np.float32)}, r"must be a numpy value of float32\[3\]"),
        ({"extra": np.int32(1)}, r"extra \['extra'\], missing \[\]"),
        ({"is_first": np.bool_(False)}, "must start with a record whose is_first"),
    ],
)
def test_bad_record_is_refused_and_leaves_no_trace(
    client: ReplayClient, uploader: Uploader, change: dict, want: str
) -> None:
    writer = uploader.open_stream("s0")
    with pytest.raises(ReplaySchemaError, match=want):
        writer.append({**record(0, 0), **change})
    write(writer, 0, 0, 8)
    uploader.drain(10)
    assert steps_of(committed(client), 0) == list(range(8))


def test_missing_column_is_named(uploader: Uploader) -> None:
    whole = record(0, 0)
    del whole["action"]
    with pytest.raises(ReplaySchemaError, match=r"missing \['action'\]"):
        uploader.open_stream("s0").append(whole)


def test_stream_name_is_checked(uploader: Uploader) -> None:
    for name in ("", "a\nb", "x" * 300):
        with pytest.raises(ReplaySchemaError, match="a stream needs a printable name"):
            uploader.open_stream(name)


def test_inserts_take_effect_exactly_once_although_replies_are_lost(
    client: ReplayClient, server: EmbeddedServer, tmp_path: Path
) -> None:
    client.create(SCHEMA, UNBOUNDED)
    proxy = FaultProxy(tmp_path / "proxy.sock", server.url)
    proxy.kinds, proxy.rate = frozenset({"lose"}), 0.25
    through = ReplayClient(proxy.url, timeout_s=2.0)
    uploader = Uploader(through, SCHEMA, CONFIG)
    writers = [uploader.open_stream(f"s{slot}", incarnation=1) for slot in range(2)]
    for start in range(0, 400, 8):
        for slot, writer in enumerate(writers):
            write(writer, slot, start, start + 8)
    assert uploader.drain(20)
    proxy.close()
    uploader.close(0.0)
    through.close()
    chunks = committed(client)
    assert proxy.injected["lose"] > 20 and uploader.stats.replies["DUP"] > 0
    for slot in range(2):
        assert steps_of(chunks, slot) == list(range(400))
    assert client.stats().inserted_steps == 800
    assert uploader.stats.steps == 800 and uploader.stats.renewed_streams == 0


def test_writer_waits_for_training_with_a_reason_and_nothing_is_dropped(
    client: ReplayClient,
) -> None:
    client.create(SCHEMA, replace(UNBOUNDED, min_size_steps=16, budget_steps=16))
    with Uploader(client, SCHEMA, CONFIG) as uploader:
        writer = uploader.open_stream("s0")
        thread = threading.Thread(target=write, args=(writer, 0, 0, 80))
        thread.start()
        thread.join(0.5)
        assert thread.is_alive()
        assert uploader.blocked_reason.startswith(
            "inserts wait for training (16 inserted, 16 admitted) for "
        )
        client.settle(client.acquire_fence(), 64, 1000)
        thread.join(10)
        assert not thread.is_alive() and uploader.drain(10)
        assert uploader.blocked_reason == "" and uploader.stats.blocked_s > 0.1
    assert steps_of(committed(client), 0) == list(range(80))


def test_trying_again_in_vain_is_part_of_a_wait_for_training(client: ReplayClient) -> None:
    client.create(SCHEMA, replace(UNBOUNDED, budget_steps=8))
    fence, pause = client.acquire_fence(), threading.Event()
    with Uploader(ReplayClient(client.url), SCHEMA, CONFIG) as uploader:
        thread = threading.Thread(target=write, args=(uploader.open_stream("s0"), 0, 0, 64))
        thread.start()
        # Settlements that pay for nothing: each of them wakes the uploader.
        while uploader.waited()[0] < 0.5:
            client.settle(fence, 0, 8)
            pause.wait(0.002)
        blocked, limited = uploader.waited()
        assert 0.8 * blocked < limited <= blocked
        client.settle(fence, 64, 1000)
        thread.join(10)
        assert not thread.is_alive()


def test_waiting_writer_can_be_interrupted(client: ReplayClient) -> None:
    client.create(SCHEMA, replace(UNBOUNDED, budget_steps=0))
    uploader = Uploader(client, SCHEMA, CONFIG)
    writer = uploader.open_stream("s0")
    caught: list[Exception] = []

    def act() -> None:
        try:
            write(writer, 0, 0, 10**6)
        except ReplayClosed as error:
            caught.append(error)

    thread = threading.Thread(target=act)
    thread.start()
    thread.join(0.2)
    uploader.interrupt()
    thread.join(5)
    assert caught
    with pytest.raises(ReplayTimeout, match="chunks were not delivered .* inserts wait"):
        uploader.close(0.3)


def test_interrupted_writer_keeps_its_records_and_can_send_them_later(
    client: ReplayClient,
) -> None:
    client.create(SCHEMA, replace(UNBOUNDED, budget_steps=8))
    uploader = Uploader(client, SCHEMA, CONFIG)
    writer = uploader.open_stream("s0")
    uploader.interrupt()
    with pytest.raises(ReplayClosed):
        write(writer, 0, 0, 100)
    taken = writer.written_steps
    client.settle(client.acquire_fence(), 1, 10**6)
    assert uploader.drain(10)
    writer.close()
    uploader.close()
    assert steps_of(committed(client), 0) == list(range(taken))


def test_other_schema_is_raised_in_the_writer(client: ReplayClient) -> None:
    client.create(SCHEMA, UNBOUNDED)
    fewer = Schema(SCHEMA.columns[1:])
    uploader = Uploader(client, fewer, CONFIG)
    writer = uploader.open_stream("s0")
    rows = [{k: v for k, v in record(0, i).items() if k != "image"} for i in range(1000)]
    with pytest.raises(ReplaySchemaError, match=r"image: uint8\[2, 2, 3\] is missing"):
        for row in rows:
            writer.append(row)
    with pytest.raises(ReplaySchemaError):
        uploader.close()


def test_incarnation_that_somebody_else_used_is_not_mistaken_for_a_resend(
    client: ReplayClient,
) -> None:
    client.create(SCHEMA, UNBOUNDED)
    for _ in range(2):
        with Uploader(client, SCHEMA, CONFIG) as uploader:
            write(uploader.open_stream("s0", incarnation=1), 0, 0, 24)
            assert uploader.drain(10)
    assert uploader.stats.renewed_streams == 1 and uploader.stats.lost_chunks == 0
    assert steps_of(committed(client), 0) == [*range(24), *range(24)]


def forget_tail(server: EmbeddedServer, saved: Path, directory: Path) -> None:
    """Kill the server and bring it back as it was when `saved` was copied."""
    os.kill(server.process_id, signal.SIGKILL)
    server.stop()
    shutil.rmtree(directory / "appendonlydir")
    shutil.copytree(saved, directory / "appendonlydir")
    server.start()


@pytest.mark.parametrize(("ring", "lost"), [(64, 0), (3, 9)])
def test_acknowledged_chunks_that_the_server_lost_are_sent_again(
    tmp_path: Path, ring: int, lost: int
) -> None:
    directory = tmp_path / "server"
    server = EmbeddedServer(directory, max_memory_bytes=2**26)
    server.start()
    client = ReplayClient(server.url)
    client.create(SCHEMA, UNBOUNDED)
    uploader = Uploader(client, SCHEMA, replace(CONFIG, resend_chunks=ring))
    writer = uploader.open_stream("s0")
    write(writer, 0, 0, 40)
    uploader.drain(10)
    server.stop()
    shutil.copytree(directory / "appendonlydir", tmp_path / "saved")
    server.start()
    write(writer, 0, 40, 136)
    assert uploader.drain(10)
    forget_tail(server, tmp_path / "saved", directory)
    assert client.stats().inserted_steps == 40
    write(writer, 0, 136, 200)
    assert uploader.drain(10)
    assert uploader.stats.lost_chunks == lost
    kept = steps_of(committed(client), 0)
    assert kept == [*range(40), *range(40 + 8 * lost, 200)]
    assert uploader.stats.renewed_streams == (1 if lost else 0)
    uploader.close()
    client.close()
    server.stop()


def test_resend_rings_keep_to_their_bytes_and_say_so(
    client: ReplayClient, caplog: pytest.LogCaptureFixture
) -> None:
    client.create(SCHEMA, UNBOUNDED)
    with Uploader(client, SCHEMA, replace(CONFIG, codec="raw")) as plenty:
        write(plenty.open_stream("s0"), 0, 0, 320)
        assert plenty.drain(10)
        whole = plenty.stats.resend_bytes
    assert whole > 32 * 8 * SCHEMA.step_bytes and "resend rings" not in caplog.text
    with Uploader(client, SCHEMA, replace(CONFIG, codec="raw", resend_bytes=whole // 2)) as few:
        writers = [few.open_stream(f"s{slot}") for slot in (1, 2)]
        for slot, writer in enumerate(writers, 1):
            write(writer, slot, 0, 320)
        assert few.drain(10)
        assert whole // 2 * 0.9 < few.stats.resend_bytes <= whole // 2
        said = [r for r in caplog.records if "resend rings" in r.getMessage()]
        assert [r.levelname for r in said] == ["WARNING", "ERROR"]
        assert "raise --replay.resend-bytes" in caplog.text
        for writer in writers:
            writer.close()
        assert few.drain(10) and few.stats.resend_bytes == 0


def test_writer_survives_a_restart_of_the_server(tmp_path: Path) -> None:
    server = EmbeddedServer(tmp_path, max_memory_bytes=2**26)
    server.start()
    client = ReplayClient(server.url)
    client.create(SCHEMA, UNBOUNDED)
    uploader = Uploader(client, SCHEMA, CONFIG)
    writer = uploader.open_stream("s0")
    write(writer, 0, 0, 100)
    os.kill(server.process_id, signal.SIGKILL)
    thread = threading.Thread(target=write, args=(writer, 0, 100, 300))
    thread.start()
    thread.join(0.3)
    assert thread.is_alive() and "cannot be used" in uploader.blocked_reason
    server.stop()
    server.start()
    thread.join(10)
    writer.close()
    uploader.close()
    assert steps_of(committed(client), 0) == list(range(300))
    client.close()
    server.stop()


def test_full_server_makes_writers_wait_and_loses_nothing(
    client: ReplayClient, server: EmbeddedServer, uploader: Uploader
) -> None:
    writer = uploader.open_stream("s0")
    write(writer, 0, 0, 8)
    uploader.drain(10)
    with redis.Redis.from_url(server.url) as admin:
        admin.config_set("maxmemory", 1)
        try:
            write(writer, 0, 8, 16)
            assert not uploader.drain(0.3)
            assert "memory limit" in uploader.blocked_reason
        finally:
            admin.config_set("maxmemory", 2**28)
    assert uploader.drain(10)
    assert steps_of(committed(client), 0) == list(range(16))


def test_many_streams_share_one_uploader_under_eviction(client: ReplayClient) -> None:
    client.create(SCHEMA, Limits(capacity_steps=100, capacity_bytes=2**27))
    with Uploader(client, SCHEMA, CONFIG) as uploader:
        for slot in range(20):
            writer = uploader.open_stream(f"s{slot}")
            write(writer, slot, 0, 21)
            writer.close()
        assert uploader.drain(10)
    assert client.stats().inserted_steps == 420 and client.stats().size_steps <= 100
