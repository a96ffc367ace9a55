"""From a name to an environment."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from actors.envs.config import EnvConfig

if TYPE_CHECKING:
    from actors.envs.base import Env, RawEnv
    from dreamer.spaces import ActionSpace, ObsSpace


class EnvError(ValueError):
    """An environment that cannot be made; the message says why and what to do."""


_SUITES = {
    "ale": ("actors.envs.atari", "atari"),
    "dmc": ("actors.envs.dmc", "dmc"),
    "crafter": ("actors.envs.crafter", "crafter"),
    "minigrid": ("actors.envs.minigrid", "minigrid"),
}
"""Prefix of a name → module with a `make`, and the extra that installs what it needs."""
_LIBRARIES = frozenset({"ale_py", "cv2", "dm_control", "dm_env", "mujoco", "crafter", "minigrid"})


def make_env(env_id: str, config: EnvConfig, seed: int | None = None) -> Env:
    """Make an environment.

    Args:
        env_id: a Gymnasium id, ``module:Class`` (no arguments), ``ale:Pong``, ``dmc:walker-walk``,
            ``crafter:reward`` or ``minigrid:DoorKey-6x6-v0``.
        config: what it shows and how it is stepped.
        seed: of the first episode, unless `reset` is given one.

    Raises:
        EnvError: unknown, or what it needs is not installed.
        SpaceError: the agent cannot take its spaces.
    """
    from actors.envs.base import Env

    suite, _, name = env_id.partition(":")
    resized: int | None = None
    if suite in _SUITES:
        raw = _from_suite(suite, name, config)
    else:
        from actors.envs.generic import make

        raw, resized = make(env_id, config), config.image_size
    return Env(raw, image_size=resized, time_limit=config.time_limit, seed=seed)


def env_spaces(env_id: str, config: EnvConfig) -> tuple[ObsSpace, ActionSpace, int]:
    """Make an environment for a moment and return its spaces and action repeat. Raises as above."""
    env = make_env(env_id, config)
    try:
        return env.obs_space, env.action_space, env.action_repeat
    finally:
        env.close()


def nearest(name: str, known: list[str]) -> str:
    """Return a hint at the most similar known name, or the empty string."""
    from difflib import get_close_matches

    found = get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {found[0]}?" if found else ""


def _from_suite(suite: str, name: str, config: EnvConfig) -> RawEnv:
    module, extra = _SUITES[suite]
    try:
        # Some libraries are imported only when an environment is made.
        raw: RawEnv = importlib.import_module(module).make(name, config)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in _LIBRARIES:
            raise
        raise EnvError(
            f"{suite}: environments need {error.name}, which is not installed; run `make setup` "
            f"in a clone, or `pip install 'dreamfleet[{extra}]'`"
        ) from error
    return raw
