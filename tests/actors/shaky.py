"""Environments that go wrong at a step, and what is needed to step them."""

from __future__ import annotations

import os
import time
from typing import Any

import gymnasium
import numpy as np

from actors.envs import EnvConfig
from actors.worker import InlineWorker, ProcessWorker, Worker
from dreamer.spaces import ActionSpace, DiscreteAction, ObsSpace, VectorSpec

OBS_SPACE: ObsSpace = {"vector": VectorSpec(shape=(2,))}
ACTION_SPACE: ActionSpace = {"action": DiscreteAction(classes=4)}
LENGTH = 8


class Steady(gymnasium.Env):
    """Emits (episode, step) and terminates after LENGTH steps; its reward is the step."""

    observation_space = gymnasium.spaces.Box(-1e6, 1e6, (2,), np.float32)
    action_space = gymnasium.spaces.Discrete(4)
    episode, count = -1, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode."""
        type(self).episode += 1
        self.count = 0
        return self.seen(), {}

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Count a step."""
        self.count += 1
        return self.seen(), float(self.count), self.count == LENGTH, False, {}

    def seen(self) -> Any:
        """Return the observation."""
        return np.array([self.episode, self.count], np.float32)


class Raises(Steady):
    """Raises at step 3 of every other episode."""

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Count a step, or raise."""
        if self.count == 2 and self.episode % 2 == 0:
            raise RuntimeError("the simulator broke")
        return super().step(action)


class NotFinite(Steady):
    """Emits NaN at step 3 of every other episode."""

    def seen(self) -> Any:
        """Return the observation, or a damaged one."""
        broken = self.count == 3 and self.episode % 2 == 0
        return np.full(2, np.nan, np.float32) if broken else super().seen()


class BadReward(Steady):
    """Gives an infinite reward at step 3 of every other episode."""

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Count a step."""
        obs, reward, terminated, truncated, info = super().step(action)
        broken = self.count == 3 and self.episode % 2 == 0
        return obs, np.inf if broken else reward, terminated, truncated, info


class AlwaysRaises(Steady):
    """Never survives its first step."""

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Raise."""
        raise RuntimeError("this simulator never works")


class Exits(Steady):
    """Ends its process at step 3."""

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Count a step, or end the process."""
        if self.count == 2:
            os._exit(3)
        return super().step(action)


class Hangs(Steady):
    """Never answers at step 3."""

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Count a step, or wait for ever."""
        if self.count == 2:
            time.sleep(1e6)
        return super().step(action)


class Slow(Steady):
    """Takes its time for every step."""

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Count a step, slowly."""
        time.sleep(0.05)
        return super().step(action)


class CannotBeMade(Steady):
    """Fails when it is made."""

    def __init__(self) -> None:
        raise ValueError("the level file is missing; install the levels")


def inline(kind: type[Steady]) -> Worker:
    """Return an environment in this process, whose episodes count from 0."""
    kind.episode = -1
    return InlineWorker(f"{kind.__module__}:{kind.__name__}", EnvConfig())


def isolated(kind: type[Steady], hang_timeout_s: float = 0.5) -> Worker:
    """Return an environment in a process of its own."""
    return ProcessWorker(
        f"{kind.__module__}:{kind.__name__}",
        EnvConfig(),
        hang_timeout_s=hang_timeout_s,
        start_timeout_s=30.0,
    )
