"""Weights: from the learner to 1, 4, 16 and 64 readers, straight and through a cache on the node.

Readers are Ray actors that ask as actors do and touch every page of what they get; environments and
policies are left out. `python -m benchmarks.weights --help`.
"""

from __future__ import annotations

import os
import statistics
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
import tyro

from actors.hub import sender, start_hub
from benchmarks.scaling import several_nodes
from deploy.cluster import this_node
from deploy.sentinel import Sentinel
from dreamer.agent import make_agent
from dreamer.presets import agent_config, sized
from dreamer.spaces import DiscreteAction, ImageSpec
from dreamer.weights import PackedWeights

SIZES, READERS = ("1m", "12m", "200m"), (1, 4, 16, 64)
ROUNDS = 5
POLL_S, ANSWER_S = 20.0, 120.0
BYTES_PER_VALUE = 2
FENCE = 1


@dataclass(frozen=True, kw_only=True)
class WeightsOptions:
    """Measure how long published weights take to all who wait for them."""

    sizes: tuple[str, ...] = SIZES
    """Sizes of DreamerV3 from images, whose policy-side parameters are sent in bfloat16."""
    readers: tuple[int, ...] = READERS
    """Numbers of readers, growing."""
    rounds: int = ROUNDS
    """Publications of each size; medians are shown."""
    nodes: int = 1
    """Ray nodes on this machine, each with its own store of objects; readers are spread."""
    json: Path | None = None
    """File for the numbers."""

    def __post_init__(self) -> None:
        if min(self.rounds, self.nodes) < 1 or not self.readers or min(self.readers) < 1:
            raise ValueError(
                "--rounds, --nodes and --readers must be 1 or more, got "
                f"{self.rounds}, {self.nodes} and {self.readers}"
            )


def run(
    *,
    quick: bool = False,
    sizes: tuple[str, ...] = SIZES,
    readers: tuple[int, ...] = READERS,
    rounds: int = ROUNDS,
    nodes: int = 1,
) -> dict[str, Any]:
    """Measure every size with every number of readers; blocks for a few minutes.

    Args:
        quick: one size, one and two readers, one round.
        sizes, readers, rounds, nodes: see `WeightsOptions`.

    Returns:
        {"load", "nodes", "rows": [{size, megabytes, readers, via, publish_ms, all_ms, polls}]}:
        medians of the time until the hub had answered the learner, of the time from the beginning
        of the publication until the last reader had touched all of it, and how often the hub was
        asked per publication. `via` is hub or node: readers ask the hub, or one cache on their
        node that asks it for them. The load is the machine's at the beginning.
    """
    if quick:
        sizes, readers, rounds = sizes[:1], (1, 2), 1
    rows: list[dict[str, Any]] = []
    load = os.getloadavg()[0]
    # On one node readers take nothing, so that there is room for any number.
    cpus = 1 if nodes == 1 else max(readers) + nodes
    with Sentinel() as sentinel, several_nodes(nodes, cpus, sentinel):
        waiting: list[Any] = []
        for count in readers:
            waiting += [_reader(nodes > 1) for _ in range(count - len(waiting))]
            ray.get([reader.listen.remote(None) for reader in waiting], timeout=ANSWER_S)
            for size in sizes:
                for via in ("hub", "node") if nodes == 1 else ("hub",):
                    facts = {"size": size, "readers": count, "via": via}
                    rows.append(facts | _measure(policy_bytes(size), waiting, via, rounds))
    return {"load": load, "nodes": nodes, "rows": rows}


def table(result: dict[str, Any]) -> list[list[str]]:
    """Return header and rows of the result as text."""
    rows = [["size", "MB", "readers", "via", "learner waits ms", "all have it ms", "hub is asked"]]
    for row in result["rows"]:
        rows.append(
            [
                row["size"],
                f"{row['megabytes']:.1f}",
                str(row["readers"]),
                row["via"],
                f"{row['publish_ms']:.0f}",
                f"{row['all_ms']:.0f}",
                f"{row['polls']:.0f}",
            ]
        )
    return rows


def policy_bytes(size: str) -> int:
    """Return the bytes of what is published for an agent of a size that sees images."""
    with torch.device("meta"):
        agent = make_agent(
            sized(agent_config("v3", size), size),
            {"image": ImageSpec(shape=(64, 64, 3))},
            {"action": DiscreteAction(classes=18)},
        )
    return sum(x.numel() for x in agent.policy_tensors().values()) * BYTES_PER_VALUE


def _measure(size: int, readers: list[Any], via: str, rounds: int) -> dict[str, Any]:
    hub = start_hub(resources=this_node())  # with the learner, as in a run
    ask = hub if via == "hub" else _cache(hub)
    ray.get([reader.listen.remote([ask]) for reader in readers], timeout=ANSWER_S)
    send, buffer = sender(hub, ANSWER_S), np.ones(size, np.uint8)
    publishing, arriving = [], []
    # One more round than is counted: the first one makes connections and fresh pages.
    for update in range(rounds + 1):
        threading.Event().wait(0.2)
        begin = time.monotonic()
        weights = PackedWeights(buffer=buffer, manifest={"version": [FENCE, update]})
        assert send(weights), "the hub refuses newer weights"
        publishing.append(time.monotonic() - begin)
        seen = ray.get([reader.seen.remote(update) for reader in readers], timeout=ANSWER_S)
        arriving.append(max(seen) - begin)
    if via == "hub":
        asked = sum(ray.get([reader.asked.remote() for reader in readers], timeout=ANSWER_S))
    else:
        asked = ray.get(ask.asked.remote(), timeout=ANSWER_S)
    ray.get([reader.listen.remote(None) for reader in readers], timeout=ANSWER_S)
    for actor in {hub, ask}:
        ray.kill(actor)
    return {
        "megabytes": size / 1e6,
        "publish_ms": statistics.median(publishing[1:]) * 1e3,
        "all_ms": statistics.median(arriving[1:]) * 1e3,
        "polls": asked / (rounds + 1),
    }


def _reader(spread: bool) -> Any:
    # Defined here, so that Ray sends the class itself and readers load nothing but numpy.
    class Reader:
        def __init__(self) -> None:
            self._source: Any = None
            self._asked, self._seen_at = 0, dict[int, float]()
            self._changed = threading.Condition()

        def listen(self, source: list[Any] | None) -> None:
            self._source = source[0] if source else None
            self._asked = 0
            self._seen_at = {}
            if source:
                threading.Thread(target=self._run, args=(source[0],), daemon=True).start()

        def asked(self) -> int:
            return self._asked

        def seen(self, update: int) -> float:
            with self._changed:
                assert self._changed.wait_for(lambda: update in self._seen_at, ANSWER_S)
            return self._seen_at[update]

        def _run(self, source: Any) -> None:
            version = (-1, -1)
            while self._source is source:
                self._asked += 1
                try:
                    found = ray.get(source.wait_newer.remote(version, POLL_S), timeout=ANSWER_S)
                    if found is None:
                        continue
                    buffer, manifest = ray.get(found[0], timeout=ANSWER_S)
                except ray.exceptions.RayError:
                    return
                assert buffer[::4096].all()
                version = tuple(manifest["version"])
                with self._changed:
                    self._seen_at[version[1]] = time.monotonic()
                    self._changed.notify_all()

    options: dict[str, Any] = {"num_cpus": 0, "max_concurrency": 4}
    if spread:
        options |= {"num_cpus": 1, "scheduling_strategy": "SPREAD"}
    return ray.remote(Reader).options(**options).remote()


def _cache(hub: Any) -> Any:
    import asyncio

    class Cache:
        """Asks the hub once for all readers of a node."""

        def __init__(self, hub: Any) -> None:
            self._hub, self._asked = hub, 0
            self._version, self._newest = (-1, -1), None
            self._changed: Any = None

        async def asked(self) -> int:
            return self._asked

        async def wait_newer(self, version: Any, timeout_s: float) -> list[Any] | None:
            if self._changed is None:
                self._changed = asyncio.Condition()
                self._task = asyncio.create_task(self._follow())
            try:
                async with asyncio.timeout(timeout_s), self._changed:
                    await self._changed.wait_for(lambda: self._version > tuple(version))
            except TimeoutError:
                return None
            return [self._newest]

        async def _follow(self) -> None:
            while True:
                self._asked += 1
                found = await self._hub.wait_newer.remote(self._version, POLL_S)
                if found is None:
                    continue
                _, manifest = await found[0]
                self._newest, self._version = found[0], tuple(manifest["version"])
                async with self._changed:
                    self._changed.notify_all()

    return ray.remote(Cache).options(num_cpus=0, max_concurrency=1000).remote(hub)


def main() -> None:
    """Measure, show the table, and keep the numbers if that is asked for."""
    from deploy.bench import report

    options = tyro.cli(WeightsOptions, description=WeightsOptions.__doc__)
    result = run(
        sizes=options.sizes, readers=options.readers, rounds=options.rounds, nodes=options.nodes
    )
    report("weights", result, table(result), options.json)


if __name__ == "__main__":
    main()
