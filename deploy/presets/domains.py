"""What the presets of several agents share: tasks as all of them see them."""

from __future__ import annotations

from typing import Any

VISION: dict[str, Any] = {
    "env": "dmc:walker-walk",
    "environment.action_repeat": 2,
    "environment.obs": "image",
    "environment.image_size": 64,
}
PROPRIO: dict[str, Any] = {
    "env": "dmc:walker-walk",
    "environment.action_repeat": 2,
    "environment.obs": "vector",
}
ATARI: dict[str, Any] = {
    "env": "ale:Pong",
    "environment.action_repeat": 4,
    "environment.image_size": 64,
    "environment.noops": 30,
}
ATARI_100K: dict[str, Any] = ATARI | {
    "steps": 100_000,
    "environment.sticky": 0.0,
    "environment.all_actions": False,
    "replay.capacity_steps": 100_000,
}
CRAFTER: dict[str, Any] = {
    "env": "crafter:reward",
    "steps": 1_000_000,
    "environment.image_size": 64,
    "replay.capacity_steps": 1_000_000,
}
# Episodes may be shorter than a window, so windows cross them, with resets inside.
MINIGRID: dict[str, Any] = {
    "env": "minigrid:DoorKey-6x6-v0",
    "steps": 500_000,
    "actors": 2,
    "envs_per_actor": 8,
    "train_ratio": 64.0,
    "environment.image_size": 64,
    "replay.online": False,
    "replay.capacity_steps": 500_000,
}
ONE: dict[str, Any] = {"actors": 1, "envs_per_actor": 1, "replay.online": False}
"""One environment, and no step is replayed before the others."""
WITHIN: dict[str, Any] = {"replay.sampling.windows": "episodes"}
"""Windows that lie in one episode."""
