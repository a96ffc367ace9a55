"""Golden numbers, spaces, small agents and random batches that the tests of this folder share."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dreamer.agent import Agent, Losses, Rollout, Trajectory, make_agent
from dreamer.batch import Batch
from dreamer.config import V3Config
from dreamer.presets import agent_config, with_fields
from dreamer.rssm import State
from dreamer.spaces import (
    ActionSpace,
    BoxAction,
    DiscreteAction,
    DiscreteSpec,
    ImageSpec,
    MultiBinaryAction,
    MultiDiscreteAction,
    ObsSpace,
    VectorSpec,
)
from dreamer.v3 import DreamerV3

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "golden.json").read_text())

OBS: ObsSpace = {
    "image": ImageSpec(shape=(16, 16, 3)),
    "vector": VectorSpec(shape=(3,)),
    "mode": DiscreteSpec(classes=4),
}
ACTIONS: ActionSpace = {
    "action.turn": DiscreteAction(classes=3),
    "action.push": BoxAction(low=(-1.0, -2.0), high=(1.0, 2.0)),
    "action.keys": MultiDiscreteAction(classes=(2, 4)),
    "action.bits": MultiBinaryAction(size=2),
}
VECTOR: ObsSpace = {"vector": VectorSpec(shape=(3,))}
PIXELS: ObsSpace = {"image": ImageSpec(shape=(64, 64, 3))}
PUSH: ActionSpace = {"action": BoxAction(low=(-1.0,), high=(1.0,))}
TURN: ActionSpace = {"action": DiscreteAction(classes=3)}


def golden(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the inputs and outputs of one golden entry."""
    return GOLDEN[name]["in"], GOLDEN[name]["out"]


def tensor(values: Any) -> Tensor:
    """Return float64 numbers, so that only the formula is tested."""
    return torch.tensor(values, dtype=torch.float64)


def close(actual: Tensor, expected: Any, rtol: float = 1e-6, atol: float = 1e-9) -> None:
    """Assert that numbers agree, whatever their types."""
    want = torch.as_tensor(expected).double()
    torch.testing.assert_close(actual.detach().double(), want, rtol=rtol, atol=atol)


def debug_config(**changes: Any) -> V3Config:
    """Return the debug size with some top-level fields replaced."""
    return replace(agent_config("v3", "debug"), **changes)


def debug_agent(
    obs: ObsSpace = VECTOR,
    actions: ActionSpace = TURN,
    config: V3Config | None = None,
    seed: int = 0,
) -> DreamerV3:
    """Return a seeded agent of the debug size."""
    torch.manual_seed(seed)
    agent = make_agent(config or debug_config(), obs, actions)
    assert isinstance(agent, DreamerV3)
    return agent


def wake_zero_layers(agent: nn.Module) -> None:
    """Give layers that start at zero some weight, so that gradients pass through them."""
    with torch.no_grad():
        for param in agent.parameters():
            if not param.any():
                param.normal_(std=0.1)


def random_obs(space: ObsSpace, shape: tuple[int, ...], seed: int = 0) -> dict[str, NDArray[Any]]:
    """Return observations in record types, {key: (*shape, …)}."""
    rng = np.random.default_rng(seed)
    obs: dict[str, NDArray[Any]] = {}
    for key, spec in space.items():
        if isinstance(spec, ImageSpec):
            obs[key] = rng.integers(0, 256, (*shape, *spec.shape), np.uint8)
        elif isinstance(spec, VectorSpec):
            obs[key] = rng.normal(size=(*shape, *spec.shape)).astype(np.float32)
        else:
            obs[key] = rng.integers(0, spec.classes, shape, np.int32)
    return obs


def random_batch(agent: DreamerV3, size: int = 2, length: int = 5, seed: int = 0) -> Batch:
    """Return a batch with an episode end inside and a latent before the window."""
    draw = torch.Generator().manual_seed(seed)
    flags = torch.zeros(3, size, length, dtype=torch.bool)
    flags[0, 0, 3:4] = flags[1:, 0, 2:3] = True
    rssm = agent.config.rssm
    index = torch.randint(rssm.classes, (size, rssm.stoch), generator=draw)
    stoch = nn.functional.one_hot(index, rssm.classes).float()
    arrays = random_obs(agent.obs_space, (size, length), seed)
    return Batch(
        obs={key: torch.from_numpy(value) for key, value in arrays.items()},
        prev_action=torch.rand(size, length, agent.codec.size, generator=draw),
        reward=torch.randn(size, length, generator=draw),
        is_first=flags[0],
        is_last=flags[1],
        is_terminal=flags[2],
        initial=State(torch.rand(size, rssm.deter, generator=draw) - 0.5, stoch),
    )


def build(name: str, obs: ObsSpace = VECTOR, actions: ActionSpace = TURN, **values: Any) -> Agent:
    """Return a seeded agent of the debug size with some dotted fields replaced."""
    torch.manual_seed(0)
    return make_agent(with_fields(agent_config(name, "debug"), values), obs, actions)


def batch_of(agent: Agent, size: int = 2, length: int = 6, seed: int = 0) -> Batch:
    """Return a batch of windows that begin with an episode; one of them has an end inside."""
    draw = torch.Generator().manual_seed(seed)
    arrays = random_obs(agent.obs_space, (size, length), seed)
    first, last, terminal = torch.zeros(3, size, length, dtype=torch.bool)
    first[:, 0] = first[0, 3] = last[0, 2] = terminal[0, 2] = True
    return Batch(
        obs={key: torch.from_numpy(value) for key, value in arrays.items()},
        prev_action=torch.rand(size, length, agent.codec.size, generator=draw),
        reward=torch.randn(size, length, generator=draw),
        is_first=first,
        is_last=last,
        is_terminal=terminal,
        initial=agent.rssm.initial(size),
    )


def losses_of(agent: Agent, batch: Batch) -> tuple[Losses, Rollout, Trajectory]:
    """Return all losses of an update, seeded, and what they were computed from."""
    torch.manual_seed(1)
    rollout = agent.observe(batch)
    losses, _ = agent.model_losses(batch, rollout)
    trajectory = agent.imagine(rollout)
    return losses | agent.behaviour_losses(batch, rollout, trajectory)[0], rollout, trajectory
