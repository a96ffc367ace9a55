"""Presets of DreamerV3 (2025)."""

from __future__ import annotations

from deploy.presets.base import Preset

SUITE_PRESETS = {
    "dmc:": "v3-dmc-proprio",
    # The other one keeps 120 GiB, and takes weeks.
    "ale:": "v3-atari100k",
    "crafter:": "v3-crafter",
    "minigrid:": "v3-minigrid",
}
"""How an environment's id begins → the preset of its suite."""

V3_PRESETS: dict[str, Preset] = {
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
            "train_ratio": 128.0,
            "replay.capacity_steps": 100_000,
            "replay.chunk_steps": 32,
            "replay.redis_memory_bytes": 512 * 1024**2,
            "learner.batch_size": 16,
            "learner.batch_length": 32,
            "learner.publish_every_s": 2.0,
            "learner.publish_every_updates": 20,
            "agent.optim.lr": 4e-4,
            "agent.optim.warmup": 200,
            # Where the cart is costs more KL than it is worth as a squared error: at 1 the model
            # does not know it, and the cart drifts off the track.
            "agent.scales.rec": 20.0,
        },
    ),
    "v3": Preset(
        summary="Any environment: the published numbers that all benchmarks share, a moderate size "
        "and replay, and every environment in a process of its own.",
        agent="v3",
        size="12m",
        values={
            "env": "CartPole-v1",
            "steps": 1_000_000,
            "actors": 1,
            "envs_per_actor": 4,
            "train_ratio": 32.0,
            "replay.capacity_steps": 500_000,
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
