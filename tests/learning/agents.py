"""The agents at a size that learns small tasks in seconds.

Only widths, stages of convolutions, imagined steps, learning rates, warm-ups and how much the
policy explores differ from the published configurations, and what a task makes meaningless (a
discount head where nothing ends).
"""

from __future__ import annotations

from typing import Any

from dreamer.config import AgentConfig, V3Config
from dreamer.presets import agent_config, with_fields

HORIZON = 8
_V3 = {
    "rssm.deter": 128,
    "rssm.hidden": 64,
    "rssm.blocks": 4,
    "rssm.stoch": 8,
    "rssm.classes": 8,
    **{f"{part}.units": 64 for part in ("encoder", "decoder", "reward", "cont", "critic", "actor")},
    "behaviour.imag_horizon": HORIZON,
    "optim.lr": 1e-3,
    "optim.warmup": 20,
}
_EARLY = {
    "world.deter": 64,
    "world.hidden": 64,
    "world.stoch": 8,
    "world.vector_units": 64,
    "heads.units": 64,
    "imagination.horizon": HORIZON,
    "optim.model_lr": 2e-3,
    "optim.actor_lr": 1e-3,
    "optim.critic_lr": 1e-3,
}
# Four stages leave one pixel of 16×16, and where a ball is shows four times as late.
_SHALLOW = {"encoder.depth": 8, "encoder.mults": (4, 4)}
# What each agent changes beyond the widths.
_OWN: dict[str, dict[str, Any]] = {
    # With two channels it caught no more than chance in 1,500 updates.
    "v1": {"world.depth": 8, "cont": True, "exploration.epsilon": 0.2},
    # Copied every hundred updates, the slow critic would be copied a few times in all.
    "v2": {"world.classes": 8, "slow_every": 20, "optim.actor_lr": 4e-4, "reward": "identity"},
    # Its norms act over the channels, of which two would leave only signs.
    "v3-2023": {"world.classes": 8, "world.depth": 8},
    "v3": {**_SHALLOW, "decoder.depth": 8, "decoder.mults": (4, 4)},
    "pro": {"cont": True, "slow_every": 20, "prototypes.freeze": 100, "prototypes.count": 64},
    "pro-v3": {**_SHALLOW, "prototypes.freeze": 100, "prototypes.count": 64},
    "r2": _SHALLOW,
    "infonce": _SHALLOW,
}


def small(name: str) -> AgentConfig:
    """Return the configuration of a small agent."""
    config = agent_config(name, "debug")
    widths = _V3 if isinstance(config, V3Config) else _EARLY
    return with_fields(config, widths | _OWN[name])
