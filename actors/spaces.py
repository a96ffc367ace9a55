"""Between Gymnasium spaces and the agent's: which ones fit, and what their values must be."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from dreamer.spaces import (
    ActionSpace,
    ActionSpec,
    BoxAction,
    DiscreteAction,
    DiscreteSpec,
    ImageSpec,
    MultiBinaryAction,
    MultiDiscreteAction,
    ObsSpace,
    ObsSpec,
    VectorSpec,
    check_observation_names,
)

Arrays = dict[str, NDArray[Any]]
BOUNDS_SLACK = 1e-4
"""By how much a value may leave its bounds, relative to the bound: float32 rounds."""
_LARGEST = float(np.finfo(np.float32).max)


class SpaceError(ValueError):
    """A space that the agent cannot take; the message says why and what to do."""


class BadOutput(Exception):
    """An environment returned something that breaks its own contract.

    Args:
        reason: one of ``api keys shape dtype bounds not_finite reward``, the label of a counter.
        message: what was got and what was expected.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class ObsReader:
    """Checks observations against their space and turns them into columns of a record.

    Args:
        space: Box, Discrete, or a Dict of them.
        image_size: side to which images are resized; None keeps their size, which must be square.

    Raises:
        SpaceError: the space does not fit.
    """

    def __init__(self, space: spaces.Space, image_size: int | None = None) -> None:
        self._is_dict = isinstance(space, spaces.Dict)
        members = dict(space.spaces) if isinstance(space, spaces.Dict) else {"": space}
        if not members:
            raise SpaceError("the observation space is an empty Dict; it needs at least one key")
        self.spec: ObsSpace = {}
        self._readers: dict[str, tuple[str, Callable[[Any], NDArray[Any]]]] = {}
        for key, member in members.items():
            spec, read = _obs_part(key or "observation", member, image_size)
            name = key or _BARE_NAMES[type(spec)]
            self.spec[name] = spec
            self._readers[key] = name, read
        check_observation_names(self.spec)

    def read(self, raw: Any) -> Arrays:
        """Return {column: array in record type}. Raises BadOutput."""
        if not self._is_dict:
            name, read = self._readers[""]
            return {name: read(raw)}
        if not isinstance(raw, Mapping) or raw.keys() != self._readers.keys():
            got = sorted(raw) if isinstance(raw, Mapping) else type(raw).__name__
            raise BadOutput(
                "keys", f"the observation has {got}, its space has {sorted(self._readers)}"
            )
        return {name: read(raw[key]) for key, (name, read) in self._readers.items()}


class ActionWriter:
    """Turns actions in record form into what the environment takes.

    Args:
        space: Discrete, Box with finite bounds, MultiDiscrete, MultiBinary, or a Dict of them.

    Raises:
        SpaceError: the space does not fit.
    """

    def __init__(self, space: spaces.Space) -> None:
        self._is_dict = isinstance(space, spaces.Dict)
        members = dict(space.spaces) if isinstance(space, spaces.Dict) else {"": space}
        if not members:
            raise SpaceError("the action space is an empty Dict; it needs at least one key")
        self.spec: ActionSpace = {}
        self._writers: dict[str, tuple[str, Callable[[NDArray[Any]], Any]]] = {}
        for key, member in members.items():
            name = f"action.{key}" if self._is_dict else "action"
            self.spec[name], write = _action_part(name, member)
            self._writers[key] = name, write

    def native(self, actions: Mapping[str, NDArray[Any]]) -> Any:
        """Return the environment's own form of {column: action}."""
        if not self._is_dict:
            name, write = self._writers[""]
            return write(actions[name])
        return {key: write(actions[name]) for key, (name, write) in self._writers.items()}


def random_actions(space: ActionSpace, rng: np.random.Generator) -> Arrays:
    """Draw one uniform action in record form."""
    return {key: _random_action(spec, rng) for key, spec in space.items()}


def resize(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Return the image (h, w, c) as (size, size, c), each pixel the mean of the area it covers."""
    from PIL import Image

    if image.shape[2] in (1, 3):
        picture = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
        small = np.asarray(picture.resize((size, size), Image.Resampling.BOX))
        return small.reshape(size, size, image.shape[2])
    channels = [resize(image[..., i : i + 1], size) for i in range(image.shape[2])]
    return np.concatenate(channels, -1)


_BARE_NAMES = {ImageSpec: "image", VectorSpec: "vector", DiscreteSpec: "discrete"}


def _obs_part(
    name: str, space: spaces.Space, image_size: int | None
) -> tuple[ObsSpec, Callable[[Any], NDArray[Any]]]:
    if isinstance(space, spaces.Discrete):
        return _discrete_part(name, space)
    if isinstance(space, spaces.Box):
        if space.dtype == np.uint8 and len(space.shape) in (2, 3):
            return _image_part(name, space, image_size)
        if len(space.shape) <= 1 and space.dtype is not None and space.dtype.kind in "fiu":
            return _vector_part(name, space)
        if len(space.shape) == 3 and space.dtype != np.uint8:
            raise SpaceError(
                f"{name}: {space} cannot be observed: images (h, w, c) must be uint8, got "
                f"{space.dtype}; emit uint8 from 0 to 255, in a wrapper if need be"
            )
    raise SpaceError(
        f"{name}: {space} cannot be observed: the agent takes uint8 images (h, w, c), numeric "
        "vectors (d,), Discrete, and one Dict of them; change it with a wrapper such as "
        "gymnasium.wrappers.FlattenObservation"
    )


def _discrete_part(
    name: str, space: spaces.Discrete
) -> tuple[ObsSpec, Callable[[Any], NDArray[Any]]]:
    count, start = int(space.n), int(space.start)

    def read(raw: Any) -> NDArray[Any]:
        value = _array(name, raw)
        if value.shape not in ((), (1,)):
            raise BadOutput("shape", f"{name}: got shape {value.shape}, expected one integer")
        if value.dtype.kind not in "iu":
            raise BadOutput("dtype", f"{name}: got {value.dtype}, expected an integer")
        index = int(value.reshape(())) - start
        if not 0 <= index < count:
            raise BadOutput("bounds", f"{name}: {index + start} lies outside of {space}")
        return np.array(index, np.int32)

    return DiscreteSpec(classes=count), read


def _vector_part(name: str, space: spaces.Box) -> tuple[ObsSpec, Callable[[Any], NDArray[Any]]]:
    shape, kind = space.shape, space.dtype.kind if space.dtype is not None else "f"
    low, high = (bound.astype(np.float64) for bound in (space.low, space.high))
    # What float32 cannot hold lies outside too, so that one comparison finds every bad value.
    least = np.maximum(low - BOUNDS_SLACK * (1 + np.abs(low)), -_LARGEST)
    most = np.minimum(high + BOUNDS_SLACK * (1 + np.abs(high)), _LARGEST)
    kinds = {"f": "fiu", "i": "iu", "u": "iu"}[kind]

    def read(raw: Any) -> NDArray[Any]:
        value = _array(name, raw)
        if value.shape != shape:
            raise BadOutput("shape", f"{name}: got shape {value.shape}, expected {shape}")
        if value.dtype.kind not in kinds:
            raise BadOutput("dtype", f"{name}: got {value.dtype}, expected {space.dtype}")
        if not ((value >= least) & (value <= most)).all():
            if not (np.abs(value.astype(np.float64)) <= _LARGEST).all():
                raise BadOutput("not_finite", f"{name}: got {_shown(value)}")
            raise BadOutput("bounds", f"{name}: {_shown(value)} lies outside of {space}")
        return value.astype(np.float32).reshape(-1)

    return VectorSpec(shape=(max(math.prod(shape), 1),)), read


def _image_part(
    name: str, space: spaces.Box, image_size: int | None
) -> tuple[ObsSpec, Callable[[Any], NDArray[Any]]]:
    shape = space.shape
    h, w, c = (*shape, 1) if len(shape) == 2 else shape
    if c > 16 and h <= 16:
        raise SpaceError(
            f"{name}: an image of shape {shape} has its channels first; the agent takes "
            "(h, w, c): move the axis in a wrapper"
        )
    if image_size is None and h != w:
        raise SpaceError(
            f"{name}: images must be square, got {shape}; resize them in a wrapper, or with "
            "--environment.image-size"
        )
    size = image_size or h

    def read(raw: Any) -> NDArray[Any]:
        value = _array(name, raw)
        if value.shape != shape:
            raise BadOutput("shape", f"{name}: got shape {value.shape}, expected {shape}")
        if value.dtype != np.uint8:
            raise BadOutput("dtype", f"{name}: got {value.dtype}, expected uint8")
        image = value.reshape(h, w, c)
        return image if (h, w) == (size, size) else resize(image, size)

    return ImageSpec(shape=(size, size, c)), read


def _array(name: str, raw: Any) -> NDArray[Any]:
    try:
        value = np.asarray(raw)
    except ValueError as error:
        raise BadOutput("shape", f"{name}: {error}") from error
    if value.dtype.kind not in "biuf":
        raise BadOutput("dtype", f"{name}: got {type(raw).__name__}, expected numbers")
    return value


def _shown(value: NDArray[Any]) -> str:
    return np.array2string(value.reshape(-1), threshold=6, edgeitems=3, precision=4)


def _action_part(
    name: str, space: spaces.Space
) -> tuple[ActionSpec, Callable[[NDArray[Any]], Any]]:
    if isinstance(space, spaces.Discrete):
        start = int(space.start)
        return DiscreteAction(classes=int(space.n)), lambda value: int(value) + start
    if isinstance(space, spaces.Box) and space.dtype is not None and space.dtype.kind == "f":
        return _box_action(space)
    if isinstance(space, spaces.MultiDiscrete):
        return _multi_discrete_action(space)
    if isinstance(space, spaces.MultiBinary):
        return _multi_binary_action(space)
    raise SpaceError(
        f"{name}: {space} cannot be acted in: the agent takes Discrete, float Box with finite "
        "bounds, MultiDiscrete, MultiBinary, and one Dict of them; change it with a wrapper"
    )


def _box_action(space: spaces.Box) -> tuple[ActionSpec, Callable[[NDArray[Any]], Any]]:
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)

    def write(value: NDArray[Any]) -> Any:
        share = (np.clip(value.reshape(low.shape), -1.0, 1.0) + 1.0) / 2.0
        native = (low + share * (high - low)).astype(space.dtype)
        return np.clip(native, space.low, space.high)

    bounds = tuple(map(float, low.reshape(-1))), tuple(map(float, high.reshape(-1)))
    return BoxAction(low=bounds[0], high=bounds[1]), write


def _multi_discrete_action(
    space: spaces.MultiDiscrete,
) -> tuple[ActionSpec, Callable[[NDArray[Any]], Any]]:
    counts = np.asarray(space.nvec)
    start = np.asarray(getattr(space, "start", np.zeros_like(counts)))

    def write(value: NDArray[Any]) -> Any:
        return (value.reshape(counts.shape) + start).astype(space.dtype)

    return MultiDiscreteAction(classes=tuple(map(int, counts.reshape(-1)))), write


def _multi_binary_action(
    space: spaces.MultiBinary,
) -> tuple[ActionSpec, Callable[[NDArray[Any]], Any]]:
    shape = space.shape

    def write(value: NDArray[Any]) -> Any:
        return value.reshape(shape).astype(space.dtype)

    return MultiBinaryAction(size=math.prod(shape)), write


def _random_action(spec: ActionSpec, rng: np.random.Generator) -> NDArray[Any]:
    if isinstance(spec, DiscreteAction):
        return np.array(rng.integers(spec.classes), np.int32)
    if isinstance(spec, BoxAction):
        return rng.uniform(-1.0, 1.0, spec.size).astype(np.float32)
    if isinstance(spec, MultiDiscreteAction):
        return rng.integers(np.asarray(spec.classes)).astype(np.int32)
    return rng.integers(2, size=spec.size).astype(np.int32)
