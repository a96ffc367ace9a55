"""Any Gymnasium id, and any class that follows Gymnasium's contract."""

from __future__ import annotations

import importlib
from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs.registration import load_env_creator
from numpy.typing import NDArray

from actors.envs.base import RawEnv
from actors.envs.config import EnvConfig
from actors.envs.registry import EnvError, nearest
from actors.spaces import BadOutput

FRAME_RATE = 30.0
"""Frames per second of an environment that says nothing of its own."""


def make(env_id: str, config: EnvConfig) -> RawEnv:
    """Make a registered environment, or an instance of ``module:Class``. Raises EnvError."""
    kwargs = config.keyword_arguments()
    env = _from_module(env_id, kwargs) if ":" in env_id else _registered(env_id, kwargs)
    return Generic(env, config.action_repeat or 1)


class Generic:
    """A Gymnasium environment, with actions repeated and its answers taken apart."""

    def __init__(self, env: Any, action_repeat: int) -> None:
        self._env = env
        self.observation_space, self.action_space = env.observation_space, env.action_space
        self.action_repeat = action_repeat
        self.frame_rate = frame_rate(env)

    def reset(self, seed: int | None) -> Any:
        """Begin an episode."""
        answer = self._env.reset(seed=seed)
        if not isinstance(answer, tuple) or len(answer) != 2 or not isinstance(answer[1], dict):
            raise BadOutput(
                "api", f"reset() returned {_form(answer)}, expected (observation, {{}})"
            )
        return answer[0]

    def step(self, action: Any) -> tuple[Any, Any, Any, Any]:
        """Take one decision: several frames, unless the episode ends."""
        total: Any = 0.0
        for _ in range(self.action_repeat):
            answer = self._env.step(action)
            if not isinstance(answer, tuple) or len(answer) != 5:
                raise BadOutput(
                    "api",
                    f"step() returned {_form(answer)}, expected "
                    "(observation, reward, terminated, truncated, info)",
                )
            obs, reward, terminated, truncated, _ = answer
            total = reward if self.action_repeat == 1 else total + reward
            if terminated or truncated:
                break
        return obs, total, terminated, truncated

    def render(self) -> NDArray[np.uint8] | None:
        """Return what the environment draws."""
        if getattr(self._env, "render_mode", None) != "rgb_array":
            return None
        picture = self._env.render()
        return None if picture is None else np.asarray(picture, np.uint8)

    def close(self) -> None:
        """Close the environment."""
        if hasattr(self._env, "close"):
            self._env.close()


def frame_rate(env: Any) -> float:
    """Return the frames per second that Gymnasium's metadata of an environment gives, or ours."""
    given = (getattr(env, "metadata", None) or {}).get("render_fps")
    if isinstance(given, int | float | np.number) and 0 < given < float("inf"):
        return float(given)
    return FRAME_RATE


def _registered(env_id: str, kwargs: dict[str, Any]) -> Any:
    try:
        spec = gymnasium.spec(env_id)
    except gymnasium.error.Error as error:
        known = [name for name in gymnasium.registry if "/" not in name]
        raise EnvError(
            f"unknown environment {env_id!r}{nearest(env_id, known)} (a Gymnasium id, "
            "module:Class, ale:<Game>, dmc:<domain>-<task>, crafter:reward or minigrid:<Id>)"
        ) from error
    try:
        creator = load_env_creator(spec.entry_point) if spec.entry_point else None
        modes = getattr(creator, "metadata", {}).get("render_modes", [])
        mode = "rgb_array" if "rgb_array" in modes else None
        chosen = {"render_mode": mode, "disable_env_checker": True}
        return gymnasium.make(env_id, **(chosen | kwargs))
    except (gymnasium.error.DependencyNotInstalled, ModuleNotFoundError) as error:
        raise EnvError(f"{env_id} needs more than is installed: {error}") from error


def _from_module(env_id: str, kwargs: dict[str, Any]) -> Any:
    module_name, _, name = env_id.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise EnvError(
            f"environment {env_id!r}: there is no module {module_name!r} on the path "
            "(module:Class needs one that Python can import from here)"
        ) from error
    made = getattr(module, name, None)
    if made is None:
        if name in gymnasium.registry:
            return _registered(name, kwargs)
        known = [key for key in vars(module) if not key.startswith("_")]
        raise EnvError(
            f"environment {env_id!r}: module {module_name} has no {name!r}{nearest(name, known)}"
        )
    if not callable(made):
        raise EnvError(f"environment {env_id!r} is no class, but {type(made).__name__}")
    env = made(**kwargs)
    for attribute in ("observation_space", "action_space", "reset", "step"):
        if not hasattr(env, attribute):
            raise EnvError(
                f"environment {env_id!r} has no {attribute}; it must follow gymnasium.Env"
            )
    return env


def _form(answer: Any) -> str:
    if isinstance(answer, tuple):
        return f"a tuple of {len(answer)}"
    return type(answer).__name__
