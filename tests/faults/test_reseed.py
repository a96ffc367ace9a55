"""A server loses all its data; the learner's mirror puts it back, and nobody notices much."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import redis

from benchmarks.faults.records import SCHEMA
from benchmarks.faults.rig import LEAD, Rig, until
from replay_service import (
    Limits,
    Mirror,
    ReplayClient,
    ReplayFenced,
    ReplayMissing,
    ReplayUnavailable,
    Reseeder,
    check_mirror,
    check_server,
)

pytestmark = [pytest.mark.faults, pytest.mark.integration]

Recovered = Callable[..., None]
LIMITS = Limits(capacity_steps=10**6, capacity_bytes=2**26, min_size_steps=64)


@contextmanager
def following(rig: Rig, *, mode: str = "reseed") -> Iterator[tuple[Mirror, Reseeder]]:
    """A learner's mirror with what puts its records back."""
    client = ReplayClient(rig.follower_proxy.url, timeout_s=5.0)
    mirror = Mirror(client, SCHEMA, capacity_steps=20_000, window_steps=16, placement="ram")
    mirror.start()
    reseeder = Reseeder(
        client,
        lambda: ReplayClient(rig.server.url, timeout_s=5.0),
        mirror,
        LIMITS,
        fence=rig.follower.fence,
        mode=mode,  # type: ignore[arg-type]
    )
    try:
        yield mirror, reseeder
    finally:
        mirror.stop()
        client.close()


def catch_up(mirror: Mirror, client: ReplayClient) -> None:
    """Absorb until the mirror shows all that was inserted."""

    def level() -> bool:
        mirror.absorb()
        return mirror.inserted_steps == client.stats().inserted_steps

    until(level, 30, "absorbing")


def empty(rig: Rig) -> None:
    """Take everything from the server."""
    with redis.Redis.from_url(rig.server.url) as admin:
        admin.flushall()


def contents(mirror: Mirror) -> dict[tuple[str, int], bytes]:
    """Return every record's step column by stretch."""
    return {
        (sid, first): mirror.columns["step"][rows].numpy().tobytes()
        for sid, first, rows in mirror.held()
    }


def steps_held(mirror: Mirror) -> list[tuple[str, int]]:
    """Return (slot, step) of every record that is held, sorted; no step of a slot may be twice."""
    found = []
    for sid, _, rows in mirror.held():
        slot = sid.partition("@")[0]
        found += [(slot, int(step)) for step in mirror.columns["step"][rows]]
    return sorted(found)


@pytest.mark.parametrize("volume", ["emptied", "new"])
def test_data_of_the_server_is_gone_and_the_mirror_puts_it_back(
    rig: Rig, recovered: Recovered, volume: str
) -> None:
    rig.client.create(SCHEMA, LIMITS)
    writer = rig.writer(0, 1)
    with following(rig) as (mirror, reseeder):
        rig.wait_chunks(40)
        with rig.stopped(writer.process.pid):
            rig.catch_up()
            catch_up(mirror, rig.client)
            before, mirrored = rig.client.stats(), contents(mirror)
            report = check_server(rig.client)
            rig.follower_proxy.refuse()
        # Nobody but the server has these, and their writer.
        rig.wait_chunks(6)
        if volume == "emptied":
            empty(rig)
        else:
            rig.kill_server()
            shutil.rmtree(rig.server.directory / "appendonlydir")
            rig.server.start()
        with pytest.raises(ReplayMissing):
            rig.client.settle(rig.follower.fence, 1, 2)
        rig.follower_proxy.heal()
        began = time.monotonic()
        reseeder.run(500, rig.follower.account.i0 + 500 + LEAD)
        rig.wait_chunks(2)
        seconds = time.monotonic() - began

        after = rig.client.stats()
        assert after.inserted_steps >= before.inserted_steps
        # What was put back, or what the follower has settled since.
        assert after.replayed_steps == 500 or after.replayed_steps >= before.replayed_steps
        assert after.born > before.born and reseeder.losses == 1 and reseeder.progress == ""
        counters = rig.verify()
        # Writers went on in their streams, sending again at most what the mirror had not read.
        assert counters["lost_chunks"] == counters["renewed_streams"] == 0
        assert counters["resent_chunks"] >= 6
        catch_up(mirror, rig.client)
        held = steps_held(mirror)
        assert len(held) == len(set(held)) == mirror.size_steps and mirror.missed_steps == 0
        assert all(contents(mirror)[key].startswith(value) for key, value in mirrored.items())
        assert check_mirror(mirror, rig.client, complete=True).ok
        again = Mirror(rig.client, SCHEMA, capacity_steps=20_000, window_steps=16, placement="ram")
        again.start()
        catch_up(again, rig.client)
        again.stop()
        assert contents(again) == contents(mirror) and again.missed_steps == 0
        assert {sid: summary.first_seq for sid, summary in report.streams.items()} == {
            sid: summary.first_seq for sid, summary in check_server(rig.client).streams.items()
        }
    recovered(seconds, 10.0, "nothing", f"data of the server is gone ({volume}), put back")


def test_the_account_goes_on_without_the_records(rig: Rig, recovered: Recovered) -> None:
    rig.client.create(SCHEMA, LIMITS)
    writer = rig.writer(0, ring=4)
    with following(rig, mode="continue") as (mirror, reseeder):
        rig.wait_chunks(20)
        with rig.stopped(writer.process.pid):
            rig.catch_up()
            catch_up(mirror, rig.client)
            before = rig.client.stats().inserted_steps
            empty(rig)
        began = time.monotonic()
        reseeder.run(0, 10**6)
        rig.wait_chunks(2)
        recovered(time.monotonic() - began, 10.0, "what the log held; mirrors keep it")
        catch_up(mirror, rig.client)
        stats = rig.client.stats()
        assert stats.evicted_steps == before < stats.inserted_steps
        held = steps_held(mirror)
        assert len(held) == len(set(held)) == stats.inserted_steps
        rig.verify(excused={"s0@1"})


def test_no_incarnation_is_given_out_twice(rig: Rig) -> None:
    rig.client.create(SCHEMA, LIMITS)
    # A writer that has not sent anything yet: no log knows of it.
    early = rig.client.open_stream("s9")
    with following(rig) as (_, reseeder):
        empty(rig)
        reseeder.run(0, 10**6)
        assert rig.client.open_stream("s9") > early + 1
        assert rig.client.acquire_fence() > rig.follower.fence


def test_putting_back_is_interrupted_and_continued(rig: Rig) -> None:
    """By the death of the server, half of what it had synced being lost, and by another loss."""
    rig.client.create(SCHEMA, LIMITS)
    writer = rig.writer(0, 1, ring=4)
    with following(rig) as (mirror, reseeder):
        rig.wait_chunks(40)
        writer.finish()
        rig.catch_up()
        catch_up(mirror, rig.client)
        hashed, total = check_server(rig.client).contents_sha256, mirror.inserted_steps
        empty(rig)
        seen = []

        def kill() -> bool:
            seen.append(reseeder.progress)
            if len(seen) == 20:
                os.kill(rig.server.process_id, 9)
                until(lambda: not rig.server.running, 10)
            return False

        with pytest.raises(ReplayUnavailable):
            reseeder.run(0, 10**6, kill)
        assert "152 of" in seen[-1]
        os.truncate(rig.log_file, rig.log_file.stat().st_size - 3_000)
        rig.server.start()
        cuts = iter([*[False] * 25, True])

        def cut() -> bool:
            if next(cuts, False):
                empty(rig)
            return False

        with pytest.raises(ReplayUnavailable):
            reseeder.run(0, 10**6, cut)
        # Nobody else may insert meanwhile.
        rig.client.create(SCHEMA, LIMITS)
        reseeder.run(0, 10**6)
        assert rig.client.stats().inserted_steps == total == mirror.inserted_steps
        report = check_server(rig.client)
        assert report.ok and report.contents_sha256 == hashed


def test_writers_wait_until_everything_is_back(rig: Rig) -> None:
    rig.client.create(SCHEMA, LIMITS)
    writer = rig.writer(0, pause_s=0.005)
    with following(rig) as (mirror, reseeder):
        rig.wait_chunks(30)
        with rig.stopped(writer.process.pid):
            rig.catch_up()
            catch_up(mirror, rig.client)
            # Else a chunk may come whose entry a reader has seen, and whose records are gone.
            empty(rig)
        reasons = []

        def look() -> bool:
            if len(reasons) < 1:
                told = "putting back"
                until(lambda: told in writer.ask()["blocked_reason"], 10, "the reason")
                reasons.append(rig.client.stats().inserted_steps)
            return False

        reseeder.run(0, 10**6, look)
        assert reasons
        rig.wait_chunks(2)
        rig.verify()


def test_a_successor_finds_what_a_learner_had_put_back_before_it_died(rig: Rig) -> None:
    rig.client.create(SCHEMA, LIMITS)
    writer = rig.writer(0, ring=4)
    with following(rig) as (mirror, reseeder):
        rig.wait_chunks(20)
        writer.finish()
        rig.catch_up()
        catch_up(mirror, rig.client)
        empty(rig)
        calls = iter(range(11))

        def die() -> bool:
            if next(calls) == 10:
                raise KeyboardInterrupt
            return False

        with pytest.raises(KeyboardInterrupt):
            reseeder.run(0, 10**6, die)
        successor = rig.client.acquire_fence()
        rig.client.restored(successor)
        with pytest.raises(ReplayFenced):
            reseeder.run(0, 10**6)
        report = check_server(rig.client)
        assert report.ok and report.chunks == 10
        assert np.all([s.first_seq == 1 for s in report.streams.values()])
