"""What an evaluation films: the environment, what the agent sees, and what it makes of that."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from deploy.config import ConfigError

VIDEO_FRAMES = 500
"""Frames of an episode that a video shows at most."""
VIDEO_WIDTH = 320
"""Larger pictures are made smaller by whole factors."""
_GAP = 4

Picture = NDArray[np.uint8]
Observation = Mapping[str, NDArray[Any]]
Reconstruct = Callable[[], dict[str, Picture]]
"""Returns {image key: (h, w, c)}, the model's pictures of the observation just acted on."""


class Drawn(Protocol):
    """An environment that may draw itself."""

    def render(self) -> Picture | None:
        """Return a picture (h, w, 3), or None where there is none."""


class Camera:
    """Keeps one frame per step: the environment, and each observed image with its reconstruction.

    An agent without a decoder (DreamerPro) reconstructs nothing; the frame then has what is left.
    """

    def __init__(self, reconstruct: Reconstruct | None = None) -> None:
        self.frames: list[Picture] = []
        self.reconstruct = reconstruct

    @property
    def shows(self) -> str:
        """What the frames show, in words."""
        if self.reconstruct:
            return "the environment, what the agent sees, and what its model makes of that."
        return "the environment, or what the agent sees of one that draws nothing."

    def __call__(self, env: Drawn, obs: Observation) -> None:
        """Film the state of an environment after the policy has seen ``obs``."""
        if len(self.frames) >= VIDEO_FRAMES:
            return
        model = self.reconstruct() if self.reconstruct else {}
        frame = frame_of(env, obs, model, width=VIDEO_WIDTH)
        if frame is not None:
            self.frames.append(frame)


def frame_of(
    env: Drawn, obs: Observation, model: Mapping[str, Picture], *, width: int | None = None
) -> Picture | None:
    """Return one picture (h, w, 3) of an environment, or None where there is nothing to see.

    It shows what the environment draws and, where there is a model's picture or nothing is drawn,
    each observed image and its reconstruction.

    Args:
        env: draws itself, or not.
        obs: what the agent has seen last.
        model: {image key: (h, w, c)}, its reconstructions.
        width: larger pictures are made smaller by whole factors; None leaves them as they are.

    Raises:
        ConfigError: the environment fails at drawing itself.
    """
    drawn = _drawn(env)
    pictures = [] if drawn is None else [_fitted(drawn, width)]
    seen = {key: x for key, x in obs.items() if x.dtype == np.uint8 and x.ndim == 3}
    if model or not pictures:
        for key, picture in seen.items():
            pictures += [_fitted(x, width) for x in (picture, model.get(key)) if x is not None]
    return side_by_side(pictures) if pictures else None


def side_by_side(pictures: list[Picture]) -> Picture:
    """Return one picture (h, w, 3): smaller ones are enlarged by whole factors, then centred."""
    height = max(len(picture) for picture in pictures)
    columns = []
    for picture in pictures:
        factor = height // len(picture)
        large = picture.repeat(factor, 0).repeat(factor, 1)
        above = (height - len(large)) // 2
        below = height - len(large) - above
        columns.append(np.pad(large, ((above, below), (0, _GAP), (0, 0))))
    return np.concatenate(columns, 1)[:, :-_GAP]


def _drawn(env: Drawn) -> Picture | None:
    try:
        return env.render()
    except Exception as error:  # whatever a drawing library raises where it cannot draw
        raise ConfigError(
            f"the environment cannot draw itself: {type(error).__name__}: {error} "
            "(`dreamfleet doctor` says what drawing needs here; "
            "`dreamfleet eval` gives scores without pictures)"
        ) from error


def _fitted(picture: Picture, width: int | None) -> Picture:
    """Return (h, w, 3) no wider than asked for; of stacked frames the newest."""
    step = -(-picture.shape[1] // width) if width else 1
    small = picture[::step, ::step, -3:] if picture.shape[-1] >= 3 else picture[::step, ::step, -1:]
    return np.repeat(small, 3, axis=-1) if small.shape[-1] == 1 else small
