"""Refreshing weights: never waiting, never backwards, never damaged."""

from __future__ import annotations

import queue
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from actors.weights import Refresher, WeightSourceError
from dreamer.weights import PackedWeights, Version, WeightsError, pack


class Tray:
    """A source whose answers the test lays out; an exception is raised."""

    def __init__(self) -> None:
        self.answers: queue.Queue[PackedWeights | Exception | None] = queue.Queue()
        self.asked: list[Version] = []

    def fetch(self, newer_than: Version, timeout_s: float) -> PackedWeights | None:
        """Answer what was laid out next."""
        self.asked.append(newer_than)
        answer = self.answers.get()
        if isinstance(answer, Exception):
            raise answer
        return answer


class Reader:
    """A policy of one number."""

    def __init__(self) -> None:
        self.version: Version = (-1, -1)
        self.value = 0.0

    def load(self, weights: PackedWeights) -> None:
        """Verify and take the number."""
        self.value = float(weights.tensors["w"])
        self.version = weights.version


def weights(fence: int, update: int) -> PackedWeights:
    return pack({"w": torch.tensor([float(update)])}, (fence, update), dtype=torch.float32)


def damaged(good: PackedWeights) -> PackedWeights:
    return replace(good, buffer=np.bitwise_xor(good.buffer, 1))


@pytest.fixture
def tray() -> Tray:
    return Tray()


@pytest.fixture
def refresher(tray: Tray) -> Refresher:
    return Refresher(tray)


def test_refresh_does_nothing_while_nothing_has_arrived(refresher: Refresher) -> None:
    reader, begin = Reader(), time.monotonic()
    for _ in range(1000):
        assert not refresher.refresh(reader)
    assert time.monotonic() - begin < 0.5 and reader.version == (-1, -1)


def test_refresh_swaps_in_what_has_arrived(tray: Tray, refresher: Refresher) -> None:
    reader = Reader()
    tray.answers.put(weights(1, 3))
    assert refresher.wait((1, 3), 5.0)
    assert refresher.refresh(reader) and not refresher.refresh(reader)
    assert (reader.version, reader.value, refresher.version) == ((1, 3), 3.0, (1, 3))
    assert refresher.stats.applied == 1 and refresher.age_s < 5.0


def test_newest_of_several_arrivals_wins(tray: Tray, refresher: Refresher) -> None:
    reader = Reader()
    for update in range(4):
        tray.answers.put(weights(1, update))
    assert refresher.wait((1, 3), 5.0) and refresher.refresh(reader)
    assert reader.value == 3.0 and refresher.stats.applied == 1


def test_version_never_goes_back_except_with_a_new_lineage(
    tray: Tray, refresher: Refresher
) -> None:
    reader, seen = Reader(), []
    for version in ((1, 5), (1, 4), (2, 1), (1, 9)):
        before = len(tray.asked)
        tray.answers.put(weights(*version))
        while len(tray.asked) == before:
            time.sleep(0.001)
        refresher.refresh(reader)
        seen.append(reader.version)
    assert seen == [(1, 5), (1, 5), (2, 1), (2, 1)]


def test_damaged_weights_are_counted_and_the_old_ones_stay(
    tray: Tray, refresher: Refresher
) -> None:
    reader = Reader()
    tray.answers.put(weights(1, 1))
    assert refresher.wait((1, 1), 5.0) and refresher.refresh(reader)
    tray.answers.put(damaged(weights(1, 2)))
    assert refresher.wait((1, 2), 5.0) and not refresher.refresh(reader)
    assert reader.version == (1, 1) and refresher.stats.rejected == 1
    assert "sha256" in refresher.last_error
    with pytest.raises(WeightsError):
        reader.load(damaged(weights(1, 2)))


def test_one_request_is_under_way_and_asks_for_newer_ones(tray: Tray, refresher: Refresher) -> None:
    tray.answers.put(weights(1, 1))
    assert refresher.wait((1, 1), 5.0)
    while len(tray.asked) < 2:
        time.sleep(0.001)
    assert tray.asked == [(-1, -1), (1, 1)]


def test_outage_is_survived(tray: Tray, refresher: Refresher) -> None:
    reader = Reader()
    tray.answers.put(WeightSourceError("the hub is gone"))
    tray.answers.put(None)
    tray.answers.put(weights(1, 1))
    assert refresher.wait((1, 1), 10.0) and refresher.refresh(reader)
    assert refresher.stats.failures == 1


def test_wait_ends_at_stop(refresher: Refresher) -> None:
    threading.Timer(0.05, refresher.stop).start()
    begin = time.monotonic()
    assert not refresher.wait((1, 1), 30.0)
    assert time.monotonic() - begin < 5.0
