"""Actors: environment steps/s of the environment alone, with the policy, and as a full actor."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from actors.actor import ActorProcess, ActorSpec
from actors.config import ActorConfig
from actors.envs import EnvConfig, make_env
from actors.envs.base import Env
from actors.spaces import random_actions
from dreamer.agent import make_agent
from dreamer.config import AgentConfig
from dreamer.policy import Policy, record_columns
from dreamer.presets import agent_config
from dreamer.weights import PackedWeights, Version, pack
from replay_service import (
    Column,
    EmbeddedServer,
    Limits,
    ReplayClient,
    ReplayConfig,
    Schema,
)

MIB = 2**20
START_S = 60.0
BAR = 0.85
"""Share of the rate of environment and policy that a full actor shall keep."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One environment and how it is stepped."""

    env: str
    environment: EnvConfig
    envs: int
    size: str = "1m"


CASES = {
    "CartPole, vectors": Case(env="CartPole-v1", environment=EnvConfig(), envs=4),
    "walker-walk, vectors": Case(env="dmc:walker-walk", environment=EnvConfig(), envs=4),
    "Pong, 64x64 pixels": Case(env="ale:Pong", environment=EnvConfig(), envs=4),
}


def run(*, quick: bool = False) -> dict[str, Any]:
    """Measure all cases, one after the other; takes about a minute and a half, a few s if quick.

    Rounds of environment with policy and of the full actor take turns, because the speed of a
    machine drifts; the medians count.

    Returns:
        Plain numbers, ready for JSON; `table` shows them.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds, rounds = (0.5, 1) if quick else (4.0, 3)
    cases = dict(list(CASES.items())[:1]) if quick else CASES
    try:
        return {name: _measure(case, seconds, rounds) for name, case in cases.items()}
    finally:
        torch.set_num_threads(threads)


def table(result: dict[str, Any]) -> Table:
    """Return a table of what `run` measured."""
    shown = Table(
        "", "envs", "env alone", "with policy", "full actor", f"kept (bar {BAR:.0%})", "kept inline"
    )
    for name, row in result.items():
        rates = [f"{row[key]:,.0f}/s" for key in ("bare", "policy", "actor")]
        shown.add_row(
            name, str(row["envs"]), *rates, f"{row['kept']:.0%}", f"{row['kept_inline']:.0%}"
        )
    return shown


class _Fixed:
    """A source with one version of the weights."""

    def __init__(self, weights: PackedWeights) -> None:
        self._weights = weights

    def fetch(self, newer_than: Version, timeout_s: float) -> PackedWeights | None:
        """Return the weights to whoever has older ones."""
        if tuple(newer_than) < self._weights.version:
            return self._weights
        time.sleep(min(timeout_s, 0.5))
        return None


def _measure(case: Case, seconds: float, rounds: int) -> dict[str, Any]:
    envs = [make_env(case.env, case.environment, index) for index in range(case.envs)]
    agent = agent_config("v3", case.size)
    obs_space, action_space = envs[0].obs_space, envs[0].action_space
    policy = Policy(agent, obs_space, action_space)
    weights = pack(make_agent(agent, obs_space, action_space).policy_tensors(), (1, 0))
    policy.load(weights)
    bare = _rate(_Random(envs).step, case.envs, seconds)
    with _actor_rates(case, agent, envs[0], weights) as actor_rate:
        alone, full, inline = [], [], []
        stepper = _Stepper(envs, policy)
        for _ in range(rounds):
            alone.append(_rate(stepper.step, case.envs, seconds))
            full.append(actor_rate("process", seconds))
            inline.append(actor_rate("inline", seconds))
    for env in envs:
        env.close()
    rates = {"policy": alone, "actor": full, "inline": inline}
    numbers = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "envs": case.envs,
        "size": case.size,
        "bare": bare,
        **numbers,
        "kept": numbers["actor"] / numbers["policy"],
        "kept_inline": numbers["inline"] / numbers["policy"],
    }


def _rate(step: Callable[[], None], count: int, seconds: float) -> float:
    """Return environment steps/s over about that many seconds."""
    for _ in range(5):
        step()
    begin, steps = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        step()
        steps += count
    return steps / (time.perf_counter() - begin)


class _Random:
    """Random actions in every environment in turn."""

    def __init__(self, envs: list[Env]) -> None:
        self._envs, self._over = envs, [True] * len(envs)
        self._rng = np.random.default_rng(0)

    def step(self) -> None:
        """Take one step, or the reset after an episode, in every environment."""
        for index, env in enumerate(self._envs):
            if self._over[index]:
                env.reset()
                self._over[index] = False
            else:
                answer = env.step(random_actions(env.action_space, self._rng))
                self._over[index] = answer[2] or answer[3]


class _Stepper:
    """The shortest loop there is: a batched policy call, then every environment in turn."""

    def __init__(self, envs: list[Env], policy: Policy) -> None:
        self._envs, self._policy = envs, policy
        self._obs = [env.reset() for env in envs]
        self._first = np.ones(len(envs), bool)
        self._over = np.zeros(len(envs), bool)

    def step(self) -> None:
        """Take one step in every environment."""
        obs = {key: np.stack([one[key] for one in self._obs]) for key in self._obs[0]}
        actions, _ = self._policy.step(obs, self._first)
        for index, env in enumerate(self._envs):
            self._first[index] = self._over[index]
            if self._over[index]:
                self._obs[index], self._over[index] = env.reset(), False
                continue
            action = {key: value[index] for key, value in actions.items()}
            self._obs[index], _, terminated, truncated = env.step(action)
            self._over[index] = terminated or truncated


@contextmanager
def _actor_rates(
    case: Case, agent: AgentConfig, env: Env, weights: PackedWeights
) -> Iterator[Callable[[Any, float], float]]:
    """Yield a function that runs a full actor for a while and returns its steps/s."""
    columns = record_columns(agent, env.obs_space, env.action_space)
    schema = Schema(tuple(Column(*column) for column in columns))
    with (
        tempfile.TemporaryDirectory() as folder,
        EmbeddedServer(Path(folder), max_memory_bytes=512 * MIB) as server,
    ):
        client = ReplayClient(server.url)
        client.create(schema, Limits(capacity_steps=20_000, capacity_bytes=256 * MIB))

        def measure(isolation: Any, seconds: float) -> float:
            spec = ActorSpec(
                run="bench",
                env_id=case.env,
                envs=case.envs,
                environment=case.environment,
                actor=ActorConfig(isolation=isolation),
                agent=agent,
                obs_space=env.obs_space,
                action_space=env.action_space,
                schema=schema.to_dict(),
                replay=ReplayConfig(),
                replay_url=server.url,
            )
            actor = ActorProcess(spec, _Fixed(weights))
            try:
                return _actor_rate(actor, seconds)
            finally:
                actor.stop()

        yield measure
        client.close()


def _actor_rate(actor: ActorProcess, seconds: float) -> float:
    deadline = time.monotonic() + START_S
    while (stats := actor.stats())["env_steps"] < 20:
        if stats["error"] or time.monotonic() > deadline:
            raise RuntimeError(f"the actor does not act: {stats['error'] or stats['phase']}")
        time.sleep(0.02)
    begin, before = time.perf_counter(), stats["env_steps"]
    time.sleep(seconds)
    return (actor.stats()["env_steps"] - before) / (time.perf_counter() - begin)
