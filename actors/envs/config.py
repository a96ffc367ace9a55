"""What an environment shows and how it is stepped, free of any environment library."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class EnvConfig:
    """Choices that environments offer; each suite uses those that concern it."""

    image_size: int = 64
    """Side in pixels of the square images that the agent sees; images of another size are
    resized by area."""
    action_repeat: int | None = None
    """Frames per decision, rewards summed; None = the suite's own (Atari 4, dmc 2, others 1)."""
    time_limit: int | None = None
    """Decisions after which an episode is truncated, on top of the suite's own limit; None = the
    suite's own alone."""
    obs: Literal["auto", "vector", "image", "both"] = "auto"
    """What dmc and MiniGrid show; auto = vectors for dmc, images for MiniGrid."""
    camera: int | None = None
    """Camera number of dmc images; None = 2 for quadruped, 0 for all others, as published."""
    renderer: Literal["auto", "egl", "osmesa", "glfw"] = "auto"
    """How dmc draws; auto = MUJOCO_GL if it is set, else the first of these that is installed."""
    fast_render: bool = False
    """Draw dmc without shadows, reflections and multisampling: several times faster, other
    pictures, so scores cannot be compared with published ones."""
    grayscale: bool = False
    """Atari in one channel instead of three."""
    sticky: float = 0.25
    """Probability with which Atari repeats the previous action for a frame."""
    noops: int = 30
    """Most frames without action at the start of an Atari episode, drawn uniformly from 0."""
    all_actions: bool = True
    """All 18 actions of Atari, or only those that the game needs."""
    kwargs: str = "{}"
    """Further arguments of the environment's constructor, as a JSON object (Gymnasium ids and
    module:Class only)."""

    def __post_init__(self) -> None:
        for name, least in (("image_size", 8), ("action_repeat", 1), ("time_limit", 1)):
            _require_at_least(name, getattr(self, name), least)
        _require_at_least("noops", self.noops, 0)
        _require_at_least("camera", self.camera, -1)
        if not 0.0 <= self.sticky < 1.0:
            raise ValueError(
                f"environment.sticky is a probability below 1, got {self.sticky}; "
                "set --environment.sticky 0.25, or 0 to turn it off"
            )
        self.keyword_arguments()

    def keyword_arguments(self) -> dict[str, Any]:
        """Return `kwargs` decoded. Raises ValueError if it is no JSON object."""
        try:
            decoded = json.loads(self.kwargs)
        except json.JSONDecodeError as error:
            raise ValueError(f"environment.kwargs is not JSON ({error}): {self.kwargs}") from error
        if not isinstance(decoded, dict):
            raise ValueError(
                f"environment.kwargs must be a JSON object such as '{{\"size\": 8}}', "
                f"got {self.kwargs}"
            )
        return decoded


def _require_at_least(name: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise ValueError(
            f"environment.{name} must be >= {least}, got {value}; "
            f"set --environment.{name.replace('_', '-')}"
        )
