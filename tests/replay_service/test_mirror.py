from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
import torch

from replay_service import (
    CreditLimiter,
    EmbeddedServer,
    EpisodeEvent,
    Mirror,
    ReplayAuthError,
    ReplayClient,
    ReplayConfig,
    ReplayEmpty,
    ReplayFenced,
    ReplayMissing,
    ReplayTimeout,
    SamplingConfig,
    Uploader,
    encode_chunk,
    plan_limits,
)
from replay_service.storage import gather, window_rows
from tests.replay_service.records import (
    SCHEMA,
    UNBOUNDED,
    absorb_until,
    chunk,
    contents,
    insert,
    insert_many,
    record,
    renamed,
    write,
    write_until,
)

WINDOW = 11


@contextmanager
def following(client: ReplayClient, **changes: Any) -> Iterator[Mirror]:
    """Run a mirror with small pages."""
    usual = {"capacity_steps": 100_000, "window_steps": WINDOW, "page_steps": 8}
    mirror = Mirror(client, SCHEMA, **{**usual, "placement": "ram", **changes})
    mirror.start()
    try:
        yield mirror
    finally:
        mirror.stop()


def windows(mirror: Mirror, update: int, count: int = 64) -> dict[str, torch.Tensor]:
    """Draw windows uniformly."""
    rows = window_rows(
        torch.from_numpy(mirror.uniforms(0, update, count)),
        torch.full((count,), -1),
        mirror.valid_cumsum,
        mirror.next_page,
        mirror.page_steps,
        mirror.window_steps,
    )
    return gather(mirror.columns, rows)


def assert_whole(batch: dict[str, torch.Tensor]) -> None:
    assert (batch["step"].diff(dim=1) == 1).all()
    assert (batch["slot"].diff(dim=1) == 0).all()
    assert (batch["deter"].float() == batch["slot"][..., None]).all()
    assert (batch["vector"][..., 0] == batch["step"]).all()
    assert (batch["is_first"] == (batch["step"] % 10 == 0)).all()


@pytest.mark.parametrize("placement", ["ram", "disk"])
def test_memory_of_the_mirror_is_known(
    client: ReplayClient, tmp_path: Path, placement: str
) -> None:
    client.create(SCHEMA, UNBOUNDED)
    with following(client, placement=placement, directory=tmp_path) as mirror:
        whole, room = mirror.memory()
        assert whole == sum(column.nbytes for column in mirror.columns.values())
        assert room > whole, "it would not have been placed here"


def test_mirror_holds_exactly_what_was_inserted(client: ReplayClient) -> None:
    client.create(SCHEMA, UNBOUNDED)
    with following(client) as mirror:
        for slot in range(3):
            insert_many(client, slot, 10)
        absorb_until(mirror, lambda: mirror.inserted_steps == 240)
        held = contents(mirror)
    assert set(held) == {(slot, step) for slot in range(3) for step in range(80)}
    for (slot, step), content in held.items():
        want = record(slot, step)
        assert content == b"".join(np.asarray(want[name]).tobytes() for name in sorted(want))
    assert mirror.valid_starts == 3 * (80 - WINDOW + 1) and mirror.missed_steps == 0


def test_windows_stay_whole_while_many_write_and_the_oldest_are_evicted(
    client: ReplayClient,
) -> None:
    client.create(SCHEMA, replace(UNBOUNDED, capacity_steps=600))
    config = ReplayConfig(chunk_steps=7, redis_memory_bytes=2**28)
    uploader, stop = Uploader(client, SCHEMA, config), threading.Event()
    threads = [
        threading.Thread(target=write_until, args=(uploader.open_stream(f"s{slot}"), slot, stop))
        for slot in range(4)
    ]
    with following(client, capacity_steps=600) as mirror:
        for thread in threads:
            thread.start()
        absorb_until(mirror, lambda: mirror.valid_starts > 0)
        seen: Counter[int] = Counter()
        update = 0
        while mirror.inserted_steps < 3000:
            mirror.absorb()
            update += 1
            batch = windows(mirror, update)
            assert_whole(batch)
            seen.update(batch["slot"][:, 0].tolist())
            assert mirror.size_steps <= 600
        stop.set()
        uploader.interrupt()
        for thread in threads:
            thread.join(10)
    uploader.close(0.0)
    assert set(seen) == {0, 1, 2, 3}


def test_tensors_keep_their_storage(client: ReplayClient) -> None:
    client.create(SCHEMA, UNBOUNDED)
    with following(client) as mirror:
        tensors = [*mirror.columns.values(), mirror.valid_cumsum, mirror.next_page]
        before = [tensor.data_ptr() for tensor in tensors]
        insert_many(client, 0, 5)
        absorb_until(mirror, lambda: mirror.inserted_steps == 40)
        after = [*mirror.columns.values(), mirror.valid_cumsum, mirror.next_page]
        assert [tensor.data_ptr() for tensor in after] == before
        assert int(tensors[-2][-1]) == 40 - WINDOW + 1


def test_online_windows_come_newest_first_without_overlap_and_once(client: ReplayClient) -> None:
    client.create(SCHEMA, UNBOUNDED)
    with following(client) as mirror:
        insert_many(client, 0, 4)
        insert_many(client, 1, 6)
        absorb_until(mirror, lambda: mirror.inserted_steps == 80)
        starts = mirror.online_starts(4)
        found = [(int(mirror.columns["slot"][r]), int(mirror.columns["step"][r])) for r in starts]
        assert found == [(1, 33), (1, 22), (1, 11), (1, 0)]
        rest = mirror.online_starts(4)
        assert (rest >= 0).tolist() == [True, True, False, False]
        assert [int(mirror.columns["step"][r]) for r in rest[:2]] == [11, 0]
        assert mirror.online_starts(2).tolist() == [-1, -1]
        insert_many(client, 0, 2, start=5)
        absorb_until(mirror, lambda: mirror.inserted_steps == 96)
        assert [int(mirror.columns["step"][r]) for r in mirror.online_starts(2)] == [33, 22]


def test_online_windows_that_were_evicted_are_skipped(client: ReplayClient) -> None:
    client.create(SCHEMA, UNBOUNDED)
    with following(client, capacity_steps=40) as mirror:
        insert_many(client, 0, 10)
        absorb_until(mirror, lambda: mirror.inserted_steps == 80)
        starts = mirror.online_starts(7)
        assert [int(mirror.columns["step"][r]) for r in starts if r >= 0] == [66, 55, 44]
    with following(client, online=False) as quiet:
        insert_many(client, 0, 5, start=11)
        absorb_until(quiet, lambda: quiet.inserted_steps == 120)
        assert quiet.online_starts(1).tolist() == [-1]


def test_waiting_online_windows_survive_a_restart_of_the_learner(client: ReplayClient) -> None:
    client.create(SCHEMA, UNBOUNDED)
    with following(client) as mirror:
        insert_many(client, 0, 6)
        absorb_until(mirror, lambda: mirror.inserted_steps == 48)
        mirror.online_starts(1)
        state = mirror.online_state()
        want = mirror.online_starts(9).tolist()
    with following(client) as again:
        absorb_until(again, lambda: again.caught_up)
        assert again.online_starts(1).tolist() == [-1], "the rebuilt log is not new"
        again.restore_online([*state, ("gone@1", 0)])
        assert again.online_starts(9).tolist() == want


def test_a_batch_takes_new_windows_up_to_their_share_and_then_draws(client: ReplayClient) -> None:
    client.create(SCHEMA, UNBOUNDED)
    with following(client, sampling=SamplingConfig(online=0.5)) as mirror:
        with pytest.raises(ReplayEmpty, match="11 consecutive steps"):
            mirror.draw(0, 0, 4)
        insert_many(client, 0, 6)
        absorb_until(mirror, lambda: mirror.inserted_steps == 48)
        for update, steps in ((3, [33, 22]), (4, [11, 0]), (5, [])):
            uniforms, starts = mirror.draw(2, update, 4)
            np.testing.assert_array_equal(uniforms, mirror.uniforms(2, update, 4))
            assert mirror.columns["step"][starts[starts >= 0]].tolist() == steps


def test_windows_within_episodes_follow_the_flags_of_the_records(client: ReplayClient) -> None:
    client.create(SCHEMA, UNBOUNDED)
    sampling = SamplingConfig(windows="episodes")
    with following(client, window_steps=7, online=False, sampling=sampling) as mirror:
        insert_many(client, 0, 12)
        insert_many(client, 1, 9)
        absorb_until(mirror, lambda: mirror.inserted_steps == 168)
        starts = mirror.draw(0, 1, 500)[1]
        # Records say that an episode has ten steps, so that four windows of seven fit.
        found = {int(mirror.columns["step"][row]) for row in starts}
        assert found == {10 * episode + at for episode in range(9) for at in range(4)}


def test_rebuilt_mirror_equals_the_original(client: ReplayClient) -> None:
    client.create(SCHEMA, UNBOUNDED)
    with following(client) as original:
        for seq in range(1, 15):
            for slot in range(3):
                assert insert(client, chunk(slot, seq, 5)) == "OK"
            original.absorb()
        absorb_until(original, lambda: original.inserted_steps == 210)
        with following(client) as rebuilt:
            assert not rebuilt.caught_up
            absorb_until(rebuilt, lambda: rebuilt.caught_up)
            assert rebuilt.rebuild_share == 1.0
            assert contents(rebuilt) == contents(original)
            assert rebuilt.inserted_steps == original.inserted_steps
            assert torch.equal(rebuilt.valid_cumsum, original.valid_cumsum)
            assert torch.equal(rebuilt.next_page, original.next_page)
            for name, value in windows(original, 5).items():
                assert torch.equal(windows(rebuilt, 5)[name], value), name


def test_mirror_rebuilt_after_eviction_holds_what_the_log_retains(client: ReplayClient) -> None:
    client.create(SCHEMA, replace(UNBOUNDED, capacity_steps=80))
    insert_many(client, 0, 10)
    insert_many(client, 1, 5)
    with following(client) as mirror:
        absorb_until(mirror, lambda: mirror.caught_up)
        assert mirror.inserted_steps == 120 and mirror.missed_steps == 0
        want = {(0, s) for s in range(40, 80)} | {(1, s) for s in range(40)}
        assert set(contents(mirror)) == want


def test_what_was_evicted_before_it_was_read_is_counted(client: ReplayClient) -> None:
    client.create(SCHEMA, replace(UNBOUNDED, capacity_steps=40))
    with following(client, queue_bytes=1) as mirror:
        insert_many(client, 0, 1)
        absorb_until(mirror, lambda: mirror.inserted_steps == 8)
        insert_many(client, 0, 60, start=2)
        absorb_until(mirror, lambda: mirror.inserted_steps == 8 * 61)
        assert mirror.missed_steps > 0
        assert mirror.size_steps + mirror.missed_steps == 8 * 61
        if mirror.valid_starts:
            assert_whole(windows(mirror, 0))


def test_damaged_chunk_is_quarantined_and_never_bridged(
    client: ReplayClient, server: EmbeddedServer
) -> None:
    client.create(SCHEMA, UNBOUNDED)
    insert_many(client, 0, 4)
    with redis.Redis.from_url(server.url) as admin:
        admin.setrange(client.payload_key("s0@1", 2), 400, b"\xff\xff\xff\xff")
        with following(client) as mirror:
            absorb_until(mirror, lambda: mirror.caught_up)
            assert mirror.missed_steps == 8
            assert set(contents(mirror)) == {(0, s) for s in (*range(8), *range(16, 32))}
            assert mirror.valid_starts == 16 - WINDOW + 1
            assert_whole(windows(mirror, 0))
        [(_, fields)] = admin.xrange("{rp0}:dead")
        assert fields[b"s"] == b"s0@1" and fields[b"reason"]


def test_chunk_under_another_streams_name_is_quarantined(client: ReplayClient) -> None:
    client.create(SCHEMA, UNBOUNDED)
    foreign = encode_chunk(chunk(7, 1), SCHEMA)
    assert client.insert(SCHEMA, "s0@1", 1, 8, foreign).code == "OK"
    with following(client) as mirror:
        absorb_until(mirror, lambda: mirror.caught_up)
        assert mirror.size_steps == 0 and mirror.missed_steps == 8


def test_episodes_are_reported_once_with_their_position(client: ReplayClient) -> None:
    client.create(SCHEMA, UNBOUNDED)
    with following(client) as mirror, Uploader(client, SCHEMA, ReplayConfig(chunk_steps=16)) as up:
        write(up.open_stream("s0"), 0, 0, 32)
        events = absorb_until(mirror, lambda: mirror.inserted_steps == 32)
    assert events == [
        EpisodeEvent(16, "s0", 9.0, 9, "terminated", (1, 15)),
        EpisodeEvent(32, "s0", 9.0, 9, "truncated", (1, 31)),
        EpisodeEvent(32, "s0", 9.0, 9, "terminated", (1, 31)),
    ]


def test_mirror_waits_out_a_restart_of_the_server(tmp_path: Path) -> None:
    server = EmbeddedServer(tmp_path, max_memory_bytes=2**26)
    server.start()
    client = ReplayClient(server.url, timeout_s=2.0)
    client.create(SCHEMA, UNBOUNDED)
    with following(client) as mirror:
        insert_many(client, 0, 5)
        absorb_until(mirror, lambda: mirror.inserted_steps == 40)
        server.stop()
        mirror.wait(0.5)
        assert "cannot be used" in mirror.trouble
        server.start()
        insert_many(client, 0, 5, start=6)
        absorb_until(mirror, lambda: mirror.inserted_steps == 80)
        assert mirror.missed_steps == 0 and mirror.trouble == ""
        assert len(contents(mirror)) == 80
    client.close()
    server.stop()


def test_resent_chunks_are_placed_once(client: ReplayClient, server: EmbeddedServer) -> None:
    client.create(SCHEMA, UNBOUNDED)
    with following(client) as mirror:
        insert_many(client, 0, 6)
        absorb_until(mirror, lambda: mirror.inserted_steps == 48)
        with redis.Redis.from_url(server.url) as admin:
            for entry in client.read_log("0", 100, 0.1)[3:]:
                admin.delete(entry.key)
                admin.xdel("{rp0}:log", entry.entry_id)
            admin.hset("{rp0}:seq", "s0@1", 3)
            admin.hset("{rp0}:meta", mapping={"inserted": 24, "size": 24, "chunks": 3})
        insert_many(client, 0, 5, start=4)
        absorb_until(mirror, lambda: mirror.inserted_steps == 64)
        assert len(contents(mirror)) == mirror.size_steps == 64
        assert mirror.valid_starts == 64 - WINDOW + 1 and mirror.missed_steps == 0


def test_random_numbers_depend_on_seed_and_update_only(client: ReplayClient) -> None:
    client.create(SCHEMA, UNBOUNDED)
    with following(client) as mirror:
        with pytest.raises(ReplayEmpty, match="no stream holds 11 consecutive steps"):
            mirror.uniforms(3, 5, 16)
        insert_many(client, 0, 2)
        absorb_until(mirror, lambda: mirror.inserted_steps == 16)
        first = mirror.uniforms(3, 5, 16)
        assert first.shape == (16,) and ((first >= 0) & (first < 1)).all()
        np.testing.assert_array_equal(first, mirror.uniforms(3, 5, 16))
        assert not np.array_equal(first, mirror.uniforms(3, 6, 16))
        assert not np.array_equal(first, mirror.uniforms(4, 5, 16))


@pytest.mark.parametrize(("ratio", "streams"), [("32", 3), ("512", 2), ("0.7", 5)])
def test_train_ratio_never_leaves_its_band(client: ReplayClient, ratio: str, streams: int) -> None:
    config = ReplayConfig(
        capacity_steps=4000, chunk_steps=8, min_size_steps=64, redis_memory_bytes=2**28
    )
    limits, limiter = plan_limits(
        config,
        SCHEMA,
        train_ratio=ratio,
        batch_size=4,
        batch_length=10,
        window_steps=WINDOW,
        streams=streams,
    )
    client.create(SCHEMA, limits)
    fence, stop, drifts = client.acquire_fence(), threading.Event(), list[float]()
    uploaders = [Uploader(client, SCHEMA, config) for _ in range(streams)]
    threads = [
        threading.Thread(target=write_until, args=(u.open_stream(f"s{i}"), i, stop))
        for i, u in enumerate(uploaders)
    ]
    threads.append(threading.Thread(target=watch, args=(client, limiter, stop, drifts)))
    with following(client, capacity_steps=4000) as mirror:
        for thread in threads:
            thread.start()
        updates = train(mirror, client, limiter, fence, updates=400)
        stop.set()
        for uploader in uploaders:
            uploader.interrupt()
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()
    for uploader in uploaders:
        uploader.close(0.0)
    assert updates == 400 and len(drifts) > 20
    assert -limiter.tol_s <= min(drifts) and max(drifts) <= limiter.tol_i


def watch(
    client: ReplayClient, limiter: CreditLimiter, stop: threading.Event, drifts: list[float]
) -> None:
    """Read the server's account again and again."""
    while not stop.is_set():
        now = client.stats()
        if now.inserted_steps >= limiter.min_size_steps:
            updates = now.replayed_steps // limiter.batch_steps
            drifts.append(float(limiter.drift(now.inserted_steps, updates)))


def train(
    mirror: Mirror, client: ReplayClient, limiter: CreditLimiter, fence: int, updates: int
) -> int:
    """Do as a learner does, without learning."""
    done = 0
    while done < updates:
        mirror.absorb()
        if limiter.may_start_update(mirror.size_steps, mirror.inserted_steps, done):
            assert mirror.valid_starts > 0
            assert_whole(windows(mirror, done, 4))
            done += 1
            client.settle(fence, limiter.replayed_steps(done), limiter.budget(done))
        else:
            assert mirror.wait(10), limiter.reason
    return done


def test_replaced_learner_can_no_longer_settle(client: ReplayClient) -> None:
    client.create(SCHEMA, UNBOUNDED)
    old = client.acquire_fence()
    client.acquire_fence()
    with pytest.raises(ReplayFenced):
        client.settle(old, 1, 1)


def test_stream_renamed_by_a_new_incarnation_is_another_stream(client: ReplayClient) -> None:
    client.create(SCHEMA, UNBOUNDED)
    with following(client) as mirror:
        insert_many(client, 0, 2)
        assert insert(client, renamed(chunk(1, 1), stream="s0", incarnation=2)) == "OK"
        absorb_until(mirror, lambda: mirror.inserted_steps == 24)
        assert mirror.valid_starts == 16 - WINDOW + 1


def test_tail_that_cannot_go_on_is_raised_in_the_learner(tmp_path: Path) -> None:
    with EmbeddedServer(tmp_path, max_memory_bytes=2**26) as guarded:
        client = ReplayClient(guarded.url)
        client.create(SCHEMA, UNBOUNDED)
        with following(client) as mirror:
            insert_many(client, 0, 2)
            absorb_until(mirror, lambda: mirror.inserted_steps == 16)
            with redis.Redis.from_url(guarded.url) as admin:
                admin.config_set("requirepass", "secret")
                admin.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            assert mirror.wait(10)
            with pytest.raises(ReplayAuthError):
                mirror.absorb()
            assert mirror.size_steps == 16
        client.close()


@pytest.fixture
def half_rebuilt(client: ReplayClient) -> Iterator[Mirror]:
    """A mirror that has fetched some of 300 chunks, more than it reads at a time."""
    client.create(SCHEMA, UNBOUNDED)
    insert_many(client, 0, 300)
    with following(client, queue_bytes=16 * SCHEMA.step_bytes) as mirror:
        assert mirror.wait(5)
        yield mirror


def test_rebuilding_yields_the_episodes_of_the_log_and_ends(half_rebuilt: Mirror) -> None:
    episodes = [event for events in half_rebuilt.rebuild() for event in events]
    assert half_rebuilt.size_steps == 2400 and half_rebuilt.rebuild_share == 1.0
    assert all(event.env_steps <= 2400 for event in episodes)


def test_rebuilding_ends_if_the_server_loses_its_data(
    half_rebuilt: Mirror, server: EmbeddedServer
) -> None:
    with redis.Redis.from_url(server.url) as admin:
        admin.flushall()
    with pytest.raises(ReplayMissing, match="lost its data .* start again"):
        for _ in half_rebuilt.rebuild():
            pass


def test_rebuilding_gives_a_silent_server_up(tmp_path: Path) -> None:
    with EmbeddedServer(tmp_path, max_memory_bytes=2**26) as silent:
        client = ReplayClient(silent.url, timeout_s=2.0)
        client.create(SCHEMA, UNBOUNDED)
        insert_many(client, 0, 300)  # more than are read at a time
        with following(client, queue_bytes=16 * SCHEMA.step_bytes) as mirror:
            assert mirror.wait(5)
            silent.stop()
            with pytest.raises(ReplayTimeout, match="sent nothing for 1 s .*cannot be used"):
                for _ in mirror.rebuild(patience_s=1.0):
                    pass
        client.close()


def test_chunks_wait_at_the_byte_limit_of_the_queue(client: ReplayClient) -> None:
    client.create(SCHEMA, UNBOUNDED)
    insert_many(client, 0, 20)
    with following(client, queue_bytes=3 * 8 * SCHEMA.step_bytes) as mirror:
        assert mirror.wait(10)
        mirror._logs[0].tail._thread.join(0.3)
        assert mirror.lag_chunks == 3 and mirror.rebuild_share == 0.0
        absorb_until(mirror, lambda: mirror.caught_up)
        assert mirror.size_steps == 160


def test_window_rows_stay_in_range_while_there_is_no_window(client: ReplayClient) -> None:
    client.create(SCHEMA, UNBOUNDED)
    with following(client) as mirror:
        rows = window_rows(
            torch.rand(8, dtype=torch.float64),
            torch.full((8,), -1),
            mirror.valid_cumsum,
            mirror.next_page,
            mirror.page_steps,
            mirror.window_steps,
        )
        assert (rows >= 0).all() and (rows < len(mirror.columns["step"])).all()
