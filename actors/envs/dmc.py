"""DeepMind Control suite: named vectors, an image, or both."""

from __future__ import annotations

import os
from ctypes.util import find_library
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from actors.envs.config import EnvConfig
from actors.envs.registry import EnvError, nearest

CAMERAS = {"quadruped": 2}
"""Published camera of a domain where it is not 0."""
_ALIASES = {"cup": "ball_in_cup"}
_LIBRARY_OF = {"egl": "EGL", "osmesa": "OSMesa", "glfw": "glfw"}
_PICTURE = (240, 320)


def make(name: str, config: EnvConfig) -> Dmc:
    """Make ``<domain>-<task>``, such as ``walker-walk`` or ``ball_in_cup-catch``."""
    _choose_renderer(config)
    from dm_control import suite

    domain, _, task = name.partition("-")
    domain = _ALIASES.get(domain, domain)
    if (domain, task) not in suite.ALL_TASKS:
        known = [f"{d}-{t}" for d, t in suite.ALL_TASKS]
        raise EnvError(
            f"unknown environment dmc:{name}{nearest(name, known)} (dmc:<domain>-<task>)"
        )
    return Dmc(domain, task, config)


class Dmc:
    """One task. Episodes end after its time limit and are never terminal: its discount stays 1.

    Vectors keep their names and are separate observations. Actions are repeated and rewards
    summed; the repetition stops at the end of an episode.
    """

    def __init__(self, domain: str, task: str, config: EnvConfig) -> None:
        self.action_repeat = config.action_repeat or 2
        self._domain, self._task, self._config = domain, task, config
        self._env = self._load(0)
        self.frame_rate = 1.0 / self._env.control_timestep()
        shown = "vector" if config.obs == "auto" else config.obs
        self._vectors, self._image = shown in ("vector", "both"), shown in ("image", "both")
        self._camera = CAMERAS.get(domain, 0) if config.camera is None else config.camera
        members: dict[str, spaces.Space] = {}
        if self._vectors:
            for key, part in self._env.observation_spec().items():
                size = max(int(np.prod(part.shape)), 1)
                members[key] = spaces.Box(-np.inf, np.inf, (size,), np.float64)
        if self._image:
            size = config.image_size
            members["image"] = spaces.Box(0, 255, (size, size, 3), np.uint8)
        self.observation_space = spaces.Dict(members)
        bounds = self._env.action_spec()
        self.action_space = spaces.Box(
            np.broadcast_to(bounds.minimum, bounds.shape).astype(np.float32),
            np.broadcast_to(bounds.maximum, bounds.shape).astype(np.float32),
            dtype=np.float32,
        )

    def reset(self, seed: int | None) -> dict[str, Any]:
        """Begin an episode; a seed makes the task anew, because it takes one only then."""
        if seed is not None:
            self._env = self._load(seed)
        return self._observation(self._env.reset())

    def step(self, action: Any) -> tuple[dict[str, Any], float, bool, bool]:
        """Repeat the action."""
        reward = 0.0
        for _ in range(self.action_repeat):
            timestep = self._env.step(action)
            reward += timestep.reward or 0.0
            if timestep.last():
                break
        terminated = timestep.last() and timestep.discount == 0.0
        return self._observation(timestep), reward, terminated, timestep.last() and not terminated

    def render(self) -> NDArray[np.uint8]:
        """Return a larger picture."""
        return self._draw(*_PICTURE)

    def close(self) -> None:
        """Free the physics and its drawing context."""
        self._env.close()

    def _load(self, seed: int) -> Any:
        from dm_control import suite

        env = suite.load(self._domain, self._task, task_kwargs={"random": seed})
        if self._config.fast_render:
            quality = env.physics.model.vis.quality
            quality.offsamples, quality.shadowsize = 0, 0
        return env

    def _observation(self, timestep: Any) -> dict[str, Any]:
        obs: dict[str, Any] = {}
        if self._vectors:
            obs |= {k: np.asarray(v).reshape(-1) for k, v in timestep.observation.items()}
        if self._image:
            obs["image"] = self._draw(self._config.image_size, self._config.image_size)
        return obs

    def _draw(self, height: int, width: int) -> NDArray[np.uint8]:
        flags = {"shadow": False, "reflection": False} if self._config.fast_render else None
        return self._env.physics.render(
            height, width, camera_id=self._camera, render_flag_overrides=flags
        )


def _choose_renderer(config: EnvConfig) -> None:
    """Set MUJOCO_GL, which the libraries read when they are first imported."""
    if config.renderer != "auto":
        os.environ["MUJOCO_GL"] = config.renderer
    elif "MUJOCO_GL" not in os.environ:
        found = [name for name, library in _LIBRARY_OF.items() if find_library(library)]
        if not found and config.obs in ("image", "both"):
            raise EnvError(
                "dmc images need a library that draws without a screen, and none of EGL, OSMesa "
                "and GLFW is installed; install libegl1 or libosmesa6, or observe vectors"
            )
        os.environ["MUJOCO_GL"] = found[0] if found else "disable"
    if os.environ["MUJOCO_GL"] == "egl":
        os.environ.setdefault("PYOPENGL_PLATFORM", "egl")
