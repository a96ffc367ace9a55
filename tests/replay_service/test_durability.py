from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def traced(server: EmbeddedServer, to: Path) -> Iterator[None]:
    """Write down what a server writes and syncs, in order; skips where that is not allowed."""
    if shutil.which("strace") is None:
        pytest.skip("needs strace")
    command = ["strace", "-f", "-e", "trace=write,writev,fdatasync,fsync", "-o", str(to)]
    command += ["-p", str(server.process_id)]
    tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert tracer.stderr is not None
    try:
        if "attached" not in (said := tracer.stderr.readline()):
            pytest.skip(f"strace is not allowed here: {said}")
        yield
    finally:
        tracer.terminate()
        tracer.communicate()


def synced_at_replies(trace: Path, log: int) -> list[int]:
    """Return how many bytes of the file `log` were synced when each insert was answered."""
    written, synced, found = 0, 0, list[int]()
    for line in trace.read_text().splitlines():
        call = re.match(r"\d+ +(\w+)\((\d+)(.*) = (\d+)$", line)
        if call is None:
            continue
        name, file, rest, result = call.groups()
        if int(file) != log:
            found += [synced] if r"$2\r\nOK\r\n" in rest else []
        elif name in ("write", "writev"):
            written += int(result)
        else:
            synced = written
    return found


def number_of(file: Path, process: int) -> int:
    """Return the number under which a process has a file open."""
    (found,) = (
        int(link.name)
        for link in Path(f"/proc/{process}/fd").iterdir()
        if link.readlink() == file.resolve()
    )
    return found


def test_strict_server_is_told_to_sync_each_write(tmp_path: Path) -> None:
    # WAITAOF is no witness: Valkey 9.1 also says yes where it syncs only once a second.
    with EmbeddedServer(tmp_path, max_memory_bytes=MEMORY, durability="strict") as server:
        with redis.Redis.from_url(server.url) as plain:
            assert plain.config_get("appendfsync")["appendfsync"] == "always"


@pytest.mark.parametrize("beyond", [0, 200])
def test_power_cut_of_a_strict_server_takes_nothing_that_it_acknowledged(
    tmp_path: Path, beyond: int
) -> None:
    """A cut keeps what was synced, and of what was written since a part that nobody can foretell.

    So what one right after an answer leaves is the file as it was synced by then, and `beyond`
    bytes of the next chunk.
    """
    before = tmp_path / "before"
    with EmbeddedServer(before, max_memory_bytes=MEMORY, durability="strict") as first:
        client = ReplayClient(first.url)
        client.create(SCHEMA, UNBOUNDED)
        (log,) = (before / "appendonlydir").glob("*.incr.aof")
        begin, number = log.stat().st_size, number_of(log, first.process_id)
        with traced(first, tmp_path / "trace"):
            insert_many(client, 0, 12)
        killed(first)
        client.close()
    synced = synced_at_replies(tmp_path / "trace", number)
    assert len(synced) == 12 and begin + synced[-1] == log.stat().st_size
    for acknowledged in (1, 5, 11):
        after = tmp_path / f"after-{acknowledged}"
        shutil.copytree(before / "appendonlydir", after / "appendonlydir")
        os.truncate(after / "appendonlydir" / log.name, begin + synced[acknowledged - 1] + beyond)
        with EmbeddedServer(after, max_memory_bytes=MEMORY, durability="strict") as second:
            client = ReplayClient(second.url)
            assert client.stats().committed_chunks == acknowledged
            assert check_server(client).ok
            assert insert(client, chunk(0, acknowledged)) == "DUP"
            assert insert(client, chunk(0, acknowledged + 1)) == "OK"
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
