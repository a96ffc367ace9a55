"""The protocol against a reference of forty lines, in random orders, on a real server."""

from __future__ import annotations

import copy
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import redis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from benchmarks.faults.rig import until
from replay_service import (
    Chunk,
    Column,
    EmbeddedServer,
    Limits,
    ReplayClient,
    ReplayFenced,
    Schema,
    check_server,
    encode_chunk,
)
from replay_service.chunk import max_blob_bytes
from replay_service.client import INLINE_BYTES
from tests.replay_service import records
from tests.replay_service.records import wait_written

pytestmark = [pytest.mark.faults, pytest.mark.integration, pytest.mark.timeout(900)]

EVICTED_AT_ONCE = 8
LONGEST = 8
NOISE_BYTES = 3_000
NOISY_SLOT = 2
"""Its chunks do not compress: six steps and more are too large to travel with their commit."""
SCHEMA = Schema((*records.SCHEMA.columns, Column("noise", "uint8", (NOISE_BYTES,))))
LARGEST_BYTES = max_blob_bytes(SCHEMA, LONGEST)
REPLIES = {"OK", "DUP", "GAP", "WAIT", "SCHEMA", "TOOBIG", "unsent NOPAYLOAD", "large OK"}
REPLIES |= {"a kill", "a power cut"}
"""What random orders have to meet; fewer would prove less than the test's name says."""
MOST_CUT = 2 * LARGEST_BYTES


def steps_of(slot: int, seq: int) -> int:
    """Return the length of a chunk: any chunk of a name and number is the same one."""
    return 1 + (slot * 7 + seq * 5) % LONGEST


def make(sid: str, seq: int) -> Chunk:
    """Return a chunk of a stream."""
    slot, incarnation = int(sid[1:].partition("@")[0]), int(sid.partition("@")[2])
    first, steps = sum(steps_of(slot, at) for at in range(1, seq)), steps_of(slot, seq)
    noise = np.zeros((steps, NOISE_BYTES), np.uint8)
    if slot == NOISY_SLOT:
        noise = np.random.default_rng(first).integers(0, 256, noise.shape, np.uint8)
    held = {**records.columns(slot, first, steps), "noise": noise}
    return Chunk(f"s{slot}", incarnation, seq, first, held)


@dataclass
class Reference:
    """What the server has to hold."""

    capacity: int = 60
    capacity_bytes: int = 2**26
    min_size: int = 20
    budget: int = 40
    fence: int = 0
    sampled: int = 0
    sampled_fence: int = 0
    inserted: int = 0
    committed: int = 0
    evicted: int = 0
    log: list[tuple[str, int, int, int]] = field(default_factory=list)
    streams: dict[str, tuple[int, bool]] = field(default_factory=dict)
    lives: dict[str, int] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return sum(steps for _, _, steps, _ in self.log)

    @property
    def bytes(self) -> int:
        return sum(size for _, _, _, size in self.log)

    def open(self, name: str) -> int:
        before = self.lives.get(name)
        self.lives[name] = (before or 0) + 1
        if before is not None:
            self.close(f"{name}@{before}")
        return self.lives[name]

    def close(self, sid: str) -> None:
        last, _ = self.streams.get(sid, (0, False))
        if (sid, last) in [(one, seq) for one, seq, _, _ in self.log]:
            self.streams[sid] = (last, True)
        else:
            self.streams.pop(sid, None)

    def insert(self, sid: str, seq: int, steps: int, size: int, *, sent: bool = True) -> str:
        last, closed = self.streams.get(sid, (0, False))
        if seq != last + 1:
            return "DUP" if seq <= last else "GAP"
        if steps > min(LONGEST, self.capacity) or size > min(LARGEST_BYTES, self.capacity_bytes):
            return "TOOBIG"
        if self.size >= self.min_size and self.inserted + steps > self.budget:
            return "WAIT"
        if not sent:
            return "NOPAYLOAD"
        chunks = freed = 0
        while self.log and (
            self.size > self.capacity - steps or self.bytes > self.capacity_bytes - size
        ):
            if chunks >= EVICTED_AT_ONCE and freed >= steps:
                break
            old, number, gone, _ = self.log.pop(0)
            chunks, freed, self.evicted = chunks + 1, freed + gone, self.evicted + gone
            if self.streams.get(old) == (number, True):
                del self.streams[old]
        self.log.append((sid, seq, steps, size))
        self.streams[sid] = (seq, closed)
        self.inserted, self.committed = self.inserted + steps, self.committed + 1
        return "OK"

    def settle(self, fence: int, sampled: int, budget: int) -> None:
        if fence != self.sampled_fence or sampled >= self.sampled:
            self.sampled, self.sampled_fence, self.budget = sampled, fence, budget


class Protocol(RuleBasedStateMachine):
    """One server; every rule is done to it and to the reference."""

    server: EmbeddedServer
    met: ClassVar[set[str]] = set()
    """Replies so far; those to payloads that were sent before their commit count apart."""

    def __init__(self) -> None:
        super().__init__()
        with redis.Redis.from_url(self.server.url) as admin:
            admin.flushall()
        self.client = ReplayClient(self.server.url)
        self.model = Reference()
        self._create()
        self._fill_log()
        self.history = [copy.deepcopy(self.model)]
        self.newest = ""

    def teardown(self) -> None:
        # Random rules alone may leave every restart out. The same example always ends the same way.
        self.restart(1_500 if len(self.history) % 2 else 0)
        report = check_server(self.client)
        self.client.close()
        assert report.ok, report.violations

    def _create(self) -> None:
        model = self.model
        self.client.create(
            SCHEMA,
            Limits(
                capacity_steps=model.capacity,
                capacity_bytes=model.capacity_bytes,
                min_size_steps=model.min_size,
                budget_steps=model.budget,
                max_chunk_steps=LONGEST,
            ),
        )

    def _fill_log(self) -> None:
        """Write so much to the log that no cut goes back further than this moment."""
        with redis.Redis.from_url(self.server.url) as admin:
            admin.set("filler", "x" * MOST_CUT)

    def _sids(self) -> list[str]:
        return [f"{name}@{life}" for name, most in self.model.lives.items() for life in (most, 1)]

    def _insert(self, sid: str, seq: int) -> None:
        chunk = make(sid, seq)
        blob = encode_chunk(chunk, SCHEMA)
        reply = self.client.insert(SCHEMA, sid, seq, chunk.steps, blob)
        want = self.model.insert(sid, seq, chunk.steps, len(blob))
        assert reply.code == want, (sid, seq, reply)
        self.met.add(f"large {want}" if len(blob) > INLINE_BYTES else want)
        # A power cut may end between two inserts of one rule.
        self.history.append(copy.deepcopy(self.model))

    @initialize()
    def open_one_stream_of_each_slot(self) -> None:
        # A short example may never do it by itself, and would then insert nothing at all.
        for slot in range(3):
            self.open_stream(slot)
            # A power cut may end between two of them.
            self.history.append(copy.deepcopy(self.model))

    @rule(slot=st.integers(0, 2))
    def open_stream(self, slot: int) -> None:
        assert self.client.open_stream(f"s{slot}") == self.model.open(f"s{slot}")

    @precondition(lambda self: self.model.lives)
    @rule(data=st.data(), count=st.integers(1, 6))
    def insert_next(self, data: st.DataObject, count: int) -> None:
        sid = data.draw(st.sampled_from(self._sids()))
        for _ in range(count):
            self._insert(sid, self.model.streams.get(sid, (0, False))[0] + 1)

    @precondition(lambda self: self.model.lives)
    @rule(data=st.data(), off=st.sampled_from([-3, -1, 0, 2, 5]))
    def insert_out_of_order(self, data: st.DataObject, off: int) -> None:
        sid = data.draw(st.sampled_from(self._sids()))
        self._insert(sid, max(self.model.streams.get(sid, (0, False))[0] + off, 1))

    @precondition(lambda self: self.model.lives)
    @rule(data=st.data())
    def commit_what_was_perhaps_sent(self, data: st.DataObject) -> None:
        sid = data.draw(st.sampled_from(self._sids()))
        seq = self.model.streams.get(sid, (0, False))[0] + 1
        chunk = make(sid, seq)
        blob = encode_chunk(chunk, SCHEMA)
        # A large chunk that had to wait, or whose commit a cut took, is still there.
        with redis.Redis.from_url(self.server.url) as admin:
            sent = bool(admin.exists(self.client.payload_key(sid, seq)))
        reply = self.client.insert(SCHEMA, sid, seq, chunk.steps, blob, send=False)
        want = self.model.insert(sid, seq, chunk.steps, len(blob), sent=sent)
        assert reply.code == want, (sid, seq, reply)
        self.met.add(f"unsent {want}")

    @precondition(lambda self: self.model.lives)
    @rule(data=st.data(), wrong=st.sampled_from(["schema", "steps", "bytes"]))
    def insert_what_is_refused(self, data: st.DataObject, wrong: str) -> None:
        sid = data.draw(st.sampled_from(self._sids()))
        seq = self.model.streams.get(sid, (0, False))[0] + 1
        schema = records.SCHEMA if wrong == "schema" else SCHEMA
        steps = LONGEST + 1 if wrong == "steps" else 1
        blob = b"x" * (LARGEST_BYTES + 1 if wrong == "bytes" else 1)
        reply = self.client.insert(schema, sid, seq, steps, blob, send=False)
        want = "SCHEMA" if wrong == "schema" else self.model.insert(sid, seq, steps, len(blob))
        assert reply.code == want and want in ("SCHEMA", "TOOBIG"), (sid, seq, reply)
        self.met.add(want)

    @precondition(lambda self: self.model.streams)
    @rule(data=st.data())
    def close_stream(self, data: st.DataObject) -> None:
        sid = data.draw(st.sampled_from(sorted(self.model.streams)))
        last, closed = self.model.streams[sid]
        self.client.close_stream(sid, last)
        if not closed:
            self.model.close(sid)

    @rule()
    def acquire_fence(self) -> None:
        self.model.fence += 1
        assert self.client.acquire_fence() == self.model.fence

    @precondition(lambda self: self.model.fence)
    @rule(old=st.booleans(), sampled=st.integers(0, 500), more=st.integers(0, 80))
    def settle(self, old: bool, sampled: int, more: int) -> None:
        fence, budget = self.model.fence - old, self.model.inserted + more
        if old:
            with pytest.raises(ReplayFenced):
                self.client.settle(fence, sampled, budget)
            return
        self.model.settle(fence, sampled, budget)
        got = self.client.settle(fence, sampled, budget)
        assert got == (self.model.inserted, self.model.size)

    @rule(capacity=st.integers(20, 90), size=st.sampled_from([LARGEST_BYTES, 2**16, 2**26]))
    def change_capacity(self, capacity: int, size: int) -> None:
        self.model.capacity, self.model.capacity_bytes = capacity, size
        self._create()

    @rule(cut_bytes=st.sampled_from([0, 1, 300, 1_500, 3_500, MOST_CUT]))
    def restart(self, cut_bytes: int) -> None:
        wait_written(self.server.url)
        os.kill(self.server.process_id, 9)
        until(lambda: not self.server.running, 10)
        (path,) = (self.server.directory / "appendonlydir").glob("*.incr.aof")
        os.truncate(path, max(path.stat().st_size - cut_bytes, 0))
        self.server.start()
        # All was written, so that a kill alone takes nothing.
        self.met.add("a power cut" if cut_bytes else "a kill")
        self._roll_back(self.history if cut_bytes else self.history[-1:])
        self._fill_log()

    def _roll_back(self, moments: list[Reference]) -> None:
        """Go back to the moment whose state the server holds now; it must be one of these."""
        held = self._held()
        for past in reversed(moments):
            if held == _expected(past):
                self.model = copy.deepcopy(past)
                self.newest = self.client.last_log_id() or self.newest
                return
        raise AssertionError(f"the server held something else before: {held}")

    def _stored(self) -> dict[str, int | str]:
        with redis.Redis.from_url(self.server.url, decode_responses=True) as admin:
            found: Any = admin.hgetall("{rp0}:meta")
        return dict(found)

    def _held(self) -> dict[str, Any]:
        with redis.Redis.from_url(self.server.url, decode_responses=True) as admin:
            streams: Any = admin.hgetall("{rp0}:seq")
        meta = self._stored()
        entries = self.client.read_log("0", 10**6, 0.001)
        numbers = ("inserted", "committed", "evicted", "size", "bytes", "cap_steps", "cap_bytes")
        return {
            **{name: int(meta[name]) for name in (*numbers, "fence", "sampled", "budget")},
            "log": [(entry.sid, entry.seq, entry.steps, entry.size_bytes) for entry in entries],
            "streams": streams,
            "lives": {k.partition(":")[2]: int(v) for k, v in meta.items() if "incarnation" in k},
        }

    @invariant()
    def holds_what_the_reference_holds(self) -> None:
        assert self._held() == _expected(self.model)
        newest = self.client.last_log_id() or self.newest
        order = [tuple(map(int, entry.split("-"))) for entry in (self.newest, newest) if entry]
        assert order == sorted(order), "log ids went back"
        self.newest = newest
        self.history.append(copy.deepcopy(self.model))


def _expected(model: Reference) -> dict[str, Any]:
    return {
        "inserted": model.inserted,
        "committed": model.committed,
        "evicted": model.evicted,
        "size": model.size,
        "fence": model.fence,
        "sampled": model.sampled,
        "budget": model.budget,
        "bytes": model.bytes,
        "cap_steps": model.capacity,
        "cap_bytes": model.capacity_bytes,
        "log": model.log,
        "streams": {sid: f"{seq}{'c' * closed}" for sid, (seq, closed) in model.streams.items()},
        "lives": model.lives,
    }


@pytest.mark.parametrize("examples", [8, pytest.param(40, marks=pytest.mark.exhaustive)])
def test_every_order_of_events_leaves_what_the_reference_says(examples: int) -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        EmbeddedServer(Path(folder), max_memory_bytes=2**26) as server,
    ):
        Protocol.server = server
        Protocol.TestCase.settings = settings(
            max_examples=examples,
            stateful_step_count=30,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        Protocol.TestCase().runTest()
        assert Protocol.met >= REPLIES, REPLIES - Protocol.met
