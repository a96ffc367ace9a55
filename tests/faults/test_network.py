"""What is between the parts fails: messages are late, halved, lost, swallowed or refused."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from benchmarks.faults.rig import Rig, until

pytestmark = [pytest.mark.faults, pytest.mark.integration]

OUTAGES_S = [2.0, pytest.param(30.0, marks=pytest.mark.exhaustive)]
Recovered = Callable[..., None]


@pytest.mark.parametrize("kind", ["reset", "half", "lose", "cut", "delay"])
def test_messages_of_a_writer_are_hurt(rig: Rig, recovered: Recovered, kind: str) -> None:
    proxy = rig.proxy("writer")
    rig.writer(0, 1, proxy=proxy, pause_s=0.01)
    rig.wait_chunks(5)
    proxy.kinds, proxy.rate = frozenset({kind}), 0.4
    until(lambda: proxy.injected[kind] >= 30, 60, f"30 faults of the kind {kind}")
    proxy.rate = 0.0
    began = time.monotonic()
    rig.wait_chunks(2)
    recovered(time.monotonic() - began, 5.0)
    # What is only late is no failure to anybody.
    shown = {} if kind == "delay" else {"cannot be used": "ReplayUnavailable"}
    counters = rig.verify(shown=shown)
    assert counters["lost_chunks"] == counters["renewed_streams"] == counters["resent_chunks"] == 0
    # A lost reply is noticed as a duplicate and has no second effect.
    assert kind not in ("lose", "cut") or counters["DUP"] > 0


@pytest.mark.parametrize("outage_s", OUTAGES_S)
def test_a_writer_is_refused(rig: Rig, recovered: Recovered, outage_s: float) -> None:
    proxy = rig.proxy("writer")
    writer = rig.writer(0, proxy=proxy)
    rig.wait_chunks(10)
    proxy.refuse()
    until(lambda: "cannot be used" in writer.ask()["blocked_reason"], 10)
    time.sleep(outage_s)
    waiting = writer.ask()
    assert 0 < waiting["pending_chunks"] <= 2, "it waits instead of dropping or hoarding"
    proxy.heal()
    began = time.monotonic()
    rig.wait_chunks(2)
    recovered(time.monotonic() - began, 5.0)
    assert rig.verify(shown={"cannot be used": "ReplayUnavailable"})["lost_chunks"] == 0


@pytest.mark.parametrize("outage_s", OUTAGES_S)
def test_a_writer_hears_nothing(rig: Rig, recovered: Recovered, outage_s: float) -> None:
    proxy = rig.proxy("writer")
    writer = rig.writer(0, proxy=proxy, timeout_s=1.0)
    rig.wait_chunks(10)
    proxy.silence()
    told = until(lambda: "did not answer in time" in writer.ask()["blocked_reason"], 20)
    assert told < 5.0
    time.sleep(outage_s)
    proxy.heal()
    began = time.monotonic()
    rig.wait_chunks(2)
    recovered(time.monotonic() - began, 5.0)
    assert rig.verify(shown={"did not answer in time": "ReplayTimeout"})["lost_chunks"] == 0


@pytest.mark.parametrize("cut_off", ["refuse", "silence"])
@pytest.mark.parametrize("outage_s", OUTAGES_S)
def test_a_learner_is_cut_off(
    rig: Rig, recovered: Recovered, outage_s: float, cut_off: str
) -> None:
    writer = rig.writer(0, 1, pause_s=0.005)
    rig.wait_chunks(10)
    getattr(rig.follower_proxy, cut_off)()
    # Nobody pays for more inserts than were admitted, and nobody drops any.
    until(lambda: "inserts wait" in writer.ask()["blocked_reason"], 60)
    position, admitted = rig.follower.position, rig.client.stats().budget_steps
    time.sleep(outage_s)
    assert rig.follower.position == position
    assert rig.client.stats().inserted_steps <= admitted
    rig.follower_proxy.heal()
    began = time.monotonic()
    until(lambda: rig.follower.position > position, 20, "reading the log")
    rig.wait_chunks(2)
    recovered(time.monotonic() - began, 5.0)
    rig.verify(shown={"inserts wait for training": "WAIT", "tail_waits": "unsettled"})
