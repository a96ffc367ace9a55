"""Named configurations of whole runs, as data: published numbers where there are any."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from deploy.config import ConfigError, TrainConfig, nearest, with_values
from dreamer.presets import SIZES, agent_config, sized


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One named configuration: an agent, its published size, and what differs from the defaults."""

    summary: str
    """What it is, and where its numbers come from."""
    agent: str
    """Key of the agent registry."""
    size: str
    """Published size that sets all widths."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """Dotted field of `TrainConfig` → value."""


PRESETS: dict[str, Preset] = {
    "v3-cartpole": Preset(
        summary="CartPole-v1 on two CPU cores in minutes. Our own numbers: a small batch and a "
        "high learning rate, because the published ones take hours for so small a task.",
        agent="v3",
        size="tiny",
        values={
            "env": "CartPole-v1",
            "steps": 14_000,
            "actors": 1,
            "envs_per_actor": 4,
            # A step of CartPole takes microseconds, and the environment is known not to crash.
            "actor.isolation": "inline",
            "train_ratio": 80.0,
            "replay.capacity_steps": 100_000,
            "replay.chunk_steps": 32,
            "replay.redis_memory_bytes": 512 * 1024**2,
            "learner.batch_size": 16,
            "learner.batch_length": 32,
            "learner.publish_every_s": 2.0,
            "learner.publish_every_updates": 20,
            "agent.optim.lr": 4e-4,
            "agent.optim.warmup": 200,
        },
    ),
    "v3-dmc-proprio": Preset(
        summary="DeepMind Control from vectors, as the published curves were most probably made: "
        "action repeat 2, 512 replayed steps per decision, 6e5 frames.",
        agent="v3",
        size="1m",
        values={
            "env": "dmc:walker-walk",
            "steps": 300_000,
            "actors": 2,
            "envs_per_actor": 8,
            "train_ratio": 512.0,
            "environment.action_repeat": 2,
            "environment.obs": "vector",
            "replay.capacity_steps": 300_000,
        },
    ),
    "v3-dmc-vision": Preset(
        summary="DeepMind Control from 64x64 pixels, as the published curves were most probably "
        "made: action repeat 2, 512 replayed steps per decision, 1.2e6 frames.",
        agent="v3",
        size="12m",
        values={
            "env": "dmc:walker-walk",
            "steps": 600_000,
            "actors": 4,
            "envs_per_actor": 4,
            "train_ratio": 512.0,
            "environment.action_repeat": 2,
            "environment.obs": "image",
            "environment.image_size": 64,
            "replay.capacity_steps": 600_000,
        },
    ),
    "v3-atari": Preset(
        summary="Atari at 200 million frames: 96x96 grey, sticky actions, all actions, up to 30 "
        "no-ops.",
        agent="v3",
        size="200m",
        values={
            "env": "ale:Pong",
            "steps": 51_000_000,
            "actors": 8,
            "envs_per_actor": 2,
            "train_ratio": 32.0,
            "environment.action_repeat": 4,
            "environment.image_size": 96,
            "environment.grayscale": True,
            "environment.sticky": 0.25,
            "environment.noops": 30,
            "environment.all_actions": True,
            "replay.capacity_steps": 5_000_000,
        },
    ),
    "v3-atari100k": Preset(
        summary="Atari at 400 thousand frames: one environment, 64x64 colour, no sticky actions, "
        "needed actions only, up to 30 no-ops.",
        agent="v3",
        size="200m",
        values={
            "env": "ale:Pong",
            "steps": 110_000,
            "actors": 1,
            "envs_per_actor": 1,
            "train_ratio": 256.0,
            "environment.action_repeat": 4,
            "environment.image_size": 64,
            "environment.grayscale": False,
            "environment.sticky": 0.0,
            "environment.noops": 30,
            "environment.all_actions": False,
            "replay.capacity_steps": 110_000,
        },
    ),
    "v3-crafter": Preset(
        summary="Crafter from 64x64 pixels for 1.1 million steps, one environment.",
        agent="v3",
        size="200m",
        values={
            "env": "crafter:reward",
            "steps": 1_100_000,
            "actors": 1,
            "envs_per_actor": 1,
            "train_ratio": 512.0,
            "environment.image_size": 64,
            "replay.capacity_steps": 1_100_000,
        },
    ),
    "v3-minigrid": Preset(
        summary="MiniGrid from 64x64 pixels. Our own numbers, there are no published ones.",
        agent="v3",
        size="12m",
        values={
            "env": "minigrid:DoorKey-6x6-v0",
            "steps": 500_000,
            "actors": 2,
            "envs_per_actor": 8,
            "train_ratio": 64.0,
            "environment.image_size": 64,
            "replay.capacity_steps": 500_000,
        },
    ),
}


def preset(name: str, size: str | None = None) -> TrainConfig:
    """Return a named configuration, at its published size or another one.

    Raises:
        ConfigError: no preset or no size of that name; the nearest one is given.
    """
    if name not in PRESETS:
        raise ConfigError(f"unknown --preset {name}{_choices(name, list(PRESETS))}")
    chosen = PRESETS[name]
    size = size or chosen.size
    if size not in SIZES:
        raise ConfigError(f"unknown --size {size}{_choices(size, list(SIZES))}")
    base = replace(
        TrainConfig(),
        preset=name,
        size=size,
        agent=sized(agent_config(chosen.agent, chosen.size), size),
    )
    return with_values(base, chosen.values)


def _choices(name: str, known: list[str]) -> str:
    return nearest(name, known) + f" (choose one of {', '.join(known)})"
