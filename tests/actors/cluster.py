"""A private Ray and a replay server for tests of actors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shaky import ACTION_SPACE, OBS_SPACE

from actors.actor import ActorSpec
from actors.config import ActorConfig
from actors.envs import EnvConfig
from deploy.cluster import ray_cluster
from deploy.sentinel import Sentinel
from dreamer.config import V3Config
from dreamer.spaces import record_column
from dreamer.weights import PackedWeights, Version
from replay_service import Column, EmbeddedServer, Limits, ReplayClient, ReplayConfig, Schema
from replay_service.schema import REQUIRED

SCHEMA = Schema(
    (
        *(Column(key, *record_column(spec)) for key, spec in (OBS_SPACE | ACTION_SPACE).items()),
        *(Column(*row) for row in REQUIRED),
    )
)


class Still:
    """A policy that does nothing, in a way that fits the shaky environments."""

    def __init__(self, config: Any, obs_space: Any, action_space: Any, *, seed: int) -> None:
        self.version: Version = (-1, -1)

    def load(self, weights: PackedWeights) -> None:
        """Take a new version."""
        self.version = weights.version

    def step(
        self, obs: dict[str, Any], is_first: Any, mode: str, held: Any = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Choose action 1 everywhere."""
        return {"action": np.ones(len(is_first), np.int32)}, {}


class Cupboard:
    """A source of weights in this process."""

    def __init__(self, weights: PackedWeights) -> None:
        self.weights = weights

    def fetch(self, newer_than: Version, timeout_s: float) -> PackedWeights | None:
        """Return the weights if they are newer, and otherwise wait as a hub would."""
        import threading

        if self.weights.version > newer_than:
            return self.weights
        threading.Event().wait(min(timeout_s, 0.05))
        return None


@contextmanager
def private_ray(cpus: int = 4) -> Iterator[None]:
    """Start a Ray whose processes are gone afterwards, and are not starved by other tests."""
    with pytest.MonkeyPatch.context() as patch, Sentinel() as sentinel:
        patch.setenv("RAY_worker_niceness", "0")
        with ray_cluster("local", cpus=cpus, sentinel=sentinel):
            yield


@contextmanager
def replay_server(directory: Path, **limits: int) -> Iterator[ReplayClient]:
    """Start a server with an empty replay for the shaky environments."""
    with EmbeddedServer(directory, max_memory_bytes=2**26) as server:
        client = ReplayClient(server.url)
        client.create(
            SCHEMA, Limits(**{"capacity_steps": 10**6, "capacity_bytes": 2**25, **limits})
        )
        yield client
        client.close()


def make_spec(client: ReplayClient, env: str = "Steady", **changes: Any) -> ActorSpec:
    """Return a specification that steps shaky environments in the actor's process."""
    values: dict[str, Any] = {
        "run": "test",
        "env_id": f"shaky:{env}",
        "envs": 2,
        "environment": EnvConfig(),
        "actor": ActorConfig(isolation="inline"),
        "agent": V3Config(),
        "obs_space": OBS_SPACE,
        "action_space": ACTION_SPACE,
        "schema": SCHEMA.to_dict(),
        "replay": ReplayConfig(chunk_steps=16, min_size_steps=1),
        "replay_url": client.url,
        "policy": "cluster:Still",
    }
    return ActorSpec(**(values | changes))


def until(condition: Callable[[], bool], timeout_s: float = 200.0) -> None:
    """Wait until a condition holds; fails at the deadline."""
    import time

    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "this took too long"
        time.sleep(0.02)
