"""Presets of the agents beside DreamerV3 of 2025, with the numbers of their publications.

Their schedules are written as train ratios: V1 makes 100 updates of 50×50 steps every 1,000 frames,
V2 one of 16×50 every 5 or 16 steps, DreamerPro one of 50×51 every 5.
"""

from __future__ import annotations

from deploy.presets.base import Preset

_VISION = {
    "env": "dmc:walker-walk",
    "environment.action_repeat": 2,
    "environment.obs": "image",
    "environment.image_size": 64,
}
_PROPRIO = {
    "env": "dmc:walker-walk",
    "environment.action_repeat": 2,
    "environment.obs": "vector",
}
_ATARI = {
    "env": "ale:Pong",
    "environment.action_repeat": 4,
    "environment.image_size": 64,
    "environment.noops": 30,
}
_ONE = {"actors": 1, "envs_per_actor": 1, "replay.online": False}
_WITHIN = {"replay.sampling.windows": "episodes"}
_V1 = (
    _ONE
    | _WITHIN
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
    _ONE
    | _WITHIN
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
_PRO = (
    _ONE
    | _WITHIN
    | {
        "steps": 500_000,
        "train_ratio": 510.0,
        "replay.capacity_steps": 500_000,
        "replay.min_size_steps": 2_500,
        "learner.batch_size": 50,
        # Its losses of prototypes leave the first step out.
        "learner.batch_length": 51,
    }
)
_V2_ATARI = {
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
# Episodes may be shorter than a window, so windows cross them, with resets inside.
_MINIGRID = {
    "env": "minigrid:DoorKey-6x6-v0",
    "steps": 500_000,
    "actors": 2,
    "envs_per_actor": 8,
    "train_ratio": 64.0,
    "environment.image_size": 64,
    "replay.online": False,
    "replay.capacity_steps": 500_000,
}
_CONTRAST = {
    "steps": 500_000,
    "actors": 4,
    "envs_per_actor": 4,
    "train_ratio": 512.0,
    "replay.capacity_steps": 500_000,
}

EARLIER_PRESETS: dict[str, Preset] = {
    "v1-dmc-vision": Preset(
        summary="DreamerV1 on DeepMind Control from 64x64 pixels, 5e6 frames.",
        agent="v1",
        size="dmc",
        values=_VISION | _V1,
    ),
    "v1-dmc-proprio": Preset(
        summary="The same from vectors, which the paper does not have: DreamerV2's MLPs.",
        agent="v1",
        size="dmc",
        values=_PROPRIO | _V1,
    ),
    "v1-atari": Preset(
        summary="DreamerV1 on Atari for 5e6 frames, with what its paper says of discrete tasks "
        "and the schedule of DeepMind Control.",
        agent="v1",
        size="dmc",
        values=_ATARI
        | _V1
        | _V1_DISCRETE
        | {"steps": 1_250_000, "train_ratio": 1000.0, "replay.capacity_steps": 1_250_000},
    ),
    "v1-crafter": Preset(
        summary="The same on Crafter for a million steps. Not published.",
        agent="v1",
        size="dmc",
        values=_V1
        | _V1_DISCRETE
        | {
            "env": "crafter:reward",
            "steps": 1_000_000,
            # 100 updates every 1,000 frames, which are its steps.
            "train_ratio": 250.0,
            "environment.image_size": 64,
            "replay.capacity_steps": 1_000_000,
        },
    ),
    "v1-minigrid": Preset(
        summary="The same on MiniGrid. Our own numbers.",
        agent="v1",
        size="dmc",
        values=_MINIGRID | _V1_DISCRETE,
    ),
    "v2-dmc-vision": Preset(
        summary="DreamerV2 on DeepMind Control from 64x64 pixels, 2e6 frames.",
        agent="v2",
        size="dmc",
        values=_VISION | _V2_DMC,
    ),
    "v2-dmc-proprio": Preset(
        summary="The same from vectors.",
        agent="v2",
        size="dmc",
        values=_PROPRIO | _V2_DMC,
    ),
    "v2-atari": Preset(
        summary="DreamerV2 on Atari at 200 million frames: 64x64 grey, sticky, needed actions.",
        agent="v2",
        size="atari",
        values=_ATARI
        | _V2
        | {
            "steps": 50_000_000,
            "train_ratio": 50.0,
            "replay.capacity_steps": 2_000_000,
            "replay.min_size_steps": 50_000,
        }
        | _V2_ATARI,
    ),
    "v2-atari100k": Preset(
        summary="DreamerV2 with its Atari settings for 400 thousand frames. Our own schedule: an "
        "update in every step.",
        agent="v2",
        size="atari",
        values=_ATARI
        | _V2
        | _V2_ATARI
        | {
            "steps": 100_000,
            "train_ratio": 800.0,
            "environment.sticky": 0.0,
            "replay.capacity_steps": 100_000,
        },
    ),
    "v2-minigrid": Preset(
        summary="DreamerV2 on MiniGrid. Our own numbers.",
        agent="v2",
        size="atari",
        values=_MINIGRID | {"agent.reward": "identity", "agent.kl_scale": 0.1},
    ),
    "v2-crafter": Preset(
        summary="DreamerV2 on Crafter for a million steps, with a norm in every layer.",
        agent="v2",
        size="full",
        values=_V2
        | {
            "env": "crafter:reward",
            "steps": 1_000_000,
            "environment.image_size": 64,
            "replay.capacity_steps": 1_000_000,
            "replay.min_size_steps": 10_000,
            "replay.sampling.ends": True,
            "agent.layer_norm": True,
            "agent.imagination.discount": 0.999,
            "agent.imagination.entropy": 3e-3,
            "agent.optim.actor_lr": 1e-4,
            "agent.optim.critic_lr": 1e-4,
        },
    ),
    "v3-2023-dmc-vision": Preset(
        summary="DreamerV3 of January 2023 on DeepMind Control from 64x64 pixels, 1e6 frames.",
        agent="v3-2023",
        size="s",
        values=_VISION | _V3_2023_DMC | {"steps": 500_000, "replay.capacity_steps": 500_000},
    ),
    "v3-2023-dmc-proprio": Preset(
        summary="The same from vectors, 5e5 frames.",
        agent="v3-2023",
        size="s",
        values=_PROPRIO | _V3_2023_DMC | {"steps": 250_000, "replay.capacity_steps": 250_000},
    ),
    "v3-2023-atari": Preset(
        summary="DreamerV3 of January 2023 on Atari at 200 million frames: 64x64 colour, sticky, "
        "all actions, no no-ops.",
        agent="v3-2023",
        size="xl",
        values=_ATARI
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
        values=_MINIGRID,
    ),
    "v3-2023-atari100k": Preset(
        summary="DreamerV3 of January 2023 on Atari at 400 thousand frames.",
        agent="v3-2023",
        size="s",
        values=_ATARI
        | _ONE
        | {
            "steps": 100_000,
            "train_ratio": 1024.0,
            "learner.precision": "fp32",
            "environment.sticky": 0.0,
            "environment.all_actions": False,
            "replay.capacity_steps": 100_000,
        },
    ),
    "v3-2023-crafter": Preset(
        summary="DreamerV3 of January 2023 on Crafter for a million steps.",
        agent="v3-2023",
        size="xl",
        values=_ONE
        | {
            "env": "crafter:reward",
            "steps": 1_000_000,
            "train_ratio": 512.0,
            "environment.image_size": 64,
            "replay.capacity_steps": 1_000_000,
        },
    ),
    "pro-dmc-vision": Preset(
        summary="DreamerPro on DeepMind Control from 64x64 pixels, 1e6 frames.",
        agent="pro",
        size="dmc",
        values=_VISION | _PRO,
    ),
    "pro-natural": Preset(
        summary="DreamerPro for natural backgrounds: reward weight 1000, norms pulled to 1.",
        agent="pro",
        size="dmc",
        values=_VISION | _PRO | {"agent.reward_scale": 1000.0, "agent.prototypes.norm_scale": 1.0},
    ),
    "pro-atari": Preset(
        summary="DreamerPro on Atari: its objective on DreamerV2's settings, for 4e6 frames. Its "
        "repository calls that untested, and so is this.",
        agent="pro",
        size="atari",
        values=_ATARI
        | _PRO
        | _V2_ATARI
        | {
            "steps": 1_000_000,
            "replay.capacity_steps": 1_000_000,
            "agent.cont": True,
            "agent.free_nats": 0.0,
            "agent.reward": "tanh",
            "agent.prototypes.eps": 0.05,
        },
    ),
    "pro-v3-dmc-vision": Preset(
        summary="DreamerPro's objective on DreamerV3 (2025), from 64x64 pixels. Not published.",
        agent="pro-v3",
        size="12m",
        values=_VISION
        | {
            "steps": 600_000,
            "actors": 4,
            "envs_per_actor": 4,
            "train_ratio": 512.0,
            "replay.capacity_steps": 600_000,
        },
    ),
    "r2-dmc-vision": Preset(
        summary="R2-Dreamer on DeepMind Control from 64x64 pixels: no decoder, no views.",
        agent="r2",
        size="12m",
        values=_VISION | _CONTRAST,
    ),
    "infonce-dmc-vision": Preset(
        summary="The same with InfoNCE in the place of redundancy reduction.",
        agent="infonce",
        size="12m",
        values=_VISION | _CONTRAST,
    ),
}
