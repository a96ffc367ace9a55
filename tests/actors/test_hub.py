"""The hub: order of versions, long polls, the copy on the disk."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from cluster import private_ray, until

from actors.hub import FILE_NAME, read_weights, sender, start_hub, write_weights
from actors.weights import HubSource, WeightSourceError
from dreamer.weights import PackedWeights, WeightsError, pack, unpack

pytestmark = pytest.mark.integration


def weights(fence: int, update: int) -> PackedWeights:
    return pack({"w": torch.full((1000,), float(update))}, (fence, update), dtype=torch.float32)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with private_ray():
        yield


@pytest.fixture
def hub(cluster: None) -> Iterator[Any]:
    started = start_hub()
    yield started
    ray.kill(started)


def test_hub_takes_only_what_is_newer_by_fence_and_update(hub: Any) -> None:
    send = sender(hub)
    offers = [(1, 0), (1, 5), (1, 5), (1, 4), (2, 1), (1, 99), (2, 0), (2, 2)]
    assert [send(weights(*version)) for version in offers] == [
        *(True, True, False, False),
        *(True, False, False, True),
    ]
    stats = ray.get(hub.stats.remote())
    assert (stats["version"], stats["published"], stats["rejected"]) == ([2, 2], 4, 4)


def test_hub_refuses_weights_whose_manifest_says_another_version(hub: Any) -> None:
    offered = weights(1, 1)
    with pytest.raises(ValueError, match=r"offered as \(1, 2\)"):
        ray.get(hub.publish.remote(1, 2, offered.buffer, offered.manifest))


def test_source_gets_the_same_bytes_that_were_sent(hub: Any) -> None:
    source, sent = HubSource(hub), weights(1, 7)
    assert source.fetch((-1, -1), 0.05) is None
    assert sender(hub)(sent)
    got = source.fetch((-1, -1), 5.0)
    assert got is not None and got.version == (1, 7) and got.manifest == sent.manifest
    assert float(unpack(got)["w"][0]) == 7.0 and not got.buffer.flags.writeable
    assert source.fetch((1, 7), 0.05) is None


def test_waiting_readers_all_wake_when_newer_weights_arrive(hub: Any) -> None:
    waiting = [hub.wait_newer.remote((1, 0), 30.0) for _ in range(20)]
    assert sender(hub)(weights(1, 1))
    answers = ray.get(waiting, timeout=10.0)
    assert all(ray.get(answer[0])[1]["version"] == [1, 1] for answer in answers)


def test_hub_offers_the_newest_weights_again_after_it_was_killed(
    cluster: None, tmp_path: Path
) -> None:
    hub = start_hub(tmp_path)
    assert sender(hub)(weights(3, 1)) and sender(hub)(weights(3, 2))
    os.kill(ray.get(hub.stats.remote())["pid"], signal.SIGKILL)
    source = HubSource(hub)

    def restored() -> bool:
        try:
            got = source.fetch((-1, -1), 1.0)
        except WeightSourceError:
            return False
        return got is not None and got.version == (3, 2)

    until(restored)
    assert not sender(hub)(weights(3, 2)) and sender(hub)(weights(4, 0))
    ray.kill(hub)
    with pytest.raises(WeightSourceError, match="does not answer"):
        source.fetch((-1, -1), 0.1)


def test_file_is_complete_or_not_used(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    write_weights(path, weights(1, 2))
    assert read_weights(path).version == (1, 2) and not list(tmp_path.glob("*.tmp"))
    whole = path.read_bytes()
    for damage in (whole[:5], whole[:50], whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1])):
        path.write_bytes(damage)
        with pytest.raises(WeightsError):
            read_weights(path)


def test_damaged_file_is_ignored_at_the_start(tmp_path: Path) -> None:
    from actors.hub import WeightHub

    (tmp_path / FILE_NAME).write_bytes(np.random.default_rng(0).bytes(100))
    hub = WeightHub(str(tmp_path))
    assert asyncio.run(hub.latest()) is None
