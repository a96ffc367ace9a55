"""Presets of the earlier agents on classic control: our own numbers, there are no published ones.

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
_FAST = {
    "agent.optim.model_lr": 1e-3,
    "agent.optim.actor_lr": 3e-4,
    "agent.optim.critic_lr": 3e-4,
}

CONTROL_PRESETS: dict[str, Preset] = {
    "v1-cartpole": Preset(
        summary="DreamerV1 on CartPole-v1, with a head for the end of episodes and "
        "straight-through actions.",
        agent="v1",
        size="tiny",
        values=_CARTPOLE | _FAST | {"agent.cont": True, "agent.exploration.epsilon": 0.1},
    ),
    "v2-cartpole": Preset(
        summary="DreamerV2 on CartPole-v1, with the free nats of its DeepMind Control settings.",
        agent="v2",
        size="tiny",
        values=_CARTPOLE
        | _FAST
        | {"agent.free_nats": 1.0, "agent.reward": "identity", "agent.slow_every": 20},
    ),
    "v3-2023-cartpole": Preset(
        summary="DreamerV3 of January 2023 on CartPole-v1.",
        agent="v3-2023",
        size="tiny",
        # Its critic starts at zero and is held by its slow copy: at 3e-4 its values lag behind.
        values=_CARTPOLE | _FAST | {"agent.optim.critic_lr": 1e-3},
    ),
}
