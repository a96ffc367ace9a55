"""The protocol against a reference of forty lines, in random orders, on a real server."""

from __future__ import annotations

import copy
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from benchmarks.faults.rig import until
from replay_service import (
    Chunk,
    EmbeddedServer,
    Limits,
    ReplayClient,
    ReplayFenced,
    check_server,
    encode_chunk,
)
from tests.replay_service.records import SCHEMA, columns, wait_written

pytestmark = [pytest.mark.faults, pytest.mark.integration]

EVICTED_AT_ONCE = 8
LONGEST = 8
MOST_CUT = 3_500


def steps_of(slot: int, seq: int) -> int:
    """Return the length of a chunk: any chunk of a name and number is the same one."""
    return 1 + (slot * 7 + seq * 5) % LONGEST


def make(sid: str, seq: int) -> Chunk:
    """Return a chunk of a stream."""
    slot, incarnation = int(sid[1:].partition("@")[0]), int(sid.partition("@")[2])
    first, steps = sum(steps_of(slot, at) for at in range(1, seq)), steps_of(slot, seq)
    return Chunk(f"s{slot}", incarnation, seq, first, columns(slot, first, steps))


@dataclass
class Reference:
    """What the server has to hold."""

    capacity: int = 60
    min_size: int = 20
    budget: int = 100
    fence: int = 0
    sampled: int = 0
    sampled_fence: int = 0
    inserted: int = 0
    committed: int = 0
    evicted: int = 0
    log: list[tuple[str, int, int]] = field(default_factory=list)
    streams: dict[str, tuple[int, bool]] = field(default_factory=dict)
    lives: dict[str, int] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return sum(steps for _, _, steps in self.log)

    def open(self, name: str) -> int:
        before = self.lives.get(name)
        self.lives[name] = (before or 0) + 1
        if before is not None:
            self.close(f"{name}@{before}")
        return self.lives[name]

    def close(self, sid: str) -> None:
        last, _ = self.streams.get(sid, (0, False))
        if (sid, last) in [(one, seq) for one, seq, _ in self.log]:
            self.streams[sid] = (last, True)
        else:
            self.streams.pop(sid, None)

    def insert(self, sid: str, seq: int, steps: int) -> str:
        last, closed = self.streams.get(sid, (0, False))
        if seq != last + 1:
            return "DUP" if seq <= last else "GAP"
        if self.size >= self.min_size and self.inserted + steps > self.budget:
            return "WAIT"
        chunks = freed = 0
        while self.size > self.capacity - steps and (chunks < EVICTED_AT_ONCE or freed < steps):
            if not self.log:
                break
            old, number, gone = self.log.pop(0)
            chunks, freed, self.evicted = chunks + 1, freed + gone, self.evicted + gone
            if self.streams.get(old) == (number, True):
                del self.streams[old]
        self.log.append((sid, seq, steps))
        self.streams[sid] = (seq, closed)
        self.inserted, self.committed = self.inserted + steps, self.committed + 1
        return "OK"

    def settle(self, fence: int, sampled: int, budget: int) -> None:
        if fence != self.sampled_fence or sampled >= self.sampled:
            self.sampled, self.sampled_fence, self.budget = sampled, fence, budget


class Protocol(RuleBasedStateMachine):
    """One server; every rule is done to it and to the reference."""

    server: EmbeddedServer

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
        report = check_server(self.client)
        self.client.close()
        assert report.ok, report.violations

    def _create(self) -> None:
        model = self.model
        self.client.create(
            SCHEMA,
            Limits(
                capacity_steps=model.capacity,
                capacity_bytes=2**26,
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
        assert reply.code == self.model.insert(sid, seq, chunk.steps), (sid, seq, reply)
        # A power cut may end between two inserts of one rule.
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

    @rule(capacity=st.integers(20, 90))
    def change_capacity(self, capacity: int) -> None:
        self.model.capacity = capacity
        self._create()

    @rule(cut_bytes=st.sampled_from([0, 1, 300, 1_500, MOST_CUT]))
    def restart(self, cut_bytes: int) -> None:
        wait_written(self.server.url)
        os.kill(self.server.process_id, 9)
        until(lambda: not self.server.running, 10)
        (path,) = (self.server.directory / "appendonlydir").glob("*.incr.aof")
        os.truncate(path, max(path.stat().st_size - cut_bytes, 0))
        self.server.start()
        self._roll_back()
        self._fill_log()

    def _roll_back(self) -> None:
        """Go back to the moment whose state the server holds now; there must be one."""
        for past in reversed(self.history):
            if self._held() == _expected(past):
                self.model = copy.deepcopy(past)
                self.newest = self.client.last_log_id() or self.newest
                return
        raise AssertionError(f"the server never held {self._held()}")

    def _stored(self) -> dict[str, int | str]:
        with redis.Redis.from_url(self.server.url, decode_responses=True) as admin:
            found: Any = admin.hgetall("{rp0}:meta")
        return dict(found)

    def _held(self) -> dict[str, Any]:
        with redis.Redis.from_url(self.server.url, decode_responses=True) as admin:
            streams: Any = admin.hgetall("{rp0}:seq")
        meta = self._stored()
        entries = self.client.read_log("0", 10**6, 0.001)
        numbers = ("inserted", "committed", "evicted", "size", "fence", "sampled", "budget")
        return {
            **{name: int(meta[name]) for name in (*numbers, "cap_steps")},
            "log": [(entry.sid, entry.seq, entry.steps) for entry in entries],
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
        "cap_steps": model.capacity,
        "log": model.log,
        "streams": {sid: f"{seq}{'c' * closed}" for sid, (seq, closed) in model.streams.items()},
        "lives": model.lives,
    }


@pytest.mark.parametrize("examples", [4, pytest.param(40, marks=pytest.mark.exhaustive)])
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
