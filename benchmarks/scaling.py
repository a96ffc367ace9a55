"""Scaling: environment steps/s and the limiter's share against the number of actors.

Everything is real but the learner and the time that an environment step takes, which is slept. So
the processors of one machine do not decide what is measured: how actors, replay server and train
ratio work together. `python -m benchmarks.scaling --help`.
"""

from __future__ import annotations

import os
import secrets
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import psutil
import torch
import tyro

from actors.actor import ActorSpec
from actors.config import ActorConfig
from actors.envs import EnvConfig, env_spaces
from actors.fleet import Fleet, Supervision
from actors.hub import sender, start_hub
from actors.weights import HubSource
from deploy import cluster as cluster_module
from deploy.cluster import ray_cluster
from deploy.sentinel import Sentinel
from dreamer.config import V3Config
from dreamer.spaces import record_column
from dreamer.weights import PackedWeights, Version, pack
from replay_service import (
    Column,
    CreditLimiter,
    EmbeddedServer,
    Limits,
    ReplayClient,
    ReplayConfig,
    Schema,
)
from replay_service.schema import REQUIRED

NAP_S = 0.02
"""Time that an environment step takes: at most 50 steps/s and actor."""
COUNTS = (1, 2, 4, 8, 16, 32)
BATCH_STEPS, UPDATES_PER_S, RATIO = 256, 50.0, 16
"""The learner of the second sweep: 50 updates/s pay for 800 environment steps/s."""
REPLAY = ReplayConfig(chunk_steps=16, min_size_steps=512, capacity_steps=100_000)
_CAPACITY_BYTES = 2**25
_START_S = 300.0
_CALM_S, _FILL_S = 1.0, 15.0
"""Seconds before a measurement, without and with a limit: until then what exceeds it goes into the
actors' rings of chunks that wait to be sent."""
_AHEAD = 1_000_000
_STORE_BYTES = 2**30


@dataclass(frozen=True, kw_only=True)
class ScalingOptions:
    """Measure environment steps/s and the limiter's share for growing fleets."""

    actors: tuple[int, ...] = COUNTS
    """Numbers of actors, growing; each has one environment."""
    seconds: float = 20.0
    """Length of each measurement."""
    nodes: int = 1
    """Ray nodes on this machine, each a raylet with its own store of objects; actors are spread."""
    json: Path | None = None
    """File for the numbers."""

    def __post_init__(self) -> None:
        growing = list(self.actors) == sorted(set(self.actors))
        if not self.actors or self.actors[0] < 1 or not growing:
            raise ValueError(f"--actors must be growing numbers from 1 on, got {self.actors}")
        if not self.seconds > 0:
            raise ValueError(f"--seconds must be above 0, got {self.seconds}")
        if self.nodes < 1:
            raise ValueError(f"--nodes must be 1 or more, got {self.nodes}")


class Nap(gymnasium.Env[Any, Any]):
    """Sleeps for a while at every step; an episode has 200."""

    observation_space = gymnasium.spaces.Box(0.0, 1.0, (4,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self) -> None:
        self._steps = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Begin an episode."""
        self._steps = 0
        return np.zeros(4, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Sleep."""
        time.sleep(NAP_S)
        self._steps += 1
        return np.zeros(4, np.float32), 0.0, False, self._steps == 200, {}


class Still:
    """A policy that costs nothing."""

    def __init__(self, config: Any, obs_space: Any, action_space: Any, *, seed: int) -> None:
        self.version: Version = (-1, -1)

    def load(self, weights: PackedWeights) -> None:
        """Take a new version."""
        self.version = weights.version

    def step(
        self, obs: dict[str, Any], is_first: Any, mode: str, held: Any = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Choose action 0 everywhere."""
        return {"action": np.zeros(len(is_first), np.int32)}, {}


class PacedLearner:
    """Settles like a learner that does so many updates per second, and nothing else.

    Args:
        client: of the replay server.
        limiter: the train ratio; None admits every insert.
    """

    def __init__(self, client: ReplayClient, limiter: CreditLimiter | None) -> None:
        self._client, self._limiter = client, limiter
        self.updates = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="paced", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End; blocks until it has."""
        self._done.set()
        self._thread.join(10.0)

    def _run(self) -> None:
        fence, begin, waited = self._client.acquire_fence(), time.monotonic(), 0.0
        inserted, size = 0, 0
        while not self._done.wait(0.02):
            if self._limiter is None:
                inserted, size = self._client.settle(fence, 0, inserted + _AHEAD)
                continue
            while self.updates < (time.monotonic() - begin - waited) * UPDATES_PER_S:
                if not self._limiter.may_start_update(size, inserted, self.updates):
                    # Time that it waited for experience is not made up for.
                    waited = time.monotonic() - begin - self.updates / UPDATES_PER_S
                    break
                self.updates += 1
            replayed = self._limiter.replayed_steps(self.updates)
            budget = self._limiter.budget(self.updates)
            inserted, size = self._client.settle(fence, replayed, budget)


def run(
    *,
    quick: bool = False,
    counts: tuple[int, ...] = COUNTS,
    seconds: float = 20.0,
    nodes: int = 1,
) -> dict[str, Any]:
    """Measure both sweeps; blocks for about ten minutes, most of which is the start of actors.

    Args:
        quick: one and two actors for a second.
        counts: numbers of actors, growing.
        seconds: of each measurement.
        nodes: Ray nodes on this machine.

    Returns:
        {"nap_s", "load", "nodes", "rows": [{limited, actors, by_node, env_steps_per_s, ideal,
        limiter_share, updates_per_s}]}; `limiter_share` is the share of the actors' time that
        inserts waited for training, `load` the machine's at the beginning, `by_node` how many
        actors each node has.
    """
    if quick:
        counts, seconds = (1, 2), 1.0
    load, rows = os.getloadavg()[0], list[dict[str, Any]]()
    for limited in (False, True):
        with tempfile.TemporaryDirectory(prefix="dreamfleet-bench-") as folder:
            rows += _sweep(Path(folder), limited, counts, seconds, quick, nodes)
    return {
        "nap_s": NAP_S,
        "load": load,
        "nodes": nodes,
        "pays_for": UPDATES_PER_S * BATCH_STEPS / RATIO,
        "rows": rows,
    }


def table(result: dict[str, Any]) -> list[list[str]]:
    """Return header and rows of the result as text."""
    rows = [["train ratio", "actors", "by node", "env steps/s", "of ideal", "limiter", "updates/s"]]
    for row in result["rows"]:
        share = row["env_steps_per_s"] / row["ideal"]
        rows.append(
            [
                f"{RATIO}" if row["limited"] else "off",
                str(row["actors"]),
                " ".join(map(str, row["by_node"])),
                f"{row['env_steps_per_s']:,.0f}",
                f"{share:.0%}",
                f"{row['limiter_share']:.0%}",
                f"{row['updates_per_s']:.1f}" if row["limited"] else "-",
            ]
        )
    return rows


def _sweep(
    folder: Path, limited: bool, counts: tuple[int, ...], seconds: float, quick: bool, nodes: int
) -> Iterator[dict[str, Any]]:
    with ExitStack() as stack:
        client, schema = stack.enter_context(_replay(folder))
        limiter = _limiter() if limited else None
        learner = PacedLearner(client, limiter)
        stack.callback(learner.stop)
        sentinel = stack.enter_context(Sentinel())
        stack.enter_context(several_nodes(nodes, max(counts) + 1, sentinel))
        hub = start_hub()
        sender(hub)(pack({"w": torch.zeros(1)}, (1, 0)))
        fleet = Fleet(
            _spec(client, schema),
            HubSource(hub),
            actors=counts[0],
            supervision=Supervision(cpus_per_actor=float(nodes > 1), start_timeout_s=_START_S),
        )
        stack.callback(fleet.stop, 0.0)
        fleet.start()
        for actors in counts:
            fleet.scale(actors)
            _settle_down(fleet, actors, _FILL_S if limited and not quick else _CALM_S)
            yield _measure(fleet, client, learner, seconds) | {
                "limited": limited,
                "actors": actors,
                "by_node": _by_node(fleet),
                "ideal": actors / NAP_S,
            }


@contextmanager
def several_nodes(nodes: int, cpus: int, sentinel: Sentinel) -> Iterator[None]:
    """Start a private Ray, of several raylets if asked for; each has its share of the CPUs.

    They are one machine's: what they share are processors, what they do not is memory for objects.
    """
    if nodes == 1:
        with ray_cluster("local", cpus=cpus, sentinel=sentinel):
            yield
        return
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    cluster_module._set_environment(token, loopback=False)
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    try:
        for _ in range(nodes):
            share = -(-cpus // nodes)
            cluster.add_node(num_cpus=share, object_store_memory=_STORE_BYTES)
        cluster.wait_for_nodes(_START_S)
        with ray_cluster(cluster.address, cpus=cpus, sentinel=sentinel):
            yield
    finally:
        cluster.shutdown()


def _by_node(fleet: Fleet) -> list[int]:
    """Return how many actors each node has: its raylet is the parent of their processes."""
    parents = Counter(psutil.Process(actor["pid"]).ppid() for actor in fleet.stats())
    return sorted(parents.values(), reverse=True)


def _settle_down(fleet: Fleet, actors: int, calm_s: float) -> None:
    """Wait until all act, and then for a while."""
    deadline, pause = time.monotonic() + _START_S, threading.Event()
    while True:
        fleet.check()
        steps = [actor["env_steps"] for actor in fleet.stats()]
        if len(steps) == actors and min(steps) > REPLAY.chunk_steps:
            break
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"{sum(count > 0 for count in steps)} of {actors} actors act after "
                f"{_START_S:.0f} s: the machine is too small or too busy for so many"
            )
        pause.wait(0.2)
    pause.wait(calm_s)


def _measure(
    fleet: Fleet, client: ReplayClient, learner: PacedLearner, seconds: float
) -> dict[str, Any]:
    begin, steps, updates = time.monotonic(), client.stats().inserted_steps, learner.updates
    limited = sum(actor["limited_s"] for actor in fleet.stats())
    threading.Event().wait(seconds)
    took = time.monotonic() - begin
    actors = fleet.stats()
    return {
        "env_steps_per_s": (client.stats().inserted_steps - steps) / took,
        "limiter_share": (sum(a["limited_s"] for a in actors) - limited) / took / len(actors),
        "updates_per_s": (learner.updates - updates) / took,
    }


@contextmanager
def _replay(folder: Path) -> Iterator[tuple[ReplayClient, Schema]]:
    obs_space, action_space, _ = env_spaces("benchmarks.scaling:Nap", EnvConfig())
    spaces = obs_space | action_space
    schema = Schema(
        (
            *(Column(key, *record_column(spec)) for key, spec in spaces.items()),
            *(Column(*row) for row in REQUIRED),
        )
    )
    with EmbeddedServer(folder / "replay", max_memory_bytes=2**27, durability="none") as server:
        client = ReplayClient(server.url)
        limits = Limits(
            capacity_steps=REPLAY.capacity_steps,
            capacity_bytes=_CAPACITY_BYTES,
            min_size_steps=REPLAY.min_size_steps,
            budget_steps=REPLAY.min_size_steps,
        )
        client.create(schema, limits)
        yield client, schema
        client.close()


def _limiter() -> CreditLimiter:
    return CreditLimiter(
        train_ratio=RATIO,
        batch_steps=BATCH_STEPS,
        chunk_steps=REPLAY.chunk_steps,
        min_size_steps=REPLAY.min_size_steps,
        capacity_steps=REPLAY.capacity_steps - REPLAY.page_steps,
        # Room for a chunk of every actor at once.
        insert_tolerance=2 * max(COUNTS) * REPLAY.chunk_steps * RATIO,
    )


def _spec(client: ReplayClient, schema: Schema) -> ActorSpec:
    obs_space, action_space, _ = env_spaces("benchmarks.scaling:Nap", EnvConfig())
    return ActorSpec(
        run="scaling",
        env_id="benchmarks.scaling:Nap",
        environment=EnvConfig(),
        actor=ActorConfig(isolation="inline"),
        agent=V3Config(),
        obs_space=obs_space,
        action_space=action_space,
        schema=schema.to_dict(),
        replay=REPLAY,
        replay_url=client.url,
        policy="benchmarks.scaling:Still",
    )


def main() -> None:
    """Measure, show the table, and keep the numbers if that is asked for."""
    from deploy.bench import report

    options = tyro.cli(ScalingOptions, description=ScalingOptions.__doc__)
    result = run(counts=options.actors, seconds=options.seconds, nodes=options.nodes)
    report("scaling", result, table(result), options.json)


if __name__ == "__main__":
    main()
