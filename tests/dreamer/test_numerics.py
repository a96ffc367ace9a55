"""Extreme numbers, updates that are not finite, and where an update runs, for every agent."""

from typing import Any

import pytest
import torch

from dreamer.agent import Agent
from dreamer.batch import Batch
from dreamer.presets import AGENTS
from dreamer.rssm import State
from dreamer.spaces import ActionSpace, VectorSpec
from tests.dreamer.cases import PIXELS, PUSH, TURN, VECTOR, batch_of, build
from tests.dreamer.test_v3 import NoTensorFromNumbers, OnDevice

BOTH = PIXELS | {"vector": VectorSpec(shape=(3,))}


def extreme(agent: Agent, seed: int) -> Any:
    """Return a batch whose vectors and rewards are of sizes from 1e-8 to 1e8, of both signs."""
    draw = torch.Generator().manual_seed(seed)
    batch = batch_of(agent, seed=seed)

    def stretched(values: torch.Tensor) -> torch.Tensor:
        exponent = torch.rand(values.shape, generator=draw) * 16.0 - 8.0
        sign = torch.randint(0, 2, values.shape, generator=draw) * 2.0 - 1.0
        return sign * 10.0**exponent

    vector = stretched(batch.obs["vector"]) if "vector" in batch.obs else None
    obs = batch.obs | ({"vector": vector} if vector is not None else {})
    return batch._replace(obs=obs, reward=stretched(batch.reward))


@pytest.mark.parametrize("name", list(AGENTS))
def test_updates_stay_finite_on_extreme_observations_and_rewards(name: str) -> None:
    agent = build(name, BOTH)
    for seed in range(4):
        metrics, latents = agent.update(extreme(agent, seed))
        assert metrics["finite"], {k: v.item() for k, v in metrics.items() if not v.isfinite()}
        assert all(value.isfinite().all() for value in [*metrics.values(), *latents.values()])
    assert all(param.isfinite().all() for param in agent.parameters())


@pytest.mark.parametrize("name", list(AGENTS))
def test_an_update_that_is_not_finite_changes_nothing_that_is_learned(name: str) -> None:
    agent = build(name, BOTH, TURN)
    agent.update(batch_of(agent))
    # What follows the parameters, instead of being learned, may still move (prototypes are
    # only put back on the sphere).
    follow = ("slow", "clock", "prototypes.count", "prototypes.centres")
    before = {k: v.clone() for k, v in agent.state_dict().items()}
    batch = batch_of(agent, seed=1)
    batch.obs["vector"][:] = torch.nan
    metrics, _ = agent.update(batch)
    assert not metrics["finite"]
    for key, value in agent.state_dict().items():
        if not any(part in key for part in follow):
            assert torch.equal(value, before[key]), key
        assert value.isfinite().all(), key


@pytest.mark.parametrize(
    ("name", "actions"), [("v1", PUSH), ("v2", TURN), ("v3-2023", PUSH), ("pro", TURN)]
)
def test_no_update_ever_leaves_the_device(name: str, actions: ActionSpace) -> None:
    source = batch_of(build(name, VECTOR, actions), length=4)
    with torch.device("meta"):
        agent = build(name, VECTOR, actions, **{"imagination.horizon": 3})
    parts = {key: getattr(source, key).to("meta") for key in Batch._fields[1:-1]}
    obs = {key: x.to("meta") for key, x in source.obs.items()}
    batch = Batch(obs=obs, **parts, initial=State(*(x.to("meta") for x in source.initial)))
    with NoTensorFromNumbers() as numbers, OnDevice() as operations:
        agent.update(batch)
    assert not operations.elsewhere and not numbers.made
