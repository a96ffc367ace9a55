"""Named agents and sizes, as data."""

from __future__ import annotations

from dataclasses import replace

from dreamer.config import AgentConfig

# (deter, hidden, classes, depth, units). From 1m on they are DreamerV3's (Nature 2025); "tiny" is
# ours, for tasks that a CPU solves in minutes, and "debug" is for tests.
SIZES: dict[str, tuple[int, int, int, int, int]] = {
    "debug": (16, 8, 4, 2, 8),
    "tiny": (256, 64, 8, 4, 64),
    "1m": (512, 64, 4, 4, 64),
    "12m": (2048, 256, 16, 16, 256),
    "25m": (3072, 384, 24, 24, 384),
    "50m": (4096, 512, 32, 32, 512),
    "100m": (6144, 768, 48, 48, 768),
    "200m": (8192, 1024, 64, 64, 1024),
    "400m": (12288, 1536, 96, 96, 1536),
}

# Stochastic groups: the published sizes all have 32.
PUBLISHED_GROUPS = 32
FEWER_GROUPS = {"debug": 4, "tiny": 16}


def sized(config: AgentConfig, size: str) -> AgentConfig:
    """Return the config with all widths of a published size. Raises ValueError on unknown sizes."""
    if size not in SIZES:
        raise ValueError(f"unknown size {size!r}; choose one of {', '.join(SIZES)}")
    deter, hidden, classes, depth, units = SIZES[size]
    stoch = FEWER_GROUPS.get(size, PUBLISHED_GROUPS)
    return replace(
        config,
        rssm=replace(config.rssm, deter=deter, hidden=hidden, classes=classes, stoch=stoch),
        encoder=replace(config.encoder, depth=depth, units=units),
        decoder=replace(config.decoder, depth=depth, units=units),
        reward=replace(config.reward, units=units),
        cont=replace(config.cont, units=units),
        critic=replace(config.critic, units=units),
        actor=replace(config.actor, units=units),
    )


def agent_config(name: str = "v3", size: str = "200m") -> AgentConfig:
    """Return the published configuration of an agent at a size."""
    if name not in AGENTS:
        raise ValueError(f"unknown agent {name!r}; choose one of {', '.join(AGENTS)}")
    return sized(replace(AgentConfig(), name=name), size)


# Agent name → "module:class"; imported when an agent is built, so that configs stay torch-free.
AGENTS: dict[str, str] = {"v3": "dreamer.v3:DreamerV3"}
