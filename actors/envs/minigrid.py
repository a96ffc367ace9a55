"""MiniGrid: what the agent sees of the grid, as an image or as one-hot symbols."""

from __future__ import annotations

import math
from typing import Any

import gymnasium
import minigrid
import numpy as np
from gymnasium import spaces
from minigrid.core.constants import COLOR_TO_IDX, OBJECT_TO_IDX, STATE_TO_IDX
from numpy.typing import NDArray

from actors.envs.config import EnvConfig
from actors.envs.generic import frame_rate
from actors.envs.registry import EnvError, nearest
from actors.spaces import resize

_CLASSES = (len(OBJECT_TO_IDX), len(COLOR_TO_IDX), len(STATE_TO_IDX))


def make(name: str, config: EnvConfig) -> Minigrid:
    """Make an environment by its id, with or without ``MiniGrid-`` in front."""
    if not any(key.startswith("MiniGrid-") for key in gymnasium.registry):
        minigrid.register_minigrid_envs()
    env_id = name if name.startswith(("MiniGrid-", "BabyAI-")) else f"MiniGrid-{name}"
    if env_id not in gymnasium.registry:
        known = [key for key in gymnasium.registry if key.startswith(("MiniGrid-", "BabyAI-"))]
        raise EnvError(f"unknown environment minigrid:{name}{nearest(env_id, known)}")
    env = gymnasium.make(env_id, render_mode="rgb_array", disable_env_checker=True)
    return Minigrid(env, config)


class Minigrid:
    """The agent's partial view and its direction; the mission's text is not shown.

    ``image`` is the view drawn in full colours, ``symbols`` one-hot objects, colours and states of
    its cells.
    """

    def __init__(self, env: Any, config: EnvConfig) -> None:
        self.action_repeat = config.action_repeat or 1
        self._env, self.frame_rate = env, frame_rate(env)
        shown = "image" if config.obs == "auto" else config.obs
        self._symbols, self._image = shown in ("vector", "both"), shown in ("image", "both")
        self._size = config.image_size
        self._view = int(env.unwrapped.agent_view_size)
        members: dict[str, spaces.Space] = {"direction": spaces.Discrete(4)}
        if self._symbols:
            width = self._view**2 * sum(_CLASSES)
            members["symbols"] = spaces.Box(0.0, 1.0, (width,), np.float32)
        if self._image:
            members["image"] = spaces.Box(0, 255, (self._size, self._size, 3), np.uint8)
        self.observation_space = spaces.Dict(members)
        self.action_space = env.action_space

    def reset(self, seed: int | None) -> dict[str, Any]:
        """Begin an episode in a new grid."""
        obs, _ = self._env.reset(seed=seed)
        return self._observation(obs)

    def step(self, action: int) -> tuple[dict[str, Any], float, bool, bool]:
        """Repeat the action."""
        total = 0.0
        for _ in range(self.action_repeat):
            obs, reward, terminated, truncated, _ = self._env.step(action)
            total += reward
            if terminated or truncated:
                break
        return self._observation(obs), total, terminated, truncated

    def render(self) -> NDArray[np.uint8]:
        """Return a picture of the whole grid."""
        return self._env.render()

    def close(self) -> None:
        """Close the environment."""
        self._env.close()

    def _observation(self, obs: dict[str, Any]) -> dict[str, Any]:
        shown: dict[str, Any] = {"direction": obs["direction"]}
        if self._symbols:
            cells = obs["image"].reshape(-1, 3)
            one_hot = [np.eye(n, dtype=np.float32)[cells[:, i]] for i, n in enumerate(_CLASSES)]
            shown["symbols"] = np.concatenate(one_hot, -1).reshape(-1)
        if self._image:
            tile = math.ceil(self._size / self._view)
            picture = self._env.unwrapped.get_frame(highlight=False, tile_size=tile, agent_pov=True)
            shown["image"] = resize(np.ascontiguousarray(picture), self._size)
        return shown
