"""Whatever stands in the log, and however large a payload is, the replay goes on and says so."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis

import replay_service.payloads
from replay_service import (
    EmbeddedServer,
    Limits,
    ReplayClient,
    ReplayConfig,
    Uploader,
    check_mirror,
    check_server,
    encode_chunk,
    export_archive,
)
from replay_service.chunk import MAX_CHUNK_STEPS, MAX_STREAM_CHARS, max_blob_bytes
from replay_service.entries import LogEntry, parse_entry
from tests.replay_service.records import (
    SCHEMA,
    UNBOUNDED,
    absorb_until,
    chunk,
    contents,
    insert,
    insert_many,
    write,
)
from tests.replay_service.test_mirror import following

LOG, PREFIX = "{rp0}:log", "{rp0}"
KEY = b"{rp0}:c:s0@1:1"
GOOD = {b"k": KEY, b"n": b"8", b"b": b"400", b"s": b"s0@1", b"q": b"1", b"g": b"0"}
HUGE = 64 * 1024**2
Raw = redis.Redis


@pytest.fixture
def raw(server: EmbeddedServer) -> Iterator[Raw]:
    """A connection for doing what no client of ours would do."""
    with redis.Redis.from_url(server.url) as made:
        yield made


def flat(fields: dict[bytes, bytes]) -> list[bytes]:
    return [word for pair in fields.items() for word in pair]


def parse(fields: list[bytes]) -> LogEntry:
    return parse_entry(b"5-7", fields, PREFIX)


def test_entry_of_an_insert_is_read() -> None:
    assert parse(flat(GOOD)) == LogEntry("5-7", KEY.decode(), 8, 400, "s0@1", 1, 0)
    assert parse(flat(GOOD)).number == 7


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({b"n": b"0"}, "n is b'0', expected an integer in [1, 1024]"),
        ({b"n": b"1025"}, "n is b'1025'"),
        ({b"n": b"-1"}, "n is b'-1'"),
        ({b"n": b"08"}, "n is b'08'"),
        ({b"n": "٣".encode()}, "n is b'"),
        ({b"b": b"0"}, "b is b'0'"),
        ({b"b": b"1e3"}, "b is b'1e3'"),
        ({b"b": b"9" * 100_000}, "b is b'9999"),
        ({b"q": b"0"}, "q is b'0'"),
        ({b"q": b"2"}, "k is b'{rp0}:c:s0@1:1', expected {rp0}:c:s0@1:2"),
        ({b"g": b" 1"}, "g is b' 1'"),
        ({b"g": b"nan"}, "g is b'nan'"),
        ({b"k": b"{rp0}:meta"}, "k is b'{rp0}:meta', expected {rp0}:c:s0@1:1"),
        ({b"k": b"{rp1}:c:s0@1:1"}, "k is b'{rp1}:c:s0@1:1'"),
        ({b"k": b"\xff"}, "k is b'\\xff'"),
        ({b"s": b""}, "s is b'', expected stream@incarnation"),
        ({b"s": b"s0"}, "s is b's0'"),
        ({b"s": b"\xff@1"}, "k is b'{rp0}:c:s0@1:1'"),
        ({b"s": b"a\n@1"}, "s is b'a\\n@1'"),
        ({b"s": b"\x1b[2J@1"}, "s is b'\\x1b[2J@1'"),
        ({b"s": b"x" * (MAX_STREAM_CHARS + 1) + b"@1"}, "s is b'xxx"),
    ],
)
def test_value_that_no_insert_writes_is_a_flaw(change: dict[bytes, bytes], says: str) -> None:
    entry = parse(flat(GOOD | change))
    assert says in entry.flaw and len(entry.flaw) < 500
    assert entry[:7] == ("5-7", "", 0, 0, "", 0, 0)


@pytest.mark.parametrize(
    "fields",
    [
        [],
        [b"x", b"1"],
        flat(GOOD)[:-2],
        flat(GOOD)[:-1],
        flat(GOOD) + [b"g", b"0"],
        [b"k", KEY, *flat(GOOD)[:-2]],
        flat(GOOD)[2:] + flat(GOOD)[:2],
        [b"x" * 1000] * 1000,
    ],
)
def test_missing_doubled_and_further_fields_are_a_flaw(fields: list[bytes]) -> None:
    entry = parse(fields)
    assert "expected k, n, b, s, q, g" in entry.flaw and len(entry.flaw) < 500


def test_entry_that_claims_more_bytes_than_its_steps_can_take_is_a_flaw() -> None:
    most = max_blob_bytes(SCHEMA, 8)
    assert not parse(flat(GOOD | {b"b": b"%d" % most})).judged(SCHEMA).flaw
    entry = parse(flat(GOOD | {b"b": b"%d" % (most + 1)}))
    assert not entry.flaw
    assert f"more than the {most} bytes of 8 steps" in entry.judged(SCHEMA).flaw
    assert entry.judged(SCHEMA).judged(SCHEMA) == entry.judged(SCHEMA)


VALUES = (
    *(b"", b"0", b"1", b"8", b"-1", b"+1", b"1.0", b"1e9", b"0x10", b"nan", b"inf", b" 1", b"1 "),
    *(b"9007199254740992", b"9007199254740993", b"18446744073709551616", b"9" * 5000),
    *(b"\xff\xfe", b"\0", b"s0@1", b"s0@-1", b"@1", b"s0@", b"a@b@3", "ä@1".encode(), b"\x1b[1m@1"),
    *(KEY, b"{rp0}:meta", b"{rp0}:log", b"{rp0}:c:", b"{rp1}:c:s0@1:1", b"k", b"n"),
)


class Forger:
    """Makes odd entries out of an insert's; equal seeds make equal entries."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)

    def next(self) -> list[bytes]:
        """Return the fields of the next one; now and then they are nothing odd."""
        fields = flat(GOOD)
        for _ in range(self._below(4)):
            way, at = self._below(6), self._below(max(len(fields), 1))
            if way == 0:
                del fields[at : at + 1 + self._below(2)]
            elif way == 1:
                fields[at:at] = fields[at : at + 2]
            elif way == 2:
                fields[at : at + 1] = [self._random.bytes(self._below(40))]
            else:
                fields[at : at + 1] = [VALUES[self._below(len(VALUES))]]
        return fields

    def _below(self, bound: int) -> int:
        return int(self._random.integers(bound))


def test_hundred_thousand_forged_entries_do_no_harm() -> None:
    forger, sound = Forger(1), 0
    for at in range(100_000):
        fields = forger.next()
        entry = parse(fields).judged(SCHEMA)
        sound += not entry.flaw
        assert len(entry.flaw) < 500, at
        if not entry.flaw:
            assert len(fields) == 12 and entry.key == f"{PREFIX}:c:{entry.sid}:{entry.seq}", at
            assert 1 <= entry.steps <= MAX_CHUNK_STEPS and entry.seq >= 1, at
            assert entry.size_bytes <= max_blob_bytes(SCHEMA, entry.steps), at
            assert entry.sid.isprintable() and entry.position >= 0, at
    assert 10_000 < sound < 90_000


def test_forged_entries_are_left_out_by_whoever_reads_the_log(
    client: ReplayClient, raw: Raw, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    client.create(SCHEMA, UNBOUNDED)
    forger, forged = Forger(2), 0

    def forge(count: int) -> int:
        made = 0
        while made < count:
            fields = forger.next()
            if len(fields) % 2 == 0 and fields and parse(fields).judged(SCHEMA).flaw:
                raw.execute_command("XADD", LOG, "*", *fields)
                made += 1
        return made

    insert_many(client, 0, 3)
    forged += forge(100)
    with following(client) as mirror:
        absorb_until(mirror, lambda: mirror.caught_up)
        assert mirror.rebuild_share == 1.0
        # Inserts go on behind them, and are followed, among more of them.
        for seq in range(4, 9):
            insert_many(client, 0, 1, start=seq)
            forged += forge(20)
        absorb_until(mirror, lambda: mirror.inserted_steps == 64)
        absorb_until(mirror, lambda: raw.xinfo_stream("{rp0}:dead")["entries-added"] >= forged)
        assert set(contents(mirror)) == {(0, step) for step in range(64)}
        assert mirror.missed_steps == 0
        assert check_mirror(mirror, client, complete=True).ok
    reasons = [fields[b"reason"].decode() for _, fields in raw.xrange("{rp0}:dead")]
    assert all("of the log is none of an insert's: " in reason for reason in reasons)
    with following(client) as rebuilt:
        absorb_until(rebuilt, lambda: rebuilt.caught_up)
        assert len(contents(rebuilt)) == 64
    # Of hundreds each reader names the first, and then one every ten seconds.
    told = [line for line in caplog.messages if line.startswith("entry_quarantined")]
    assert 2 <= len(told) < 30
    for whole in (True, False):
        report = check_server(client, contents=whole)
        assert report.findings.found == {"C": forged} and report.steps == 64
        assert "of the log is none of an insert's: " in str(report.violations[0])
        assert any("the newest is none of an insert's: entry " in note for note in report.notes)
    export_archive(client, tmp_path / "dump")


def test_forged_entries_neither_stop_inserts_nor_cost_others_their_place(
    client: ReplayClient, raw: Raw
) -> None:
    client.create(SCHEMA, Limits(capacity_steps=80, capacity_bytes=2**27))
    raw.set("{rp0}:other", b"kept")
    for seq in range(1, 30):
        insert_many(client, 0, 1, start=seq)
        raw.xadd(LOG, {"x": "1"})
        raw.xadd(LOG, {**GOOD, b"k": b"{rp0}:other"})
        raw.xadd(LOG, {**GOOD, b"n": b"nan"})
    stats = client.stats()
    assert (stats.size_steps, stats.chunks, stats.inserted_steps) == (80, 10, 29 * 8)
    assert raw.get("{rp0}:other") == b"kept"
    entries = client.read_log("0", 1000, 0.01)
    assert [entry.seq for entry in entries if not entry.flaw] == list(range(20, 30))
    assert len(entries) <= 10 + 3 * 11
    assert client.evict(0, 0) == 80 and client.stats().size_steps == 0


@pytest.mark.parametrize("number", [3, 2**64 - 1])
def test_inserts_go_on_behind_an_entry_of_the_far_future(tmp_path: Path, number: int) -> None:
    # A server of its own: it counts its lives on from there.
    with (
        EmbeddedServer(tmp_path, max_memory_bytes=2**26) as alone,
        closing(ReplayClient(alone.url)) as client,
        redis.Redis.from_url(alone.url) as raw,
    ):
        client.create(SCHEMA, Limits(capacity_steps=16, capacity_bytes=2**27))
        insert_many(client, 0, 2)
        raw.xadd(LOG, {"x": "1"}, id=f"{2**50}-{number}")
        insert_many(client, 0, 6, start=3)
        assert client.stats().epoch > 2**50 and client.stats().size_steps == 16
        assert [entry.seq for entry in client.read_log("0", 100, 0.01)] == [7, 8]
        assert check_server(client).ok


def test_log_that_takes_no_more_is_named_by_everybody_and_can_be_mended(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        EmbeddedServer(tmp_path, max_memory_bytes=2**26) as alone,
        closing(ReplayClient(alone.url)) as client,
        redis.Redis.from_url(alone.url) as raw,
    ):
        client.create(SCHEMA, Limits(capacity_steps=16, capacity_bytes=2**27))
        insert_many(client, 0, 2)
        raw.xadd(LOG, GOOD, id=f"{2**64 - 1}-{2**64 - 1}")
        for _ in range(2):
            made = encode_chunk(chunk(0, 3), SCHEMA)
            code, reasons = client.insert(SCHEMA, "s0@1", 3, 8, made)
            assert code == "NONE" and b"docs/security.md says how to mend it" in reasons[0]
        assert client.stats().inserted_steps == 16 and client.stats().epoch < 2**42
        told = [str(one) for one in check_server(client).violations]
        assert any("its id leaves no higher one for inserts" in one for one in told)
        with following(client) as mirror:
            absorb_until(mirror, lambda: raw.exists("{rp0}:dead") == 1)
        assert any("its id leaves no higher one for inserts" in one for one in caplog.messages)
        # As docs/security.md says.
        raw.flushall()
        client.create(SCHEMA, Limits(capacity_steps=16, capacity_bytes=2**27))
        insert_many(client, 0, 4)
        assert client.stats().size_steps == 16 and check_server(client).ok


@pytest.mark.parametrize("junk", [b"junk", b"", b"nan", b"inf", b"-1", b"1e400", b"9" * 5000])
def test_junk_for_counters_stops_no_insert(client: ReplayClient, raw: Raw, junk: bytes) -> None:
    client.create(SCHEMA, Limits(capacity_steps=80, capacity_bytes=2**27))
    insert_many(client, 0, 12)
    fields = ("committed", "inserted", "size", "bytes", "chunks", "evicted", "epoch", "dups")
    for seq, field in enumerate(fields, 13):
        raw.hset("{rp0}:meta", field, junk)
        insert_many(client, 0, 1, start=seq)
    assert insert(client, chunk(0, 1)) == "DUP"


@pytest.mark.parametrize("junk", [b"junk", b"", b"x1", b"-1", b"1e3", b"9" * 5000])
def test_stream_whose_place_nobody_knows_goes_on_under_another_incarnation(
    client: ReplayClient, raw: Raw, junk: bytes
) -> None:
    client.create(SCHEMA, UNBOUNDED)
    with Uploader(client, SCHEMA, ReplayConfig(chunk_steps=8)) as uploader:
        writer = uploader.open_stream("s0")
        write(writer, 0, 0, 16)
        writer.flush()
        assert uploader.drain(20.0)
        raw.hset("{rp0}:seq", "s0@1", junk)
        write(writer, 0, 16, 40)
        writer.flush()
        assert uploader.drain(20.0)
        assert writer.incarnation == 2 and uploader.stats.lost_chunks == 0
    with following(client) as mirror:
        absorb_until(mirror, lambda: mirror.caught_up)
        assert set(contents(mirror)) == {(0, step) for step in range(40)}


def peak_of(call: Callable[[], object]) -> int:
    """Return the most bytes that were allocated at once during a call."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_payload_that_is_larger_than_its_entry_says_is_never_pulled(
    client: ReplayClient, raw: Raw
) -> None:
    client.create(SCHEMA, UNBOUNDED)
    insert_many(client, 0, 4)
    entries = client.read_log("0", 10, 0.01)
    raw.set(entries[1].key, bytes(HUGE))
    assert peak_of(lambda: client.fetch(entries)) < 2**20
    found = client.fetch(entries)
    assert [
        len(blob or b"") - entry.size_bytes for entry, blob in zip(entries, found, strict=True)
    ] == [*(0, 1, 0, 0)]
    with following(client) as mirror:
        absorb_until(mirror, lambda: mirror.caught_up)
        assert mirror.missed_steps == 8 and len(contents(mirror)) == 24
    report = check_server(client)
    problem = f"the stored chunk has another size: got {HUGE} bytes"
    assert report.findings.found == {"C": 1} and problem in str(report.violations[0])


def test_payload_that_is_replaced_while_it_is_fetched_is_never_pulled(
    client: ReplayClient, raw: Raw, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.create(SCHEMA, UNBOUNDED)
    insert_many(client, 0, 4)
    entries = client.read_log("0", 10, 0.01)
    ask = replay_service.payloads._ask

    def replace_first(connection: Any, commands: list[Any]) -> list[Any]:
        if commands[0] == ("MULTI",):
            raw.set(entries[1].key, bytes(HUGE))
        return ask(connection, commands)

    monkeypatch.setattr(replay_service.payloads, "_ask", replace_first)
    sizes = [entry.size_bytes for entry in entries]
    found = list[int]()
    peak = peak_of(lambda: found.extend(len(blob or b"") for blob in client.fetch(entries)))
    # The replacement itself is sent from this process.
    assert peak < HUGE * 2.5 and found == [sizes[0], sizes[1] + 1, *sizes[2:]]


def test_huge_payload_with_a_huge_claim_is_never_pulled(client: ReplayClient, raw: Raw) -> None:
    client.create(SCHEMA, UNBOUNDED)
    insert_many(client, 0, 2)
    raw.set("{rp0}:c:s9@1:1", bytes(HUGE))
    claim = {b"k": b"{rp0}:c:s9@1:1", b"s": b"s9@1", b"b": b"%d" % HUGE, b"g": b"16"}
    raw.execute_command("XADD", LOG, "*", *flat(GOOD | claim))

    def follow() -> None:
        with following(client) as mirror:
            absorb_until(mirror, lambda: mirror.caught_up)
            assert mirror.size_steps == 16

    assert peak_of(follow) < HUGE // 4
    assert peak_of(lambda: check_server(client)) < HUGE // 4
    assert f"b is {HUGE}, more than the" in str(check_server(client).violations[0])


def test_odd_streams_counters_and_names_of_payloads_are_findings(
    client: ReplayClient, raw: Raw
) -> None:
    client.create(SCHEMA, UNBOUNDED)
    insert_many(client, 0, 2)
    raw.hset("{rp0}:seq", mapping={b"s\xff@1": b"junk", b"s7@1": b"9" * 5000})
    raw.set(b"{rp0}:c:\xff@1:1", b"x")
    raw.set(b"{rp0}:c:s1@1:" + b"9" * 5000, b"x")
    told = [str(one) for one in check_server(client).violations]
    assert any(r"s\xff@1: what the server remembers of a stream makes no sense" in t for t in told)
    assert any(r"stream \xff@1 seq 1: a stored chunk is not in the log" in one for one in told)
