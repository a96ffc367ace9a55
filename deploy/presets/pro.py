"""Presets of the agents without a decoder: DreamerPro, R2-Dreamer and InfoNCE.

DreamerPro makes an update of 50×51 steps every 5. It was published on DeepMind Control from pixels.
"""

from __future__ import annotations

from deploy.presets.base import Preset
from deploy.presets.domains import (
    ATARI,
    ATARI_100K,
    MINIGRID,
    ONE,
    PROPRIO,
    VISION,
    WITHIN,
)
from deploy.presets.earlier import V2_ATARI, V2_CRAFTER

_PRO = (
    ONE
    | WITHIN
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
# Rewards and ends as in DreamerV2's Atari settings, and the eps of its repository beside DMC.
_BEYOND_DMC = {
    "agent.cont": True,
    "agent.free_nats": 0.0,
    "agent.reward": "tanh",
    "agent.prototypes.eps": 0.05,
}
_CONTRAST = {
    "steps": 500_000,
    "actors": 4,
    "envs_per_actor": 4,
    "train_ratio": 512.0,
    "replay.capacity_steps": 500_000,
}

PRO_PRESETS: dict[str, Preset] = {
    "pro-dmc-vision": Preset(
        summary="DreamerPro on DeepMind Control from 64x64 pixels, 1e6 frames.",
        agent="pro",
        size="dmc",
        values=VISION | _PRO,
    ),
    "pro-dmc-proprio": Preset(
        summary="The same from vectors, which the paper does not have: both views are then equal, "
        "and what teaches is to foresee the own cluster.",
        agent="pro",
        size="dmc",
        values=PROPRIO | _PRO,
    ),
    "pro-natural": Preset(
        summary="DreamerPro for natural backgrounds: reward weight 1000, norms pulled to 1.",
        agent="pro",
        size="dmc",
        values=VISION | _PRO | {"agent.reward_scale": 1000.0, "agent.prototypes.norm_scale": 1.0},
    ),
    "pro-atari": Preset(
        summary="DreamerPro on Atari: its objective on DreamerV2's settings, for 4e6 frames. Its "
        "repository calls that untested, and so is this.",
        agent="pro",
        size="atari",
        values=ATARI
        | _PRO
        | V2_ATARI
        | _BEYOND_DMC
        | {"steps": 1_000_000, "replay.capacity_steps": 1_000_000},
    ),
    "pro-atari100k": Preset(
        summary="The same for 400 thousand frames. Our own schedule: an update in every step.",
        agent="pro",
        size="atari",
        values=_PRO | V2_ATARI | _BEYOND_DMC | ATARI_100K | {"train_ratio": 2550.0},
    ),
    "pro-crafter": Preset(
        summary="DreamerPro on Crafter for a million steps, on DreamerV2's settings but for the "
        "width. Not published.",
        agent="pro",
        size="atari",
        values=_PRO | V2_CRAFTER | _BEYOND_DMC | {"agent.optim.model_lr": 1e-4},
    ),
    "pro-doorkey": Preset(
        summary="DreamerPro on the task of the other agents' presets of MiniGrid. Our own numbers.",
        agent="pro",
        size="atari",
        values=MINIGRID
        | _BEYOND_DMC
        | {
            "agent.reward": "identity",
            "agent.kl_scale": 0.1,
            # As in pro-minigrid: with less the policy is certain too early.
            "agent.imagination.entropy": 3e-3,
            # A tenth of the updates, as published.
            "agent.prototypes.freeze": 3000,
        },
    ),
    "pro-v3-dmc-vision": Preset(
        summary="DreamerPro's objective on DreamerV3 (2025), from 64x64 pixels. Not published.",
        agent="pro-v3",
        size="12m",
        values=VISION
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
        values=VISION | _CONTRAST,
    ),
    "infonce-dmc-vision": Preset(
        summary="The same with InfoNCE in the place of redundancy reduction.",
        agent="infonce",
        size="12m",
        values=VISION | _CONTRAST,
    ),
}
