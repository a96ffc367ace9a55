"""Named configurations of whole runs, as data: published numbers where there are any."""

from __future__ import annotations

from dataclasses import replace

from deploy.config import ConfigError, TrainConfig, nearest, with_values
from deploy.presets.base import Preset
from deploy.presets.control import CONTROL_PRESETS
from deploy.presets.earlier import EARLIER_PRESETS
from deploy.presets.pro import PRO_PRESETS
from deploy.presets.times import expected_time, image_side
from deploy.presets.v3 import SUITE_PRESETS, V3_PRESETS
from dreamer.presets import AGENTS, agent_config, sized

PRESETS: dict[str, Preset] = V3_PRESETS | EARLIER_PRESETS | PRO_PRESETS | CONTROL_PRESETS


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


def preset_for(env: str, *, image: bool = False) -> tuple[str, str]:
    """Return which preset an environment gets that comes without one, and why.

    Args:
        env: its id.
        image: whether images were asked for where there is a choice.
    """
    default = TrainConfig()
    if env == default.env:
        return default.preset, f"it is made for {env}"
    for prefix, name in SUITE_PRESETS.items():
        if env.startswith(prefix):
            if image and prefix == "dmc:":
                return "v3-dmc-vision", "DeepMind Control from images"
            return name, f"it is made for {prefix}…"
    return "v3", f"no preset is made for {env}; check its steps, --train-ratio and --size"


def cost(config: TrainConfig) -> str:
    """Return in words what a run costs: updates, the replay at its full size, the updates' time."""
    updates = config.train_ratio / (config.learner.batch_size * config.learner.batch_length)
    memory = config.replay.capacity_steps * record_bytes(config) / 2**30
    return "; ".join(
        (
            f"{updates:.3g} updates per step, {updates * config.steps:,.0f} in all",
            f"{memory:,.1f} GiB of replay" if memory >= 0.1 else "less than 0.1 GiB of replay",
            expected_time(config),
        )
    )


def record_bytes(config: TrainConfig) -> int:
    """Return the bytes of one replay record in the mirror, up to a few hundred for vectors."""
    image = image_side(config) ** 2 * (1 if config.environment.grayscale else 3)
    return image + config.agent.latent_bytes() + 64


def _choices(name: str, known: list[str]) -> str:
    return nearest(name, known) + f" (choose one of {', '.join(known)})"
