"""Crafter: open-world survival from pixels."""

from __future__ import annotations

from typing import Any

import crafter
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from actors.envs.config import EnvConfig
from actors.envs.registry import EnvError

_PICTURE = (600, 600)
_FRAME_RATE = 5.0  # what its authors let people play at
_TASKS = ("reward", "noreward")


def make(name: str, config: EnvConfig) -> Crafter:
    """Make ``reward`` or ``noreward``."""
    if name not in _TASKS:
        raise EnvError(f"unknown environment crafter:{name}; it is crafter:reward or :noreward")
    return Crafter(name == "reward", config)


class Crafter:
    """Terminated by death alone; the limit of 10 000 steps truncates."""

    def __init__(self, reward: bool, config: EnvConfig) -> None:
        self.action_repeat, self.frame_rate = config.action_repeat or 1, _FRAME_RATE
        self._reward, self._size = reward, config.image_size
        self._env = self._make(0)
        self.observation_space = spaces.Box(0, 255, (self._size, self._size, 3), np.uint8)
        self.action_space = spaces.Discrete(int(self._env.action_space.n))

    def reset(self, seed: int | None) -> NDArray[np.uint8]:
        """Begin an episode in a new world; a seed starts the sequence of worlds anew."""
        if seed is not None:
            self._env = self._make(seed)
        return self._env.reset()

    def step(self, action: int) -> tuple[NDArray[np.uint8], float, bool, bool]:
        """Repeat the action."""
        total = 0.0
        for _ in range(self.action_repeat):
            obs, reward, done, info = self._env.step(action)
            total += reward
            if done:
                break
        dead = bool(done and info["discount"] == 0.0)
        return obs, total, dead, bool(done) and not dead

    def render(self) -> NDArray[np.uint8]:
        """Return a larger picture."""
        return self._env.render(_PICTURE)

    def close(self) -> None:
        """Do nothing: there is nothing to free."""

    def _make(self, seed: int) -> Any:
        return crafter.Env(size=(self._size, self._size), reward=self._reward, seed=seed)
