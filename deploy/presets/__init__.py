"""Named configurations of whole runs, as data: published numbers where there are any."""

from __future__ import annotations

from dataclasses import replace

from deploy.config import ConfigError, TrainConfig, nearest, with_values
from deploy.presets.base import Preset
from deploy.presets.control import CONTROL_PRESETS
from deploy.presets.earlier import EARLIER_PRESETS
from deploy.presets.v3 import V3_PRESETS
from dreamer.presets import AGENTS, agent_config, sized

PRESETS: dict[str, Preset] = V3_PRESETS | EARLIER_PRESETS | CONTROL_PRESETS


def preset(name: str, size: str | None = None) -> TrainConfig:
    """Return a named configuration, at its published size or another one.

    Raises:
        ConfigError: no preset or no size of that name; the nearest one is given.
    """
    if name not in PRESETS:
        raise ConfigError(f"unknown --preset {name}{_choices(name, list(PRESETS))}")
    chosen = PRESETS[name]
    size = size or chosen.size
    sizes = list(AGENTS[chosen.agent].sizes)
    if size not in sizes:
        raise ConfigError(f"unknown --size {size} of {chosen.agent}{_choices(size, sizes)}")
    base = replace(
        TrainConfig(),
        preset=name,
        size=size,
        agent=sized(agent_config(chosen.agent, chosen.size), size),
    )
    return with_values(base, chosen.values)


def _choices(name: str, known: list[str]) -> str:
    return nearest(name, known) + f" (choose one of {', '.join(known)})"
