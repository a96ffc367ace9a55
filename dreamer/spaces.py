"""Typed descriptions of what an agent sees and does, free of torch and of any environment library.

Observation and action spaces are dictionaries from a column name to one of the specs below. A bare
observation space uses the key ``image``, ``vector`` or ``discrete``; a bare action space uses
``action``, and the members of a dictionary action space are called ``action.<name>``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ImageSpec:
    """A square uint8 image, (h, w, c)."""

    shape: tuple[int, int, int]

    def __post_init__(self) -> None:
        h, w, c = self.shape
        if h != w or min(h, c) < 1:
            raise ValueError(
                f"image observations must be square (h, w, c) with h == w, got {self.shape}; "
                "resize them in the environment (--environment.image-size)"
            )


@dataclass(frozen=True, kw_only=True)
class VectorSpec:
    """A float32 vector, (d,)."""

    shape: tuple[int]

    def __post_init__(self) -> None:
        if len(self.shape) != 1 or self.shape[0] < 1:
            raise ValueError(
                f"vector observations must have shape (d,) with d >= 1, got {self.shape}"
            )


@dataclass(frozen=True, kw_only=True)
class DiscreteSpec:
    """One int32 in [0, classes)."""

    classes: int

    def __post_init__(self) -> None:
        if self.classes < 2:
            raise ValueError(f"a discrete observation needs at least 2 classes, got {self.classes}")


@dataclass(frozen=True, kw_only=True)
class DiscreteAction:
    """One int32 in [0, classes)."""

    classes: int

    def __post_init__(self) -> None:
        if self.classes < 2:
            raise ValueError(f"a discrete action needs at least 2 choices, got {self.classes}")


@dataclass(frozen=True, kw_only=True)
class BoxAction:
    """A float32 vector whose bounds map to [-1, 1] in the record; flattened to one dimension."""

    low: tuple[float, ...]
    high: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.low) != len(self.high) or not self.low:
            raise ValueError(f"a box action needs matching bounds, got {self.low} and {self.high}")
        for low, high in zip(self.low, self.high, strict=True):
            if not (-1e30 < low < high < 1e30):
                raise ValueError(
                    f"a box action needs finite bounds with low < high, got [{low}, {high}]; "
                    "wrap the environment with a bounded action space"
                )

    @property
    def size(self) -> int:
        """Number of dimensions."""
        return len(self.low)


@dataclass(frozen=True, kw_only=True)
class MultiDiscreteAction:
    """Several int32, the i-th in [0, classes[i])."""

    classes: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.classes or min(self.classes) < 2:
            raise ValueError(
                f"every part of a multi-discrete action needs >= 2 choices, got {self.classes}"
            )


@dataclass(frozen=True, kw_only=True)
class MultiBinaryAction:
    """Several int32 in {0, 1}."""

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"a multi-binary action needs at least one bit, got {self.size}")


ObsSpec = ImageSpec | VectorSpec | DiscreteSpec
ActionSpec = DiscreteAction | BoxAction | MultiDiscreteAction | MultiBinaryAction
ObsSpace = dict[str, ObsSpec]
ActionSpace = dict[str, ActionSpec]

_KINDS: dict[str, Any] = {
    kind.__name__: kind
    for kind in (
        ImageSpec,
        VectorSpec,
        DiscreteSpec,
        DiscreteAction,
        BoxAction,
        MultiDiscreteAction,
        MultiBinaryAction,
    )
}

RESERVED = frozenset({"reward", "is_first", "is_last", "is_terminal", "deter", "stoch"})


def check_observation_names(space: ObsSpace) -> None:
    """Raise ValueError if an observation key collides with a column of the record."""
    for key in space:
        if key in RESERVED or key == "action" or key.startswith("action."):
            raise ValueError(
                f"observation key {key!r} is a column name of the replay record; rename it in the "
                f"environment (reserved: {sorted(RESERVED)}, action, action.*)"
            )


def record_column(spec: ObsSpec | ActionSpec) -> tuple[str, tuple[int, ...]]:
    """Return (dtype name, shape) of one record of this spec."""
    if isinstance(spec, ImageSpec):
        return "uint8", spec.shape
    if isinstance(spec, VectorSpec):
        return "float32", spec.shape
    if isinstance(spec, DiscreteSpec | DiscreteAction):
        return "int32", ()
    if isinstance(spec, BoxAction):
        return "float32", (spec.size,)
    if isinstance(spec, MultiDiscreteAction):
        return "int32", (len(spec.classes),)
    return "int32", (spec.size,)


def space_to_dict(space: dict[str, Any]) -> dict[str, Any]:
    """Return plain lists, numbers and strings that describe the space."""
    return {key: {"kind": type(spec).__name__, **asdict(spec)} for key, spec in space.items()}


def space_from_dict(data: dict[str, Any]) -> dict[str, Any]:
    """Rebuild a space from `space_to_dict`. Raises ValueError on an unknown kind."""
    space = {}
    for key, fields in data.items():
        kind = fields.get("kind")
        if kind not in _KINDS:
            raise ValueError(f"space {key!r} has kind {kind!r}, expected one of {sorted(_KINDS)}")
        values = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in fields.items()
            if name != "kind"
        }
        space[key] = _KINDS[kind](**values)
    return space
