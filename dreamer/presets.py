"""Named agents and sizes, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, NamedTuple, TypeVar

from dreamer.config import AgentConfig, V3Config

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

AGENTS: dict[str, Known] = {"v3": Known("dreamer.v3:DreamerV3", V3Config(), V3_SIZES)}


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
