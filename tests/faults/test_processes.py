"""Writers and learners are killed, stopped and replaced."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import pytest
import redis

from benchmarks.faults.rig import Rig, until
from replay_service import EmbeddedServer, ReplayFenced

pytestmark = [pytest.mark.faults, pytest.mark.integration]

Recovered = Callable[..., None]


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.exhaustive)])
def test_a_writer_is_killed_at_random_points(rig: Rig, recovered: Recovered, kills: int) -> None:
    choice, slowest = random.Random(kills), 0.0
    writer = rig.writer(0, 1)
    rig.wait_chunks(1)
    for _ in range(kills):
        rig.wait_chunks(choice.randint(3, 20))
        time.sleep(choice.random() * 0.05)
        writer.kill()
        began = time.monotonic()
        writer = rig.writer(0, 1)
        rig.wait_chunks(1)
        slowest = max(slowest, time.monotonic() - began)
    rig.verify()
    recovered(slowest, 20.0, "what was not acknowledged")


def test_a_stopped_writer_that_was_replaced_comes_back(rig: Rig, recovered: Recovered) -> None:
    zombie = rig.writer(0)
    rig.wait_chunks(10)
    with rig.stopped(zombie.process.pid):
        began = time.monotonic()
        rig.writer(0)
        rig.wait_chunks(5)
        seconds = time.monotonic() - began
    rig.wait_chunks(10)
    rig.verify()
    sids = {sid for sid, _ in rig.acknowledged()}
    # Two lives of one slot never share a stream, so neither can tear the other's windows.
    assert sids == {"s0@1", "s0@2"}
    recovered(seconds, 10.0)


def test_a_learner_that_was_replaced_can_do_nothing(rig: Rig, recovered: Recovered) -> None:
    rig.writer(0)
    rig.wait_chunks(10)
    zombie = rig.follower.fence
    newer = rig.client.acquire_fence()
    began = time.monotonic()
    with pytest.raises(ReplayFenced, match=f"fence {zombie} was replaced"):
        rig.client.settle(zombie, 10**9, 2**40)
    assert rig.client.stats().replayed_steps < 10**9 and newer > zombie
    until(lambda: rig.follower.fence > newer, 10, "the learner's notice")
    rig.wait_chunks(2)
    recovered(time.monotonic() - began, 5.0)
    rig.verify()


def test_a_follower_loses_a_damaged_chunk_and_no_other(rig: Rig) -> None:
    writer = rig.writer(0)
    rig.wait_chunks(5)
    rig.follower_proxy.refuse()
    rig.wait_chunks(10)
    entry = rig.client.read_log("0", 10**6, 0.1)[-4]
    with redis.Redis.from_url(rig.server.url) as admin:
        admin.setrange(entry.key, entry.size_bytes // 2, b"\xff\x00\xff")
    rig.follower_proxy.heal()
    until(lambda: rig.follower.position >= entry.position + entry.steps, 20)
    rig.wait_chunks(5)
    writer.finish()
    rig.catch_up()
    assert rig.missing() == {(entry.sid, entry.seq)}
    (problem, follows) = rig.follower.ledger.problems
    assert problem == f"{entry.sid}:{entry.seq} was gone or damaged when it was read"
    assert follows.startswith(f"{entry.sid}:{entry.seq + 1} follows chunk {entry.seq - 1}")
    with redis.Redis.from_url(rig.server.url) as admin:
        assert admin.xlen("{rp0}:dead") == 1


def test_a_replica_that_lags_behind_takes_over(rig: Rig, recovered: Recovered) -> None:
    """The replica stops hearing from its master, which goes on for a while and then dies."""
    replica = EmbeddedServer(rig.directory / "replica", max_memory_bytes=2**27)
    proxy = rig.proxy("writer")
    with replica:
        rig.replicate_to(replica)
        rig.writer(0, 1, proxy=proxy)
        rig.wait_chunks(10)
        with redis.Redis.from_url(replica.url) as admin:
            until(lambda: admin.hget("{rp0}:meta", "committed") not in (None, b"0"), 20)
            admin.replicaof("NO", "ONE")
            behind = int(admin.hget("{rp0}:meta", "committed"))
        rig.wait_chunks(10)
        rig.kill_server()
        began = time.monotonic()
        rig.move_to(replica)
        rig.wait_chunks(2)
        recovered(time.monotonic() - began, 10.0)
        counters = rig.verify()
        assert counters["resent_chunks"] > 0 and counters["lost_chunks"] == 0
        assert rig.client.stats().committed_chunks > behind
