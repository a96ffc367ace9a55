"""The server ends, hangs, forgets, fills up: writers wait, and nothing acknowledged is lost."""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from benchmarks.faults.records import SCHEMA
from benchmarks.faults.rig import MEMORY, Rig, until
from replay_service import EmbeddedServer
from replay_service.server import Durability

pytestmark = [pytest.mark.faults, pytest.mark.integration]

RESTART_S = 10.0
Recovered = Callable[..., None]


def test_server_is_killed_and_started_again(rig: Rig, recovered: Recovered) -> None:
    rig.writer(0, 1)
    rig.wait_chunks(20)
    slowest = 0.0
    for _ in range(3):
        rig.kill_server()
        began = time.monotonic()
        rig.server.start()
        rig.wait_chunks(2)
        slowest = max(slowest, time.monotonic() - began)
    counters = rig.verify(shown={"cannot be used": "ReplayUnavailable"})
    assert counters["lost_chunks"] == counters["renewed_streams"] == 0
    recovered(slowest, RESTART_S)


@pytest.mark.exhaustive
def test_server_is_stopped_and_started_as_an_operator_would(rig: Rig, recovered: Recovered) -> None:
    rig.writer(0, 1)
    rig.wait_chunks(20)
    rig.server.stop()
    began = time.monotonic()
    rig.server.start()
    rig.wait_chunks(2)
    recovered(time.monotonic() - began, RESTART_S)
    assert rig.verify(shown={"cannot be used": "ReplayUnavailable"})["resent_chunks"] == 0


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(n, marks=pytest.mark.exhaustive) for n in (1, 2, 3))]
)
def test_power_cut_takes_the_end_of_the_log_and_writers_send_it_again(
    rig: Rig, recovered: Recovered, seed: int
) -> None:
    choice = random.Random(seed)
    rig.writer(0, 1)
    rig.wait_chunks(20)
    rig.kill_server(cut_bytes=choice.randint(2_000, 8_000))
    began = time.monotonic()
    rig.server.start()
    rig.wait_chunks(2)
    seconds = time.monotonic() - began
    counters = rig.verify(shown={"stream_out_of_step": "resent_chunks"})
    assert counters["lost_chunks"] == 0
    recovered(seconds, RESTART_S, f"nothing ({counters['resent_chunks']} chunks sent again)")


def test_power_cut_that_also_ends_the_writers_takes_the_unsynced_end(
    rig: Rig, recovered: Recovered
) -> None:
    writer = rig.writer(0)
    rig.wait_chunks(20)
    rig.catch_up_paused(writer)
    writer.kill()
    rig.kill_server(cut_bytes=4_000)
    began = time.monotonic()
    rig.server.start()
    seconds = time.monotonic() - began
    lost = max(seq for _, seq in rig.acknowledged()) - rig.client.stats().committed_chunks
    assert 0 < lost < 20
    rig.writer(0)
    rig.wait_chunks(5)
    # The mirror had read them; the server holds a whole beginning of the stream, and a new life.
    rig.verify(excused={"s0@1"})
    recovered(seconds, RESTART_S, f"{lost} chunks of the dead writer")


def test_server_hangs_and_goes_on(rig: Rig, recovered: Recovered) -> None:
    writer = rig.writer(0, timeout_s=1.0)
    rig.wait_chunks(10)
    with rig.stopped(rig.server.process_id):
        told = until(lambda: "did not answer in time" in writer.ask()["blocked_reason"], 10)
        time.sleep(1.0)
    assert told < 5.0
    began = time.monotonic()
    rig.wait_chunks(2)
    recovered(time.monotonic() - began, 5.0)
    rig.verify(shown={"did not answer in time": "ReplayTimeout"})


def test_data_of_the_server_is_gone(rig: Rig, recovered: Recovered) -> None:
    writer = rig.writer(0, 1, ring=4)
    rig.wait_chunks(30)
    before = rig.client.stats().epoch
    # Stopped until all is gone: what it is told of in between, nobody has read.
    with rig.stopped(writer.process.pid), redis.Redis.from_url(rig.server.url) as admin:
        rig.catch_up()
        admin.flushall()
    began = time.monotonic()
    until(lambda: "no replay has been created" in writer.ask()["blocked_reason"], 10)
    rig.client.create(SCHEMA, rig.limits)
    rig.wait_chunks(2)
    seconds = time.monotonic() - began
    assert rig.client.stats().epoch > before
    counters = rig.verify(
        excused={"s0@1", "s1@1"},
        shown={"no replay has been created": "ReplayMissing", "stream_out_of_step": "lost_chunks"},
    )
    assert counters["renewed_streams"] == 2
    recovered(seconds, RESTART_S, f"{counters['lost_chunks']} chunks (mirrors have them)")


def test_memory_of_the_server_is_exhausted(rig: Rig, recovered: Recovered) -> None:
    writer = rig.writer(0)
    rig.wait_chunks(10)
    rig.config("maxmemory", 1)
    until(lambda: "memory limit" in writer.ask()["blocked_reason"], 10)
    before = writer.ask()
    assert before["pending_chunks"] > 0
    time.sleep(0.5)
    rig.config("maxmemory", MEMORY)
    began = time.monotonic()
    rig.wait_chunks(2)
    recovered(time.monotonic() - began, 5.0)
    assert rig.verify(shown={"memory limit": "ReplayFull"})["lost_chunks"] == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 12 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(place)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small file system is not allowed here")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize("durability", ["everysec", "strict"])
def test_disk_of_the_server_is_full(
    tmp_path: Path, small_disk: Path, recovered: Recovered, durability: Durability
) -> None:
    server = EmbeddedServer(small_disk / "server", max_memory_bytes=MEMORY, durability=durability)
    rig = Rig(tmp_path, server=server)
    try:
        writer = rig.writer(0)
        rig.wait_chunks(10)
        filler = small_disk / "filler"
        with pytest.raises(OSError, match="No space left"), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(64 * 1024))
                file.write(bytes(512))
        if durability == "strict":
            # It cannot keep its word, so it ends; whoever supervises it starts it again.
            until(lambda: not server.running, 30, "the end of the server")
            told = "server_ended"
            filler.unlink()
            server.start()
        else:
            until(lambda: "disk" in writer.ask()["blocked_reason"], 30, "a full disk")
            told = "cannot write to its disk"
            time.sleep(0.5)
            filler.unlink()
        began = time.monotonic()
        rig.wait_chunks(2)
        recovered(time.monotonic() - began, RESTART_S)
        assert rig.verify(shown={told: "ReplayUnavailable"})["lost_chunks"] == 0
    finally:
        rig.close()
