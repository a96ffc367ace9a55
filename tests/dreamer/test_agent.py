from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from dreamer.agent import POLICY_PARTS, Agent, check_agent, make_agent, record_columns
from dreamer.config import AgentConfig
from dreamer.presets import AGENTS, agent_config
from dreamer.rssm import State
from dreamer.spaces import ImageSpec
from tests.dreamer.cases import (
    ACTIONS,
    OBS,
    PIXELS,
    PUSH,
    TURN,
    VECTOR,
    batch_of,
    build,
    debug_agent,
    debug_config,
    random_batch,
)

# What every agent takes.
EVERYTHING = PIXELS | {key: OBS[key] for key in ("vector", "mode")}


def test_an_agent_is_built_from_its_name() -> None:
    agent = make_agent(debug_config(), OBS, ACTIONS)
    assert isinstance(agent, Agent) and type(agent).__name__ == "DreamerV3"


@pytest.mark.parametrize(
    ("obs", "actions", "words"),
    [
        ({}, TURN, "observation space is empty"),
        (VECTOR, {}, "action space is empty"),
        ({"image": ImageSpec(shape=(84, 84, 1))}, TURN, "multiple of 16"),
        ({"reward": VECTOR["vector"]}, TURN, "column name"),
    ],
)
def test_a_space_that_the_agent_cannot_take_is_refused(obs, actions, words) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=words):
        make_agent(debug_config(), obs, actions)


@pytest.mark.parametrize("name", AGENTS)
def test_what_an_agent_cannot_take_is_found_without_building_it(name: str) -> None:
    random = torch.get_rng_state()
    # The largest there is: with memory and numbers it would take minutes.
    config = agent_config(name, list(AGENTS[name].sizes)[-1])
    check_agent(config, OBS | {"image": ImageSpec(shape=(64, 64, 3))}, ACTIONS)
    with pytest.raises(ValueError, match=r"50.*--environment\.image-size"):
        check_agent(config, OBS | {"image": ImageSpec(shape=(50, 50, 3))}, ACTIONS)
    assert torch.equal(torch.get_rng_state(), random)


def test_equal_seeds_build_equal_agents() -> None:
    left, right, other = debug_agent(seed=1), debug_agent(seed=1), debug_agent(seed=2)
    pairs = zip(left.state_dict().values(), right.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(left.encoder.mlp[0].linear.weight, other.encoder.mlp[0].linear.weight)


def test_the_parts_that_act_are_the_parts_that_are_published() -> None:
    names = {name.split(".")[0] for name in debug_agent(OBS, ACTIONS).policy_tensors()}
    assert names == set(POLICY_PARTS)


def test_trajectories_are_described_by_means_and_percentiles() -> None:
    numbers = torch.linspace(0, 100, 101).reshape(1, -1).requires_grad_()
    found = Agent.behaviour_metrics(
        entropy=numbers / 50,
        returns=-numbers,
        value=2 * numbers,
        reward=numbers,
        live=numbers / 100,
    )
    assert {name: round(x.item(), 4) for name, x in found.items()} == {
        "entropy_nats": 1.0,
        "return_mean": -50.0,
        "return_percentile/5": -95.0,
        "return_percentile/95": -5.0,
        "value_mean": 100.0,
        "value_percentile/5": 10.0,
        "value_percentile/95": 190.0,
        "imagined_reward": 50.0,
        "imagined_cont": 0.5,
    }
    assert not any(x.requires_grad for x in found.values())


def test_latents_survive_the_record_within_half_precision() -> None:
    agent = debug_agent()
    stoch = torch.eye(4)[torch.randint(4, (2, 3, 4))]
    states = State(torch.rand(2, 3, 16, requires_grad=True) * 2 - 1, stoch)
    stored = agent.to_record(states)
    assert stored["deter"].dtype == torch.float16 and not stored["deter"].requires_grad
    back = agent.from_record(stored["deter"], stored["stoch"])
    assert back.deter.dtype == torch.float32 and torch.equal(back.stoch, stoch)
    assert (back.deter - states.deter).abs().max() < 1e-3


def test_the_latents_of_an_update_fit_the_columns_of_the_record() -> None:
    agent = debug_agent()
    _, latents = agent.update(random_batch(agent, 2, 5))
    columns = {name: (dtype, shape) for name, dtype, shape in record_columns(
        debug_config(), VECTOR, TURN
    )}  # fmt: skip
    for name in ("deter", "stoch"):
        dtype, shape = columns[name]
        assert str(latents[name].dtype) == f"torch.{dtype}"
        assert latents[name].shape == (2, 5, *shape)


@pytest.mark.parametrize("name", AGENTS)
def test_the_configuration_knows_the_bytes_of_the_latent_columns(name: str) -> None:
    for size in AGENTS[name].sizes:
        for context in (0, 1):
            config = replace(agent_config(name, size), context=context)
            columns = record_columns(config, VECTOR, TURN)
            latents = [found for found in columns if found[0] in ("deter", "stoch")]
            assert len(latents) == 2 * context
            want = sum(np.dtype(kind).itemsize * shape[0] for _, kind, shape in latents)
            assert config.latent_bytes() == want, size


def test_a_configuration_that_stores_latents_must_say_how_large_they_are() -> None:
    assert AgentConfig(name="fifth").latent_bytes() == 0
    with pytest.raises(NotImplementedError, match="AgentConfig does not say"):
        AgentConfig(name="fifth", context=1).latent_bytes()


def test_an_agent_without_stored_latents_gives_none_back() -> None:
    agent = debug_agent(config=debug_config(context=0))
    assert agent.update(random_batch(agent))[1] == {}


@pytest.mark.parametrize("name", AGENTS)
def test_only_the_kernels_of_two_hot_reward_and_critic_start_at_zero(name: str) -> None:
    agent = build(name, EVERYTHING, PUSH)
    kernels = {key: x for key, x in agent.named_parameters() if x.dim() > 1}
    zero = {key for key, kernel in kernels.items() if not kernel.any()}
    two_hot = name not in ("v1", "v2", "pro")
    heads = ("reward", "critic", "slow_critic") if two_hot else ()
    assert zero == {f"{head}.out.weight" for head in heads}
    largest = kernels["actor.out.weight"].abs().max().item()
    # V3 begins with nearly uniform actions; 8 units in, cut at two deviations.
    small = 0.01 * 2 * 1.1368 / 8**0.5
    assert 0.1 * small < largest <= small if two_hot and name != "v3-2023" else largest > 0.1


@pytest.mark.parametrize("name", [name for name in AGENTS if name != "v1"])
def test_the_slow_critic_starts_as_a_copy_of_the_critic(name: str) -> None:
    agent: Any = build(name)
    fast, slow = agent.critic.state_dict(), agent.slow_critic.state_dict()
    assert fast.keys() == slow.keys() and all(torch.equal(fast[key], slow[key]) for key in fast)
    assert not any(param.requires_grad for param in agent.slow_critic.parameters())
    with torch.no_grad():
        agent.critic.out.bias.add_(1.0)
    assert not torch.equal(agent.critic.out.bias, agent.slow_critic.out.bias), "they share memory"


# What an update counts or averages makes a difference to the fourth one.
COUNTED: dict[str, dict[str, Any]] = {
    "v2": {"slow_every": 5},
    "v3-2023": {"return_rate": 0.5, "return_limit": 0.01},
    "v3": {"behaviour.return_rate": 0.5, "behaviour.return_limit": 0.01},
    "pro": {"slow_every": 5, "prototypes.freeze": 3},
    "pro-v3": {"behaviour.return_rate": 0.5, "prototypes.freeze": 3},
}


@pytest.mark.parametrize("name", AGENTS)
def test_the_checkpoint_holds_everything_that_the_next_update_needs(name: str) -> None:
    left = build(name, EVERYTHING, ACTIONS, **COUNTED.get(name, {}))
    batch = batch_of(left)
    for _ in range(3):
        left.update(batch)
    right = make_agent(left.config, EVERYTHING, ACTIONS)
    right.load_state_dict(left.state_dict())
    found = []
    for agent in (left, right):
        torch.manual_seed(4)
        found.append(agent.update(batch)[0] | agent.state_dict())
    for key, value in found[0].items():
        assert torch.equal(value, found[1][key]), key


def test_the_checkpoint_names_parameters_slow_critic_optimiser_and_normaliser() -> None:
    names = set(debug_agent().state_dict())
    tops = {name.split(".")[0] for name in names}
    assert tops >= {"encoder", "rssm", "actor", "decoder", "reward", "cont", "critic"}
    assert {"return_scale.low", "return_scale.high", "optimiser.count"} <= names
    assert any(name.startswith("slow_critic.") for name in names)
    assert any(name.startswith("optimiser.momentum_") for name in names)
