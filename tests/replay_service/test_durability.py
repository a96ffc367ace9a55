from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Literal

import pytest
import redis

from replay_service import (
    EmbeddedServer,
    ReplayClient,
    ReplayConfig,
    ReplayConfigError,
    ReplayUnavailable,
    Uploader,
    check_server,
)
from tests.replay_service.records import (
    SCHEMA,
    UNBOUNDED,
    chunk,
    insert,
    insert_many,
    wait_written,
    write,
)

MEMORY = 2**26
Durability = Literal["none", "everysec", "strict"]


def killed(server: EmbeddedServer) -> None:
    """Kill the server as nothing can prevent, and wait until it is gone."""
    wait_written(server.url)
    os.kill(server.process_id, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while server.running:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def cut(directory: Path, lost_bytes: int) -> None:
    """Remove the end of the append-only file, as a power cut does to what was not synced."""
    (log,) = (directory / "appendonlydir").glob("*.incr.aof")
    os.truncate(log, log.stat().st_size - lost_bytes)


@pytest.mark.parametrize("durability", ["everysec", "strict"])
def test_killed_server_has_lost_nothing_that_it_acknowledged(
    tmp_path: Path, durability: Durability
) -> None:
    with EmbeddedServer(tmp_path, max_memory_bytes=MEMORY, durability=durability) as first:
        client = ReplayClient(first.url)
        client.create(SCHEMA, UNBOUNDED)
        insert_many(client, 0, 50)
        killed(first)
        client.close()
    with EmbeddedServer(tmp_path, max_memory_bytes=MEMORY, durability=durability) as second:
        client = ReplayClient(second.url)
        assert client.stats().inserted_steps == 400
        assert insert(client, chunk(0, 50)) == "DUP" and insert(client, chunk(0, 51)) == "OK"
        assert check_server(client).ok
        client.close()


def test_without_durability_nothing_reaches_the_disk(tmp_path: Path) -> None:
    with EmbeddedServer(tmp_path, max_memory_bytes=MEMORY, durability="none") as first:
        client = ReplayClient(first.url)
        client.create(SCHEMA, UNBOUNDED)
        insert_many(client, 0, 5)
        client.close()
    assert not list(tmp_path.glob("**/*.aof")) and not list(tmp_path.glob("**/*.rdb"))
    with EmbeddedServer(tmp_path, max_memory_bytes=MEMORY, durability="none") as second:
        client = ReplayClient(second.url)
        with pytest.raises(ReplayUnavailable, match="no replay has been created"):
            client.stats()
        client.close()


def test_data_on_disk_is_not_ignored(tmp_path: Path) -> None:
    with EmbeddedServer(tmp_path, max_memory_bytes=MEMORY):
        pass
    with pytest.raises(ReplayConfigError, match="durability none would neither"):
        EmbeddedServer(tmp_path, max_memory_bytes=MEMORY, durability="none").start()
    with EmbeddedServer(tmp_path, max_memory_bytes=MEMORY, durability="strict") as again:
        assert again.running


def test_strict_server_has_synced_what_it_acknowledges(tmp_path: Path) -> None:
    with EmbeddedServer(tmp_path, max_memory_bytes=MEMORY, durability="strict") as server:
        client = ReplayClient(server.url)
        client.create(SCHEMA, UNBOUNDED)
        with redis.Redis.from_url(server.url, single_connection_client=True) as plain:
            assert plain.config_get("appendfsync")["appendfsync"] == "always"
            for number in range(20):
                plain.set(f"probe:{number}", b"x" * 1000)
                # Answers at once how far the disk is: 0 if the last write were not on it.
                assert plain.execute_command("WAITAOF", 1, 0, 1)[0] == 1
        client.close()


@pytest.mark.parametrize("durability", ["everysec", "strict"])
def test_no_mode_stops_syncing_during_a_rewrite(tmp_path: Path, durability: Durability) -> None:
    with EmbeddedServer(tmp_path, max_memory_bytes=MEMORY, durability=durability) as server:
        with redis.Redis.from_url(server.url, decode_responses=True) as plain:
            assert plain.config_get("no-appendfsync*") == {"no-appendfsync-on-rewrite": "no"}


@pytest.mark.parametrize("lost_bytes", [1, 700, 5000])
def test_power_cut_loses_the_tail_alone_and_the_writer_sends_it_again(
    tmp_path: Path, lost_bytes: int
) -> None:
    config = ReplayConfig(chunk_steps=8, resend_chunks=32)
    server = EmbeddedServer(tmp_path, max_memory_bytes=MEMORY)
    with server:
        client = ReplayClient(server.url)
        client.create(SCHEMA, UNBOUNDED)
        with Uploader(client, SCHEMA, config) as uploader:
            writer = uploader.open_stream("s0")
            write(writer, 0, 0, 160)
            assert uploader.drain(10.0) and uploader.stats.chunks == 20
            killed(server)
            cut(tmp_path, lost_bytes)
            server.start()
            survived = client.stats().committed_chunks
            assert 0 < survived < 20
            assert [entry.seq for entry in client.read_log("0", 99, 0.01)] == list(
                range(1, survived + 1)
            )
            report = check_server(client)
            assert report.ok, report
            write(writer, 0, 160, 168)
            assert uploader.drain(10.0)
            assert uploader.stats.resent_chunks == 20 - survived
            assert (uploader.stats.lost_chunks, uploader.stats.renewed_streams) == (0, 0)
        assert [entry.seq for entry in client.read_log("0", 99, 0.01)] == list(range(1, 22))
        assert client.stats().inserted_steps == 168 and check_server(client).ok
        client.close()


def test_tail_that_left_the_ring_is_counted_and_the_stream_goes_on(tmp_path: Path) -> None:
    config = ReplayConfig(chunk_steps=8, resend_chunks=1)
    server = EmbeddedServer(tmp_path, max_memory_bytes=MEMORY)
    with server:
        client = ReplayClient(server.url)
        client.create(SCHEMA, UNBOUNDED)
        with Uploader(client, SCHEMA, config) as uploader:
            writer = uploader.open_stream("s0")
            write(writer, 0, 0, 160)
            assert uploader.drain(10.0)
            killed(server)
            cut(tmp_path, 5000)
            server.start()
            survived = client.stats().committed_chunks
            write(writer, 0, 160, 168)
            assert uploader.drain(10.0)
            assert uploader.stats.lost_chunks == 20 - survived - 1
            assert uploader.stats.renewed_streams == 1
        assert {entry.sid for entry in client.read_log("0", 99, 0.01)} == {"s0@1", "s0@2"}
        assert check_server(client).ok
        client.close()
