"""Counting environments and policies through real processes: what arrives is what happened."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from numpy.typing import NDArray

from actors.actor import ActorSpec
from actors.config import ActorConfig
from actors.envs import EnvConfig
from actors.fleet import Fleet
from actors.hub import sender, start_hub
from actors.loop import derive_seed
from actors.weights import HubSource
from deploy.cluster import ray_cluster
from deploy.sentinel import Sentinel
from dreamer.config import V3Config
from dreamer.weights import pack
from replay_service import EmbeddedServer, Limits, Mirror, ReplayClient, ReplayConfig
from replay_service.storage import window_rows
from tests.integration.counting import ACTION_SPACE, OBS_SPACE, SCHEMA, read_rows

pytestmark = pytest.mark.integration

ACTORS, ENVS, SEED = 3, 2, 7
WINDOW = 17
REPLAY = ReplayConfig(capacity_steps=12_000, chunk_steps=48, min_size_steps=1, flush_age_s=0.5)
ALL_STEPS = 60_000
"""Records that are inserted: several times what the server and the small mirror hold."""
LEAD = 6_000
"""Records by which actors may run ahead of the mirrors."""


class Follower:
    """Follows the log with two mirrors: a small one that forgets, and one that keeps all."""

    def __init__(self, client: ReplayClient) -> None:
        self.client, self.fence = client, client.acquire_fence()
        self.small = Mirror(
            client, SCHEMA, capacity_steps=8_000, window_steps=WINDOW, placement="ram"
        )
        self.whole = Mirror(client, SCHEMA, capacity_steps=200_000, window_steps=2, placement="ram")
        self.versions: set[tuple[int, int]] = set()
        for mirror in (self.small, self.whole):
            mirror.start()

    def follow(self, deadline: float) -> None:
        """Absorb what has arrived, look at random windows, and admit as much again."""
        assert time.monotonic() < deadline, (self.whole.inserted_steps, self.client.stats())
        self.whole.wait(0.2)
        self.small.absorb()
        self.versions |= {event.version for event in self.whole.absorb()}
        self.client.settle(self.fence, 0, self.whole.inserted_steps + LEAD)
        if self.small.valid_starts:
            check_windows(self.small, np.random.default_rng().random(64))

    def stop(self) -> None:
        """Stop both mirrors."""
        self.small.stop()
        self.whole.stop()


def check_windows(mirror: Mirror, uniforms: NDArray[np.float64]) -> dict[int, NDArray[np.int64]]:
    """Check every record of windows, and that each window is one piece of one stream.

    Returns:
        {identity of the environment: sorted positions that occur in the windows}.
    """
    rows = window_rows(
        torch.from_numpy(uniforms),
        torch.full((len(uniforms),), -1),
        mirror.valid_cumsum,
        mirror.next_page,
        mirror.page_steps,
        mirror.window_steps,
    )
    columns = {name: tensor[rows.flatten()].numpy() for name, tensor in mirror.columns.items()}
    identity, position = (part.reshape(rows.shape) for part in read_rows(columns))
    assert (identity == identity[:, :1]).all()
    assert (np.diff(position, axis=1) == 1).all()
    return {int(one): np.unique(position[identity == one]) for one in np.unique(identity)}


def every_window(mirror: Mirror) -> NDArray[np.float64]:
    """Return numbers that choose each valid start of a window once."""
    return (np.arange(mirror.valid_starts) + 0.5) / mirror.valid_starts


def identity_of(slot: int, env: int, incarnation: int) -> int:
    """Return the seed with which an actor resets an environment for the first time."""
    return derive_seed(derive_seed(SEED, slot, env, incarnation), 1)


@pytest.fixture
def replay(tmp_path: Path) -> Iterator[ReplayClient]:
    """A server that keeps far less than the test inserts."""
    with EmbeddedServer(tmp_path / "replay", max_memory_bytes=2**27) as server:
        client = ReplayClient(server.url)
        client.create(
            SCHEMA,
            Limits(capacity_steps=REPLAY.capacity_steps, capacity_bytes=2**26, budget_steps=LEAD),
        )
        yield client
        client.close()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A weight hub on a private Ray whose processes can import what counts."""
    monkeypatch.setenv("RAY_worker_niceness", "0")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    with Sentinel() as sentinel, ray_cluster("local", cpus=4, sentinel=sentinel):
        yield start_hub(tmp_path / "weights")


@pytest.mark.slow
def test_nothing_is_lost_repeated_reordered_or_stitched(hub: Any, replay: ReplayClient) -> None:
    spec = ActorSpec(
        run="count",
        env_id="counting:CountingEnv",
        envs=ENVS,
        environment=EnvConfig(),
        actor=ActorConfig(),
        agent=V3Config(),
        obs_space=OBS_SPACE,
        action_space=ACTION_SPACE,
        schema=SCHEMA.to_dict(),
        replay=REPLAY,
        replay_url=replay.url,
        seed=SEED,
        policy="counting:CountingPolicy",
    )
    fleet, follower = Fleet(spec, HubSource(hub), actors=ACTORS), Follower(replay)
    publish, deadline = sender(hub), time.monotonic() + 150.0
    before = set(psutil.Process().children(recursive=True))
    publish(pack({"w": torch.zeros(1)}, (1, 0)))
    fleet.start()
    while follower.whole.inserted_steps < ALL_STEPS / 3:
        fleet.check()
        follower.follow(deadline)
    publish(pack({"w": torch.zeros(1)}, (1, 10)))
    victim = fleet.stats()[1]
    os.kill(victim["pid"], signal.SIGKILL)
    while follower.whole.inserted_steps < ALL_STEPS or not lived_on(fleet, victim, 500):
        fleet.check()
        follower.follow(deadline)
    started = set(psutil.Process().children(recursive=True)) - before
    ended = {actor["slot"]: actor for actor in fleet.stop(drain_s=10.0)}
    while (
        follower.whole.inserted_steps < replay.stats().inserted_steps or follower.small.lag_chunks
    ):
        follower.follow(deadline)
    follower.stop()

    held = check_windows(follower.whole, every_window(follower.whole))
    check_windows(follower.small, every_window(follower.small))
    assert follower.whole.missed_steps == 0 and follower.small.missed_steps == 0
    assert follower.small.size_steps <= 8_000 < replay.stats().evicted_steps
    lives = [(slot, 1) for slot in range(ACTORS)] + [(1, 2)]
    names = {
        identity_of(slot, env, life): (slot, env, life)
        for slot, life in lives
        for env in range(ENVS)
    }
    assert {names[identity] for identity in held} == set(names.values())
    for identity, positions in held.items():
        slot, env, life = names[identity]
        # Every record from the first on is there once, whatever the window that shows it.
        assert np.array_equal(positions, np.arange(len(positions)))
        if (slot, life) == (1, 1):
            unsent = REPLAY.chunk_steps * (1 + REPLAY.pending_chunks)
            assert len(positions) >= victim["steps_of_envs"][env] - unsent
        else:
            assert len(positions) == ended[slot]["steps_of_envs"][env]
    assert sum(map(len, held.values())) == replay.stats().inserted_steps
    assert all(not actor["env_restarts"] and not actor["obs_rejected"] for actor in ended.values())
    assert {(1, 0), (1, 10)} <= follower.versions
    assert ended[1]["restarts"] == 1 and ended[0]["restarts"] == ended[2]["restarts"] == 0
    assert not psutil.wait_procs(actors_of(started), timeout=10.0)[1]


def lived_on(fleet: Fleet, victim: dict[str, Any], steps: int) -> bool:
    """Whether the successor of a killed actor has come so far; while it starts it reports less."""
    actor = fleet.stats()[victim["slot"]]
    alive = actor.get("pid") not in (None, victim["pid"])
    return alive and actor.get("steps_of_envs", [0])[0] >= steps


def actors_of(processes: set[psutil.Process]) -> list[psutil.Process]:
    """Return the processes of actors and environments that are still alive."""
    found = []
    for process in processes:
        try:
            command = " ".join(process.cmdline())
        except psutil.NoSuchProcess:
            continue
        if "actors.child" in command or "ActorProcess" in command:
            found.append(process)
    return found
