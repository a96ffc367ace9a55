"""The one shape that all environments have on our side, and what their suites must provide."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from actors.spaces import ActionWriter, Arrays, BadOutput, ObsReader

_LARGEST = float(np.finfo(np.float32).max)


class RawEnv(Protocol):
    """An environment as its suite has it: Gymnasium spaces and native values."""

    observation_space: spaces.Space
    action_space: spaces.Space
    action_repeat: int
    frame_rate: float
    """Frames (not decisions) per second of real time."""

    def reset(self, seed: int | None) -> Any:
        """Begin an episode and return the first observation; reseed if a seed is given."""

    def step(self, action: Any) -> tuple[Any, Any, Any, Any]:
        """Return (observation, reward, terminated, truncated)."""

    def render(self) -> NDArray[np.uint8] | None:
        """Return a picture (h, w, 3), or None where nothing can be drawn."""

    def close(self) -> None:
        """Free everything."""


class Env:
    """An environment in record form; every value it returns has been checked.

    Observations are {column: array}, actions {column: array} with boxes in [-1, 1]. After an
    episode's end `reset` must be called. Nothing here waits or retries: use `actors.worker` to
    survive environments that crash or hang.

    Args:
        raw: the environment of a suite.
        image_size: side to which images are resized; None keeps their size.
        time_limit: decisions after which an episode is truncated; None = no limit of ours.
        seed: of the first episode, if `reset` is not given one.

    Raises:
        SpaceError: the agent cannot take its spaces.
    """

    def __init__(
        self,
        raw: RawEnv,
        *,
        image_size: int | None = None,
        time_limit: int | None = None,
        seed: int | None = None,
    ) -> None:
        self._raw = raw
        self._reader = ObsReader(raw.observation_space, image_size)
        self._writer = ActionWriter(raw.action_space)
        self.obs_space = self._reader.spec
        self.action_space = self._writer.spec
        self.action_repeat = raw.action_repeat
        self.decision_rate = raw.frame_rate / raw.action_repeat
        """Decisions per second of real time."""
        self._limit = time_limit
        self._seed = seed
        self._decisions = 0

    def reset(self, seed: int | None = None) -> Arrays:
        """Begin an episode and return its first observation.

        Args:
            seed: reseeds all its random numbers; None lets them run on.

        Raises:
            BadOutput: it breaks the contract of the environment's own space.
        """
        seed, self._seed = (self._seed if seed is None else seed), None
        self._decisions = 0
        return self._reader.read(self._raw.reset(seed))

    def step(self, actions: Arrays) -> tuple[Arrays, float, bool, bool]:
        """Take one decision and return (observation, reward, terminated, truncated).

        Raises:
            BadOutput: what came back breaks the contract.
        """
        obs, reward, terminated, truncated = self._raw.step(self._writer.native(actions))
        self._decisions += 1
        over = self._limit is not None and self._decisions >= self._limit
        ends = _flag("terminated", terminated), _flag("truncated", truncated) or over
        return self._reader.read(obs), _reward(reward), *ends

    def render(self) -> NDArray[np.uint8] | None:
        """Return a picture (h, w, 3), or None where nothing can be drawn."""
        return self._raw.render()

    def close(self) -> None:
        """Free everything that the environment holds."""
        self._raw.close()


def _reward(value: Any) -> float:
    try:
        number = value if type(value) is float else float(np.asarray(value, float).reshape(()))
    except (TypeError, ValueError) as error:
        raise BadOutput("reward", f"the reward is {value!r:.80}, expected one number") from error
    if not abs(number) <= _LARGEST:
        raise BadOutput("reward", f"the reward is {value!r:.80}, expected a finite float32 number")
    return number


def _flag(name: str, value: Any) -> bool:
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, int | np.integer) and value in (0, 1):
        return bool(value)
    raise BadOutput("api", f"{name} is {value!r:.80}, expected True or False")
