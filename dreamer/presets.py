"""Named agents and sizes, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, NamedTuple, TypeVar

from dreamer.config import AgentConfig, V3Config
from dreamer.earlier import (
    ContrastConfig,
    ProConfig,
    ProV3Config,
    R2Config,
    V1Config,
    V2Config,
    V3Of2023Config,
)

Config = TypeVar("Config")
Widths = Mapping[str, int]
"""Dotted field of a configuration → its value at some size."""

# (deter, hidden, classes, depth, units) of DreamerV3 (Nature 2025), from 1m on; "tiny" is ours, for
# tasks that a CPU solves in minutes, and "debug" is for tests.
SIZES: dict[str, tuple[int, int, int, int, int]] = {
    "debug": (16, 8, 4, 2, 8),
    "tiny": (256, 64, 8, 4, 64),
    "1m": (512, 64, 4, 4, 64),
    "12m": (2048, 256, 16, 16, 256),
    "25m": (3072, 384, 24, 24, 384),
    "50m": (4096, 512, 32, 32, 512),
    "100m": (6144, 768, 48, 48, 768),
    "200m": (8192, 1024, 64, 64, 1024),
    "400m": (12288, 1536, 96, 96, 1536),
}

# Stochastic groups: the published sizes all have 32.
PUBLISHED_GROUPS = 32
FEWER_GROUPS = {"debug": 4, "tiny": 16}


class Known(NamedTuple):
    """A registered agent."""

    build: str
    """``module:class``, imported when an agent is built, so that configurations stay torch-free."""
    config: AgentConfig
    """Its published configuration."""
    sizes: Mapping[str, Widths]
    """Its sizes."""


def _v3_widths(size: str) -> Widths:
    deter, hidden, classes, depth, units = SIZES[size]
    groups = FEWER_GROUPS.get(size, PUBLISHED_GROUPS)
    parts = ("encoder", "decoder", "reward", "cont", "critic", "actor")
    return (
        {"rssm.deter": deter, "rssm.hidden": hidden, "rssm.classes": classes}
        | {"rssm.stoch": groups, "encoder.depth": depth, "decoder.depth": depth}
        | {f"{part}.units": units for part in parts}
    )


V3_SIZES = {size: _v3_widths(size) for size in SIZES}

# (deter, hidden, stoch, depth, units) of DreamerV1, V2 and Pro: as published per domain; "tiny" and
# "debug" are ours.
EARLY_SIZES: dict[str, tuple[int, int, int, int, int]] = {
    "debug": (16, 8, 4, 2, 8),
    "tiny": (128, 128, 16, 8, 128),
}
EARLY_CLASSES = {"debug": 4, "tiny": 8}


def _early_widths(size: str, categorical: bool) -> Widths:
    deter, hidden, stoch, depth, units = EARLY_SIZES[size]
    classes = EARLY_CLASSES[size] if categorical else 0
    return (
        {"world.deter": deter, "world.hidden": hidden, "world.stoch": stoch}
        | {"world.classes": classes, "world.depth": depth, "heads.units": units}
        | {"world.vector_units": units, "world.vector_layers": 2}
    )


def _widths_of_2023(deter: int, depth: int, units: int, layers: int) -> Widths:
    heads = ("reward", "cont", "critic", "actor")
    return {
        "world.deter": deter,
        "world.hidden": units,
        "world.depth": depth,
        "heads.units": units,
    } | {f"heads.{head}_layers": layers for head in heads}


V1_SIZES: dict[str, Widths] = {
    **{size: _early_widths(size, categorical=False) for size in EARLY_SIZES},
    "dmc": {},
}
V2_SIZES: dict[str, Widths] = {
    **{size: _early_widths(size, categorical=True) for size in EARLY_SIZES},
    "dmc": {"world.deter": 200, "world.hidden": 200},
    "atari": {"world.deter": 600, "world.hidden": 600},
    "full": {"world.deter": 1024, "world.hidden": 1024},
}
# The published sizes leave the MLPs of vectors as they are: five layers of 1024.
SIZES_OF_2023: dict[str, Widths] = {
    **{
        size: {
            **_widths_of_2023(deter, depth, units, 2),
            "world.stoch": stoch,
            "world.classes": EARLY_CLASSES[size],
            "world.vector_units": units,
            "world.vector_layers": 2,
        }
        for size, (deter, _, stoch, depth, units) in EARLY_SIZES.items()
    },
    "xs": _widths_of_2023(256, 24, 256, 1),
    "s": _widths_of_2023(512, 32, 512, 2),
    "m": _widths_of_2023(1024, 48, 640, 3),
    "l": _widths_of_2023(2048, 64, 768, 4),
    "xl": _widths_of_2023(4096, 96, 1024, 5),
}

# Fewer prototypes where the model is small.
_FEWER_PROTOTYPES = {"debug": 16, "tiny": 256}
_GAUSSIAN_PRO = {"world.deter": 200, "world.hidden": 200, "world.stoch": 32, "world.classes": 0}
PRO_SIZES: dict[str, Widths] = {
    size: {**widths, "prototypes.count": _FEWER_PROTOTYPES.get(size, 2500)}
    for size, widths in {
        **{size: _early_widths(size, categorical=False) for size in EARLY_SIZES},
        "dmc": _GAUSSIAN_PRO,
        "atari": {**_GAUSSIAN_PRO, **V2_SIZES["atari"], "world.classes": 32},
    }.items()
}
PRO_V3_SIZES: dict[str, Widths] = {
    size: {**widths, "prototypes.count": _FEWER_PROTOTYPES.get(size, 2500)}
    for size, widths in V3_SIZES.items()
}

AGENTS: dict[str, Known] = {
    "v1": Known("dreamer.v1:DreamerV1", V1Config(), V1_SIZES),
    "v2": Known("dreamer.v2:DreamerV2", V2Config(), V2_SIZES),
    "v3-2023": Known("dreamer.v3_2023:DreamerV3Of2023", V3Of2023Config(), SIZES_OF_2023),
    "v3": Known("dreamer.v3:DreamerV3", V3Config(), V3_SIZES),
    "pro": Known("dreamer.pro:DreamerPro", ProConfig(), PRO_SIZES),
    "pro-v3": Known("dreamer.pro:DreamerProV3", ProV3Config(), PRO_V3_SIZES),
    "r2": Known("dreamer.contrast:R2Dreamer", R2Config(), V3_SIZES),
    "infonce": Known("dreamer.contrast:InfoNCEDreamer", ContrastConfig(), V3_SIZES),
}


def sized(config: AgentConfig, size: str) -> AgentConfig:
    """Return the config with all widths of a size. Raises ValueError on unknown sizes."""
    sizes = AGENTS[config.name].sizes
    if size not in sizes:
        raise ValueError(
            f"unknown size {size!r} of agent {config.name!r}; choose one of {', '.join(sizes)}"
        )
    return with_fields(config, sizes[size])


def agent_config(name: str = "v3", size: str = "200m") -> AgentConfig:
    """Return the published configuration of an agent at a size."""
    if name not in AGENTS:
        raise ValueError(f"unknown agent {name!r}; choose one of {', '.join(AGENTS)}")
    return sized(AGENTS[name].config, size)


def with_fields(config: Config, values: Mapping[str, Any]) -> Config:
    """Return a copy of nested frozen data with dotted fields replaced, all at once."""
    known = {item.name for item in fields(config)}  # type: ignore[arg-type]
    direct: dict[str, Any] = {}
    nested: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        head, _, rest = name.partition(".")
        assert head in known, (type(config).__name__, name)
        if rest:
            nested.setdefault(head, {})[rest] = value
        else:
            direct[head] = value
    for head, inner in nested.items():
        direct[head] = with_fields(getattr(config, head), inner)
    return replace(config, **direct)  # type: ignore[type-var]
