"""Presets of DreamerV1, V2 and V3 of January 2023, with the numbers of their publications.

Their schedules are written as train ratios: V1 makes 100 updates of 50×50 steps every 1,000 frames,
V2 one of 16×50 every 5 or 16 steps.
"""

from __future__ import annotations

from deploy.presets.base import Preset
from deploy.presets.domains import (
    ATARI,
    ATARI_100K,
    CRAFTER,
    MINIGRID,
    ONE,
    PROPRIO,
    VISION,
    WITHIN,
)

_V1 = (
    ONE
    | WITHIN
    | {
        "steps": 2_500_000,
        "train_ratio": 500.0,
        "replay.capacity_steps": 2_500_000,
        "replay.min_size_steps": 2_500,
        "learner.batch_size": 50,
        "learner.batch_length": 50,
    }
)
_V2 = (
    ONE
    | WITHIN
    | {
        "train_ratio": 160.0,
        "learner.batch_size": 16,
        "learner.batch_length": 50,
    }
)
_V2_DMC = _V2 | {
    "steps": 1_000_000,
    "replay.capacity_steps": 1_000_000,
    "replay.min_size_steps": 1_000,
    "agent.cont": False,
    "agent.reward": "identity",
    "agent.free_nats": 1.0,
    "agent.imagination.entropy": 1e-4,
    "agent.optim.model_lr": 3e-4,
    "agent.optim.critic_lr": 8e-5,
}
_V3_2023_DMC = {
    "actors": 1,
    "envs_per_actor": 4,
    "train_ratio": 512.0,
    "replay.online": False,
}
V2_ATARI = {
    "replay.sampling.ends": True,
    "environment.grayscale": True,
    "environment.sticky": 0.25,
    "environment.all_actions": False,
    "environment.time_limit": 27_000,
    "agent.kl_scale": 0.1,
    "agent.cont_scale": 5.0,
    "agent.imagination.discount": 0.999,
    "agent.imagination.entropy": 1e-3,
    "agent.optim.model_lr": 2e-4,
    "agent.optim.actor_lr": 4e-5,
    "agent.optim.critic_lr": 1e-4,
}
V2_CRAFTER = CRAFTER | {
    "replay.min_size_steps": 10_000,
    "replay.sampling.ends": True,
    "agent.layer_norm": True,
    "agent.imagination.discount": 0.999,
    "agent.imagination.entropy": 3e-3,
    "agent.optim.actor_lr": 1e-4,
    "agent.optim.critic_lr": 1e-4,
}
# What the paper says of discrete tasks; its code has none. Epsilon falls to 0.1 at 200,000 updates.
_V1_DISCRETE = {
    "agent.cont": True,
    "agent.reward": "tanh",
    "agent.kl_scale": 0.1,
    "agent.imagination.horizon": 10,
    "agent.exploration.epsilon": 0.4,
    "agent.exploration.half_life_updates": 100_000,
    "agent.exploration.floor": 0.1,
}

EARLIER_PRESETS: dict[str, Preset] = {
    "v1-dmc-vision": Preset(
        summary="DreamerV1 on DeepMind Control from 64x64 pixels, 5e6 frames.",
        agent="v1",
        size="dmc",
        values=VISION | _V1,
    ),
    "v1-dmc-proprio": Preset(
        summary="The same from vectors, which the paper does not have: DreamerV2's MLPs.",
        agent="v1",
        size="dmc",
        values=PROPRIO | _V1,
    ),
    "v1-atari": Preset(
        summary="DreamerV1 on Atari for 5e6 frames, with what its paper says of discrete tasks "
        "and the schedule of DeepMind Control.",
        agent="v1",
        size="dmc",
        values=ATARI
        | _V1
        | _V1_DISCRETE
        | {"steps": 1_250_000, "train_ratio": 1000.0, "replay.capacity_steps": 1_250_000},
    ),
    "v1-atari100k": Preset(
        summary="The same for 400 thousand frames. Our own schedule: an update in every step.",
        agent="v1",
        size="dmc",
        values=_V1 | _V1_DISCRETE | ATARI_100K | {"train_ratio": 2500.0},
    ),
    "v1-crafter": Preset(
        summary="The same on Crafter for a million steps. Not published.",
        agent="v1",
        size="dmc",
        # 100 updates every 1,000 frames, which are its steps.
        values=_V1 | _V1_DISCRETE | CRAFTER | {"train_ratio": 250.0},
    ),
    "v1-minigrid": Preset(
        summary="The same on MiniGrid. Our own numbers.",
        agent="v1",
        size="dmc",
        values=MINIGRID | _V1_DISCRETE,
    ),
    "v2-dmc-vision": Preset(
        summary="DreamerV2 on DeepMind Control from 64x64 pixels, 2e6 frames.",
        agent="v2",
        size="dmc",
        values=VISION | _V2_DMC,
    ),
    "v2-dmc-proprio": Preset(
        summary="The same from vectors.",
        agent="v2",
        size="dmc",
        values=PROPRIO | _V2_DMC,
    ),
    "v2-atari": Preset(
        summary="DreamerV2 on Atari at 200 million frames: 64x64 grey, sticky, needed actions.",
        agent="v2",
        size="atari",
        values=ATARI
        | _V2
        | {
            "steps": 50_000_000,
            "train_ratio": 50.0,
            "replay.capacity_steps": 2_000_000,
            "replay.min_size_steps": 50_000,
        }
        | V2_ATARI,
    ),
    "v2-atari100k": Preset(
        summary="DreamerV2 with its Atari settings for 400 thousand frames. Our own schedule: an "
        "update in every step.",
        agent="v2",
        size="atari",
        values=_V2 | V2_ATARI | ATARI_100K | {"train_ratio": 800.0},
    ),
    "v2-minigrid": Preset(
        summary="DreamerV2 on MiniGrid. Our own numbers.",
        agent="v2",
        size="atari",
        values=MINIGRID | {"agent.reward": "identity", "agent.kl_scale": 0.1},
    ),
    "v2-crafter": Preset(
        summary="DreamerV2 on Crafter for a million steps, with a norm in every layer.",
        agent="v2",
        size="full",
        values=_V2 | V2_CRAFTER,
    ),
    "v3-2023-dmc-vision": Preset(
        summary="DreamerV3 of January 2023 on DeepMind Control from 64x64 pixels, 1e6 frames.",
        agent="v3-2023",
        size="s",
        values=VISION | _V3_2023_DMC | {"steps": 500_000, "replay.capacity_steps": 500_000},
    ),
    "v3-2023-dmc-proprio": Preset(
        summary="The same from vectors, 5e5 frames.",
        agent="v3-2023",
        size="s",
        values=PROPRIO | _V3_2023_DMC | {"steps": 250_000, "replay.capacity_steps": 250_000},
    ),
    "v3-2023-atari": Preset(
        summary="DreamerV3 of January 2023 on Atari at 200 million frames: 64x64 colour, sticky, "
        "all actions, no no-ops.",
        agent="v3-2023",
        size="xl",
        values=ATARI
        | {
            "steps": 55_000_000,
            "actors": 2,
            "envs_per_actor": 4,
            "train_ratio": 64.0,
            "environment.noops": 0,
            "replay.online": False,
            "replay.capacity_steps": 1_000_000,
        },
    ),
    "v3-2023-minigrid": Preset(
        summary="DreamerV3 of January 2023 on MiniGrid. Our own numbers.",
        agent="v3-2023",
        size="s",
        values=MINIGRID,
    ),
    "v3-2023-atari100k": Preset(
        summary="DreamerV3 of January 2023 on Atari at 400 thousand frames.",
        agent="v3-2023",
        size="s",
        values=ATARI_100K | ONE | {"train_ratio": 1024.0, "learner.precision": "fp32"},
    ),
    "v3-2023-crafter": Preset(
        summary="DreamerV3 of January 2023 on Crafter for a million steps.",
        agent="v3-2023",
        size="xl",
        values=ONE | CRAFTER | {"train_ratio": 512.0},
    ),
}
