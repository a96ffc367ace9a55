"""One process that acts, remembers and trains: what an agent can learn, without the fleet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from dreamer.agent import Agent, make_agent, record_columns
from dreamer.config import AgentConfig
from dreamer.policy import Policy
from dreamer.spaces import ActionSpace, ObsSpace
from dreamer.weights import pack
from learner.batch import make_batch

Obs = dict[str, NDArray[Any]]

LENGTH = 10
"""Steps of a trained window: at least one whole episode and part of another."""


class Task(Protocol):
    """A small environment whose best possible return is known."""

    obs_space: ObsSpace
    action_space: ActionSpace

    def reset(self, rng: np.random.Generator) -> Obs:
        """Begin an episode."""

    def step(self, action: Any) -> tuple[Obs, float, bool, bool]:
        """Return observation, reward, whether the episode ends, and whether it terminates."""


class Streams:
    """K tasks side by side and everything that happened in them, in the form of replay records."""

    def __init__(
        self, make: Callable[[], Task], config: AgentConfig, count: int, steps: int, seed: int
    ) -> None:
        self.rng = np.random.default_rng(seed)
        self.tasks = [make() for _ in range(count)]
        first = self.tasks[0]
        self.columns = {
            name: np.zeros((count, steps, *shape), dtype)
            for name, dtype, shape in record_columns(config, first.obs_space, first.action_space)
        }
        self.obs = [task.reset(self.rng) for task in self.tasks]
        self.reward = np.zeros(count, np.float32)
        self.first, self.last, self.terminal = np.ones(count, bool), *np.zeros((2, count), bool)
        self.now = 0
        self.returns: list[float] = []
        self._running = np.zeros(count)

    def step(self, policy: Policy, mode: str) -> None:
        """Act once everywhere and write the records."""
        obs = {key: np.stack([o[key] for o in self.obs]) for key in self.obs[0]}
        actions, latents = policy.step(obs, self.first, mode)
        flags = {"is_first": self.first, "is_last": self.last, "is_terminal": self.terminal}
        stored = {key: np.where(_like(self.last, x), 0, x) for key, x in actions.items()}
        for key, value in (obs | stored | latents | flags | {"reward": self.reward}).items():
            self.columns[key][:, self.now] = value
        self.now += 1
        ended = self.last.copy()
        for i, task in enumerate(self.tasks):
            if ended[i]:
                self.obs[i], self.reward[i] = task.reset(self.rng), 0.0
                self.first[i], self.last[i], self.terminal[i] = True, False, False
                continue
            action = {key: value[i] for key, value in actions.items()}
            self.obs[i], self.reward[i], last, terminal = task.step(action["action"])
            self.first[i], self.last[i], self.terminal[i] = False, last, terminal
            self._running[i] += self.reward[i]
            if last:
                self.returns.append(float(self._running[i]))
                self._running[i] = 0.0

    def sample(self, batch: int, length: int) -> dict[str, torch.Tensor]:
        """Return windows (batch, length, …), drawn evenly over streams and starts."""
        stream = self.rng.integers(len(self.tasks), size=batch)[:, None]
        start = self.rng.integers(self.now - length + 1, size=batch)[:, None]
        rows = start + np.arange(length)
        return {key: torch.from_numpy(x[stream, rows]) for key, x in self.columns.items()}


def learn(
    make: Callable[[], Task],
    config: AgentConfig,
    *,
    goal: float,
    rounds: int,
    batch: int = 16,
    seed: int = 0,
) -> float:
    """Train until the greedy policy earns ``goal`` on average, or for ``rounds`` at most.

    A round is a step in each of eight tasks; an update of ``batch`` windows of ten steps follows
    every fourth. Returns the last of the mean returns, one of which is taken every 200 rounds.
    """
    torch.manual_seed(seed)
    task = make()
    agent = make_agent(config, task.obs_space, task.action_space)
    policy = Policy(config, task.obs_space, task.action_space, seed=seed + 1)
    policy.load(pack(agent.policy_tensors(), (0, 0)))
    seen = Streams(make, config, 8, rounds, seed)
    window = LENGTH + config.context
    earned = -float("inf")
    for now in range(1, rounds + 1):
        seen.step(policy, "explore")
        if now >= 2 * window and now % 4 == 0:
            agent.update(make_batch(seen.sample(batch, window), agent))
            policy.load(pack(agent.policy_tensors(), (0, now)))
        if now % 200 == 0:
            earned = judge(make, config, agent, seed + 2)
            if earned >= goal:
                break
    return earned


def judge(make: Callable[[], Task], config: AgentConfig, agent: Agent, seed: int) -> float:
    """Return the mean of at least a hundred greedy returns."""
    task = make()
    policy = Policy(config, task.obs_space, task.action_space, seed=seed)
    policy.load(pack(agent.policy_tensors(), (0, 0)))
    played = Streams(make, config, 16, 100, seed)
    while len(played.returns) < 100:
        played.step(policy, "greedy")
    return float(np.mean(played.returns))


def _like(flags: NDArray[np.bool_], value: NDArray[Any]) -> NDArray[np.bool_]:
    return flags.reshape(-1, *[1] * (value.ndim - 1))
