"""The checker passes what the service makes, and names whatever somebody else has changed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from replay_service import (
    CreditLimiter,
    EmbeddedServer,
    Limits,
    ReplayClient,
    ReplayTimeout,
    ReplayUnavailable,
    check_server,
    encode_chunk,
)
from replay_service.admin import ReplayAdmin
from tests.replay_service.records import (
    SCHEMA,
    UNBOUNDED,
    chunk,
    columns,
    insert,
    insert_many,
    renamed,
)

SMALL = Limits(capacity_steps=80, capacity_bytes=2**27)
Raw = redis.Redis


@pytest.fixture
def raw(server: EmbeddedServer) -> Iterator[Raw]:
    """A connection for doing what no client of ours would do."""
    with redis.Redis.from_url(server.url) as made:
        yield made


@pytest.fixture
def filled(client: ReplayClient) -> ReplayClient:
    """Two streams of six chunks, in turns."""
    client.create(SCHEMA, UNBOUNDED)
    for seq in range(1, 7):
        for slot in (0, 1):
            made = chunk(slot, seq)
            blob = encode_chunk(made, SCHEMA, "raw")
            assert client.insert(SCHEMA, made.sid, seq, made.steps, blob).code == "OK"
    return client


def letters(client: ReplayClient, **options: Any) -> dict[str, int]:
    """Return how many violations of which invariant there are."""
    return dict(check_server(client, timeout_s=30, **options).findings.found)


def test_untouched_replay_passes_and_is_summed_up(filled: ReplayClient) -> None:
    report = check_server(filled)
    assert report.ok and not report.violations and not report.notes
    assert (report.chunks, report.steps) == (12, 96)
    assert report.size_bytes == filled.stats().size_bytes
    stream = report.streams["s1@1"]
    assert (stream.first_seq, stream.last_seq, stream.first_step, stream.steps) == (1, 6, 0, 48)
    assert report.scope["C"] == "exactly" and "needs" in report.scope["F"]


def test_empty_and_evicted_and_lowered_replays_pass(client: ReplayClient) -> None:
    client.create(SCHEMA, SMALL)
    assert check_server(client).ok
    insert_many(client, 0, 30)
    insert_many(client, 1, 3)
    client.close_stream("s1@1", 3)
    client.create(SCHEMA, Limits(capacity_steps=16, capacity_bytes=2**27))
    report = check_server(client)
    assert report.ok and report.steps == 80 and report.streams["s0@1"].first_seq == 24
    client.evict(0, 0)
    report = check_server(client)
    assert report.ok and report.chunks == 0 and report.streams == {}


def test_contents_are_equal_whatever_the_order_of_streams(filled: ReplayClient, raw: Raw) -> None:
    one = check_server(filled)
    raw.flushall()
    filled.create(SCHEMA, UNBOUNDED)
    insert_many(filled, 1, 6)
    insert_many(filled, 0, 6)
    other = check_server(filled)
    assert one.contents_sha256 == other.contents_sha256 and one.streams == other.streams
    insert_many(filled, 0, 1, start=7)
    assert check_server(filled).contents_sha256 != one.contents_sha256
    assert check_server(filled, contents=False).contents_sha256 == ""


def drop_payload(raw: Raw) -> None:
    raw.delete("{rp0}:c:s1@1:3")


def cut_payload(raw: Raw) -> None:
    raw.set("{rp0}:c:s1@1:3", b"short")


def flip_payload(raw: Raw) -> None:
    raw.setrange("{rp0}:c:s1@1:3", 300, b"\x00\xff\x00\xff")


def exchange_payloads(raw: Raw) -> None:
    three, four = raw.get("{rp0}:c:s1@1:3"), raw.get("{rp0}:c:s1@1:4")
    raw.set("{rp0}:c:s1@1:3", four)  # type: ignore[arg-type]
    raw.set("{rp0}:c:s1@1:4", three)  # type: ignore[arg-type]


def let_payload_expire(raw: Raw) -> None:
    raw.expire("{rp0}:c:s1@1:3", 600)


def leave_payload_behind(raw: Raw) -> None:
    raw.set("{rp0}:c:s1@1:9", b"x")


def drop_entry(raw: Raw) -> None:
    entries = raw.xrange("{rp0}:log")
    raw.xdel("{rp0}:log", entries[5][0])


def repeat_entry(raw: Raw) -> None:
    entries = raw.xrange("{rp0}:log")
    raw.delete("{rp0}:log")
    for at, (entry_id, fields) in enumerate(entries):
        raw.xadd("{rp0}:log", entries[5][1] if at == 7 else fields, id=entry_id)


def add_entry(raw: Raw) -> None:
    raw.xadd("{rp0}:log", raw.xrange("{rp0}:log")[5][1], id=f"{2**41}-13")


def rewind_stream(raw: Raw) -> None:
    raw.hset("{rp0}:seq", "s1@1", "5")


def forget_stream(raw: Raw) -> None:
    raw.hdel("{rp0}:seq", "s1@1")


def miscount(field: str) -> Callable[[Raw], None]:
    def change(raw: Raw) -> None:
        raw.hincrby("{rp0}:meta", field, 1)

    change.__name__ = f"miscount_{field}"
    return change


@pytest.mark.parametrize(
    ("damage", "want", "says"),
    [
        (drop_payload, {"C": 1}, "stream s1@1 seq 3: the chunk is missing: got 0 bytes"),
        (cut_payload, {"C": 1}, "stream s1@1 seq 3: the stored chunk has another size"),
        (flip_payload, {"C": 1}, "stream s1@1 seq 3: the chunk cannot be decoded: got checksum"),
        (exchange_payloads, {"C": 2}, "not the one that the log names: got ('s1@1', 4, 8)"),
        (let_payload_expire, {"C": 1}, "stream s1@1 seq 3: a chunk of the log is going to expire"),
        (leave_payload_behind, {"C": 1}, "stream s1@1 seq 9: a stored chunk is not in the log"),
        (drop_entry, {"A": 1, "C": 5}, "stream s1@1 seq 4: chunks are missing before this one"),
        (repeat_entry, {"A": 1, "B": 1, "C": 2}, "stream s1@1 seq 3: a chunk comes twice or out"),
        (add_entry, {"C": 1}, "the last log entry: got 12, expected 13"),
        (rewind_stream, {"C": 1}, "stream s1@1: the server's newest chunk of a stream is not"),
        (forget_stream, {"C": 1}, "stream s1@1: the log holds a stream that the server has forg"),
        (miscount("size"), {"C": 2}, "steps held and the log: got 97, expected 96"),
        (miscount("bytes"), {"C": 1}, "bytes held and the log"),
        (miscount("chunks"), {"C": 1}, "chunks held and the log: got 13, expected 12"),
        (miscount("committed"), {"C": 1}, "committed chunks and the log: got 13, expected 12"),
        (miscount("evicted"), {"C": 2}, "evicted steps and the start of the log"),
    ],
)
def test_each_kind_of_damage_is_named(
    filled: ReplayClient, raw: Raw, damage: Callable[[Raw], None], want: dict[str, int], says: str
) -> None:
    damage(raw)
    report = check_server(filled)
    told = [str(violation) for violation in report.violations]
    assert any(says in line for line in told), told
    # The two readings of contradicting counters are one finding each.
    counters = sum("evicted + held" in line for line in told)
    found = dict(report.findings.found)
    found["C"] = found.get("C", 0) - max(counters - 1, 0)
    assert {key: value for key, value in found.items() if value} == want, told


def test_missing_and_repeated_and_torn_records_are_found_in_the_contents(
    client: ReplayClient,
) -> None:
    client.create(SCHEMA, UNBOUNDED)
    insert_many(client, 0, 2)
    for slot, first_step in ((0, 20), (1, 0)):
        made = renamed(chunk(slot, 3 if slot == 0 else 1), first_step=first_step)
        assert insert(client, made) == "OK"
    again = renamed(chunk(1, 2), first_step=4)
    assert insert(client, again) == "OK"
    broken = columns(2, 0, 12)
    broken["is_first"][10] = False
    torn = renamed(chunk(2, 1, 12), columns=broken)
    blob = encode_chunk(torn, SCHEMA)
    assert client.insert(SCHEMA, torn.sid, 1, 12, blob).code == "OK"
    report = check_server(client)
    missing, twice, episode = report.violations
    assert (missing.invariant, missing.sid, missing.seq, missing.step) == ("A", "s0@1", 3, 20)
    assert (missing.got, missing.expected) == ("20", "16")
    assert (twice.invariant, twice.sid, twice.seq, twice.step) == ("B", "s1@1", 2, 4)
    assert (episode.invariant, episode.sid, episode.step) == ("A", "s2@1", 10)
    assert letters(client, contents=False) == {}


def test_end_of_an_episode_at_the_end_of_a_chunk_is_remembered(client: ReplayClient) -> None:
    client.create(SCHEMA, UNBOUNDED)
    assert insert(client, chunk(0, 1, 10)) == "OK"
    unbegun = columns(0, 10, 10)
    unbegun["is_first"][0] = False
    assert insert(client, renamed(chunk(0, 2, 10), columns=unbegun)) == "OK"
    assert [v.step for v in check_server(client).violations] == [10]


def test_acknowledged_chunks_must_be_there_or_evicted_or_excused(client: ReplayClient) -> None:
    client.create(SCHEMA, SMALL)
    insert_many(client, 0, 30)
    there = {"s0@1": 30}
    assert letters(client, acknowledged=there) == {}
    report = check_server(client, acknowledged={"s0@1": 31, "s1@1": 2})
    assert [(v.invariant, v.sid, v.seq) for v in report.violations] == [
        ("E", "s0@1", 31),
        ("E", "s1@1", 1),
    ]
    assert letters(client, acknowledged={"s1@1": 2}, excused=["s1@1"]) == {}


def account() -> CreditLimiter:
    return CreditLimiter(
        train_ratio=2, batch_steps=16, chunk_steps=8, min_size_steps=16, capacity_steps=1000
    )


def test_account_in_its_band_passes_and_is_told(client: ReplayClient) -> None:
    limiter = account()
    limits = Limits(capacity_steps=10**6, capacity_bytes=2**27, budget_steps=limiter.budget(0))
    client.create(SCHEMA, limits)
    insert_many(client, 0, 6)
    report = check_server(client, account=limiter)
    assert report.ok and report.notes == ["drift 64 replayed steps, band [-64, 64]"]
    client.settle(client.acquire_fence(), 12 * 16, limiter.budget(12))
    report = check_server(client, account=limiter)
    assert report.ok and "is outside [-64, 64]: updates wait" in report.notes[0]


def test_budget_above_what_training_has_paid_for_is_a_violation(client: ReplayClient) -> None:
    limiter = account()
    client.create(SCHEMA, UNBOUNDED)
    assert "no train ratio is enforced" in check_server(client, account=limiter).notes[0]
    client.settle(client.acquire_fence(), 16, limiter.budget(1) + 1)
    report = check_server(client, account=limiter)
    assert [(v.invariant, v.got, v.expected) for v in report.violations] == [
        ("D", "budget 57", "at most 56")
    ]


def test_either_side_that_goes_on_outside_the_band_is_a_violation(client: ReplayClient) -> None:
    from dataclasses import replace

    from replay_service.audit import Findings
    from replay_service.invariants import judge_account

    client.create(SCHEMA, UNBOUNDED)
    limiter, fence = account(), client.acquire_fence()
    client.settle(fence, 160, limiter.budget(10))
    after, findings = client.stats(), Findings()
    judge_account(limiter, replace(after, replayed_steps=144), after, findings)
    assert [v.problem for v in findings.violations] == ["updates went on outside the band"]
    resumed = Findings()
    before = replace(after, replayed_steps=144, fence=fence - 1)
    assert "updates wait" in judge_account(limiter, before, after, resumed)[0]
    assert not resumed.found


def test_check_holds_while_others_write_and_evict(client: ReplayClient) -> None:
    client.create(SCHEMA, SMALL)
    insert_many(client, 0, 10)
    stop = threading.Event()

    def write() -> None:
        seq = 11
        while not stop.is_set():
            insert_many(client, 0, 1, start=seq)
            seq += 1

    writer = threading.Thread(target=write)
    writer.start()
    try:
        reports = [check_server(client) for _ in range(10)]
    finally:
        stop.set()
        writer.join()
    assert all(report.ok for report in reports), [r.violations for r in reports]
    assert any("moved" in note for report in reports for note in report.notes)
    assert check_server(client).scope["C"] == "exactly"


def test_server_that_is_emptied_during_every_check_is_not_judged(
    filled: ReplayClient, raw: Raw
) -> None:
    left = [5, 4, 3]

    def empty(done: int, total: int) -> None:
        raw.flushall()
        filled.create(SCHEMA, UNBOUNDED)
        insert_many(filled, 0, left.pop(0))

    with pytest.raises(ReplayUnavailable, match="restarted or was emptied during each of 3"):
        check_server(filled, progress=empty)


def test_check_without_a_replay_or_without_time_says_so(client: ReplayClient, raw: Raw) -> None:
    with pytest.raises(ReplayUnavailable, match="no replay has been created"):
        check_server(client)
    client.create(SCHEMA, UNBOUNDED)
    insert_many(client, 0, 2)
    with pytest.raises(ReplayTimeout, match=r"not done within 0 s \(2 of 2 chunks\)"):
        check_server(client, timeout_s=0)


def test_quarantined_chunks_are_told(filled: ReplayClient) -> None:
    entry = filled.read_log("0", 1, 0.01)[0]
    filled.quarantine(entry, b"head", "checksum differs")
    assert check_server(filled).notes == [
        "1 chunks are in quarantine, the newest is number 1 of s0@1: checksum differs"
    ]


def test_pages_are_bounded_in_bytes_and_end_where_asked(client: ReplayClient) -> None:
    client.create(SCHEMA, Limits(capacity_steps=10**6, capacity_bytes=2**27))
    for seq in range(1, 301):
        made = chunk(0, seq, 2)
        blob = encode_chunk(made, SCHEMA, "raw")
        assert client.insert(SCHEMA, made.sid, seq, 2, blob).code == "OK"
    with ReplayAdmin.like(client) as admin:
        pages = list(admin.pages(290, SCHEMA))
        assert [entry.seq for page in pages for entry in page] == list(range(1, 291))
        assert admin.sizes([pages[0][0].key, "nothing"]) == [pages[0][0].size_bytes, 0]
