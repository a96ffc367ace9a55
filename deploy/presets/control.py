"""Presets of all agents on small control tasks: our own numbers, there are no published ones.

As in v3-cartpole the batches are small and the learning rates about ten times the published ones,
because those take hours for so small a task. Windows may cross episodes for every agent: the first
episodes are shorter than a window.
"""

from __future__ import annotations

from deploy.presets.base import Preset
from deploy.presets.v3 import V3_PRESETS

_CARTPOLE = {
    name: value
    for name, value in V3_PRESETS["v3-cartpole"].values.items()
    if not name.startswith("agent.")
} | {"replay.online": False}
# As in v3-cartpole: where the cart is must be worth more than its KL.
_SEES_THE_CART = {"agent.rec_scale": 20.0}
_FAST = {
    "agent.optim.model_lr": 1e-3,
    "agent.optim.actor_lr": 3e-4,
    "agent.optim.critic_lr": 3e-4,
}
_QUICK_V3 = {"replay.online": True, "agent.optim.lr": 4e-4, "agent.optim.warmup": 200}
_BALANCE = _CARTPOLE | {
    "env": "dmc:cartpole-balance",
    "environment.action_repeat": 2,
    "environment.obs": "vector",
    "steps": 15_000,
    "envs_per_actor": 2,
    "train_ratio": 100.0,
    "actor.isolation": "process",
}
_BALANCE_WITHOUT_ENDS = {"agent.cont": False}
# A few thousand updates in all: prototypes and slow critic cannot wait as published.
_SOON = {
    "agent.slow_every": 20,
    "agent.prototypes.eps": 0.05,
    "agent.prototypes.freeze": 300,
}
# With 0.99 a step costs less than the critic is wrong by: one that believes in a few hundredths too
# much makes the goal look worse than walking on, and nothing but the discount takes that back.
_ROOM_DISCOUNT = {"agent.imagination.discount": 0.95}
_EMPTY_ROOM = _CARTPOLE | {
    "env": "minigrid:Empty-5x5-v0",
    "environment.image_size": 64,
    "steps": 12_000,
    "envs_per_actor": 2,
    "train_ratio": 32.0,
    "actor.isolation": "process",
    "learner.batch_size": 8,
    "learner.batch_length": 16,
    "learner.video_every_s": 120.0,
    "replay.capacity_steps": 20_000,
}

CONTROL_PRESETS: dict[str, Preset] = {
    "v1-cartpole": Preset(
        summary="DreamerV1 on CartPole-v1, with a head for the end of episodes and "
        "straight-through actions.",
        agent="v1",
        size="tiny",
        # The KL of so small a task stays below the published 3 free nats, where nothing trains the
        # prior, in which the policy learns.
        values=_CARTPOLE
        | _FAST
        | _SEES_THE_CART
        | {"agent.cont": True, "agent.exploration.epsilon": 0.1, "agent.free_nats": 0.5},
    ),
    "v2-cartpole": Preset(
        summary="DreamerV2 on CartPole-v1, with the free nats of its DeepMind Control settings.",
        agent="v2",
        size="tiny",
        values=_CARTPOLE
        | _FAST
        | _SEES_THE_CART
        | {"agent.free_nats": 1.0, "agent.reward": "identity", "agent.slow_every": 20},
    ),
    "v3-2023-cartpole": Preset(
        summary="DreamerV3 of January 2023 on CartPole-v1.",
        agent="v3-2023",
        size="tiny",
        # Its critic starts at zero and is held by its slow copy: at 3e-4 its values lag behind. An
        # end of an episode is all that this reward tells, and a small model is rarely sure of one.
        values=_CARTPOLE
        | _FAST
        | _SEES_THE_CART
        | {"agent.optim.critic_lr": 1e-3, "agent.continuation": "probability"},
    ),
    "pro-cartpole": Preset(
        summary="DreamerPro on CartPole-v1: both views of a vector are equal.",
        agent="pro",
        size="tiny",
        values=_CARTPOLE
        | _FAST
        | _SOON
        # Latents and KL as in pro-minigrid.
        | {
            "agent.cont": True,
            "agent.world.classes": 8,
            "agent.free_nats": 0.0,
            "agent.kl_scale": 0.1,
            "agent.imagination.entropy": 2e-3,
        },
    ),
    "v1-balance": Preset(
        summary="DreamerV1 on cartpole-balance from vectors, within an hour of two CPU cores.",
        agent="v1",
        size="tiny",
        values=_BALANCE | _FAST | _BALANCE_WITHOUT_ENDS | {"agent.free_nats": 0.5},
    ),
    "v2-balance": Preset(
        summary="DreamerV2 on the same, with the entropy and free nats of its DMC settings.",
        agent="v2",
        size="tiny",
        values=_BALANCE
        | _FAST
        | _BALANCE_WITHOUT_ENDS
        | {
            "agent.free_nats": 1.0,
            "agent.imagination.entropy": 1e-4,
            "agent.reward": "identity",
            "agent.slow_every": 20,
        },
    ),
    "v3-2023-balance": Preset(
        summary="DreamerV3 of January 2023 on the same.",
        agent="v3-2023",
        size="tiny",
        values=_BALANCE | _FAST | {"agent.optim.critic_lr": 1e-3},
    ),
    "v3-balance": Preset(
        summary="DreamerV3 (2025) on the same.",
        agent="v3",
        size="tiny",
        values=_BALANCE | _QUICK_V3,
    ),
    "pro-minigrid": Preset(
        summary="DreamerPro in an empty room of MiniGrid from 64x64 pixels, within a quarter of an "
        "hour of two CPU cores: latents and KL as in DreamerV2's Atari settings.",
        agent="pro",
        size="tiny",
        values=_EMPTY_ROOM
        | _ROOM_DISCOUNT
        | _FAST
        | _SOON
        | {
            "agent.cont": True,
            "agent.world.classes": 8,
            "agent.free_nats": 0.0,
            "agent.kl_scale": 0.1,
            # With Atari's 1e-3 the policy is certain within 1,500 steps, and then nothing tells it
            # that it turns on the spot for ever.
            "agent.imagination.entropy": 3e-3,
        },
    ),
    "v2-room": Preset(
        summary="DreamerV2 in the same room, to compare with.",
        agent="v2",
        size="tiny",
        values=_EMPTY_ROOM
        | _ROOM_DISCOUNT
        | _FAST
        | {
            "agent.free_nats": 0.0,
            "agent.kl_scale": 0.1,
            "agent.imagination.entropy": 3e-3,
            "agent.slow_every": 20,
            "agent.reward": "identity",
        },
    ),
    "v3-room": Preset(
        summary="DreamerV3 (2025) in the same room, to compare with.",
        agent="v3",
        size="tiny",
        values=_EMPTY_ROOM | _QUICK_V3,
    ),
}
