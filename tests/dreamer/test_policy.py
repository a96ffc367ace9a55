from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dreamer.agent import record_columns
from dreamer.policy import Policy
from dreamer.spaces import ActionSpace, ObsSpace
from dreamer.v3 import DreamerV3
from dreamer.weights import PackedWeights, WeightsError, pack
from tests.dreamer.cases import (
    ACTIONS,
    OBS,
    PUSH,
    TURN,
    VECTOR,
    close,
    debug_agent,
    debug_config,
    random_obs,
    wake_zero_layers,
)

Step = tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]


def weights_of(agent: DreamerV3, version: tuple[int, int] = (1, 0)) -> PackedWeights:
    return pack(agent.policy_tensors(), version, dtype=torch.float32)


def make_policy(
    obs: ObsSpace = VECTOR, actions: ActionSpace = TURN, seed: int = 0, agent_seed: int = 0
) -> Policy:
    policy = Policy(debug_config(), obs, actions, seed=seed)
    policy.load(weights_of(debug_agent(obs, actions, seed=agent_seed)))
    return policy


def first(count: int, value: bool = True) -> NDArray[np.bool_]:
    return np.full(count, value)


def run(policy: Policy, space: ObsSpace, steps: int, count: int = 3) -> list[Step]:
    return [
        policy.step(random_obs(space, (count,), seed=t), first(count, t == 0)) for t in range(steps)
    ]


def same(left: list[Step], right: list[Step]) -> bool:
    pairs = zip(left, right, strict=True)
    return all(
        np.array_equal(a[key], b[key])
        for one, other in pairs
        for a, b in zip(one, other, strict=True)
        for key in a
    )


def test_the_policy_has_exactly_the_tensors_that_the_agent_publishes() -> None:
    agent = debug_agent(OBS, ACTIONS)
    published, policy = agent.policy_tensors(), Policy(debug_config(), OBS, ACTIONS)
    assert set(published) == set(policy.state_dict())
    assert set(published) < set(agent.state_dict())
    assert {name.split(".")[0] for name in published} == {"encoder", "rssm", "actor"}


def test_actions_and_latents_have_the_types_of_the_record() -> None:
    actions, latents = make_policy(OBS, ACTIONS).step(random_obs(OBS, (5,)), first(5))
    columns = {name: (dtype, shape) for name, dtype, shape in record_columns(
        debug_config(), OBS, ACTIONS
    )}  # fmt: skip
    for name, value in (actions | latents).items():
        assert (str(value.dtype), value.shape[1:]) == columns[name]
        assert len(value) == 5
    assert set(actions | latents) == {*ACTIONS, "deter", "stoch"}


def test_the_policy_acts_as_the_agents_own_parts_do() -> None:
    agent = debug_agent(OBS, ACTIONS, seed=3)
    wake_zero_layers(agent)
    policy = Policy(debug_config(), OBS, ACTIONS)
    policy.load(weights_of(agent))
    torch.manual_seed(0)
    state, previous = agent.rssm.initial(2), torch.zeros(2, agent.codec.size)
    for t in range(4):
        obs, is_first = random_obs(OBS, (2,), seed=t), np.array([t == 0, t in (0, 2)])
        # The policy starts its random numbers at seed 0 and consumes them like this rollout.
        actions, latents = policy.step(obs, is_first)
        with torch.no_grad():
            embed = agent.encoder({k: torch.from_numpy(v)[:, None] for k, v in obs.items()})
            mask = torch.from_numpy(is_first)[:, None]
            states, _ = agent.rssm.observe(embed, previous[:, None], mask, state)
            state = type(state)(states.deter[:, 0], states.stoch[:, 0])
            previous = agent.actor(state.feature()).sample()
        close(torch.from_numpy(latents["deter"]), state.deter.half(), rtol=1e-2, atol=1e-3)
        assert np.array_equal(latents["stoch"], state.stoch.argmax(-1).numpy())
        for key, value in agent.codec.record(previous).items():
            close(torch.from_numpy(actions[key]), value, rtol=1e-4, atol=1e-5)


def test_seeded_policies_repeat_themselves_and_other_seeds_do_not() -> None:
    runs = [run(make_policy(OBS, ACTIONS, seed=seed), OBS, 6) for seed in (7, 7, 8)]
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


def test_acting_neither_reads_nor_moves_the_global_random_numbers() -> None:
    policies = [make_policy(OBS, ACTIONS) for _ in range(2)]
    torch.manual_seed(1)
    before = torch.get_rng_state()
    left = run(policies[0], OBS, 3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert same(left, run(policies[1], OBS, 3))


def test_is_first_forgets_the_past_of_that_environment_only() -> None:
    policy, fresh = make_policy(), make_policy()
    run(policy, VECTOR, 5, count=2)
    obs = random_obs(VECTOR, (2,), seed=9)
    _, after = policy.step(obs, np.array([True, False]), mode="greedy")
    _, start = fresh.step(obs, first(2), mode="greedy")
    assert np.array_equal(after["deter"][0], start["deter"][0])
    assert not np.array_equal(after["deter"][1], start["deter"][1])


def test_the_past_matters_where_nothing_is_first() -> None:
    policy = make_policy()
    obs = random_obs(VECTOR, (1,))
    _, one = policy.step(obs, first(1))
    _, two = policy.step(obs, first(1, False))
    assert not np.array_equal(one["deter"], two["deter"])


def test_another_number_of_environments_starts_over() -> None:
    policy = make_policy()
    run(policy, VECTOR, 3, count=2)
    actions, latents = policy.step(random_obs(VECTOR, (4,)), first(4))
    assert actions["action"].shape == (4,) and latents["deter"].shape[0] == 4


def test_greedy_actions_are_the_mode_of_the_actor() -> None:
    obs = random_obs(VECTOR, (4,))
    policy = make_policy(VECTOR, PUSH)
    action, _ = policy.step(obs, first(4), mode="greedy")
    assert policy._state is not None
    deter, stoch, _ = policy._state
    close(torch.from_numpy(action["action"]), policy.actor(torch.cat([deter, stoch], -1)).mode())


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(
        ValueError, match="unknown acting mode 'best'; use one of sample, explore, greedy"
    ):
        make_policy().step(random_obs(VECTOR, (1,)), first(1), mode="best")


def test_what_the_caller_does_to_the_actions_does_not_reach_the_policy() -> None:
    left, right = make_policy(VECTOR, PUSH), make_policy(VECTOR, PUSH)
    for t in range(4):
        obs = random_obs(VECTOR, (2,), seed=t)
        actions, latents = left.step(obs, first(2, t == 0))
        _, want = right.step(obs, first(2, t == 0))
        assert np.array_equal(latents["deter"], want["deter"])
        actions["action"][:] = 1e6


def test_read_only_observations_are_accepted() -> None:
    obs, is_first = random_obs(OBS, (2,)), first(2)
    for value in (*obs.values(), is_first):
        value.flags.writeable = False
    make_policy(OBS, ACTIONS).step(obs, is_first)


def test_an_agent_that_stores_no_latents_returns_none() -> None:
    config = debug_config(context=0)
    policy = Policy(config, VECTOR, TURN)
    _, latents = policy.step(random_obs(VECTOR, (2,)), first(2))
    assert latents == {}
    assert {"deter", "stoch"}.isdisjoint(
        name for name, _, _ in record_columns(config, VECTOR, TURN)
    )


def test_new_weights_change_the_actions_and_the_version() -> None:
    policy, obs = make_policy(VECTOR, PUSH), random_obs(VECTOR, (4,))
    assert Policy(debug_config(), VECTOR, PUSH).version == (-1, -1)
    before, _ = policy.step(obs, first(4), mode="greedy")
    policy.load(weights_of(debug_agent(VECTOR, PUSH, seed=5), version=(2, 30)))
    after, _ = policy.step(obs, first(4), mode="greedy")
    assert policy.version == (2, 30)
    assert not np.array_equal(before["action"], after["action"])


def test_a_policy_keeps_its_recurrent_state_over_new_weights() -> None:
    policy, other = make_policy(), make_policy()
    run(policy, VECTOR, 3)
    run(other, VECTOR, 3)
    other.load(weights_of(debug_agent(VECTOR, TURN), version=(1, 1)))
    obs = random_obs(VECTOR, (3,), seed=9)
    assert same([policy.step(obs, first(3, False))], [other.step(obs, first(3, False))])


def damaged(agent: DreamerV3) -> PackedWeights:
    weights = weights_of(agent, (9, 9))
    weights.buffer[-3] ^= 64
    return weights


def poisoned(agent: DreamerV3) -> PackedWeights:
    with torch.no_grad():
        next(agent.actor.parameters())[0, 0] = float("nan")
    return weights_of(agent, (9, 9))


def incomplete(agent: DreamerV3) -> PackedWeights:
    tensors = agent.policy_tensors()
    tensors.popitem()
    return pack(tensors, (9, 9))


def foreign(agent: DreamerV3) -> PackedWeights:
    return pack(agent.policy_tensors() | {"actor.extra": torch.ones(2)}, (9, 9))


def of_another_space(agent: DreamerV3) -> PackedWeights:
    return weights_of(debug_agent(VECTOR, PUSH), (9, 9))


@pytest.mark.parametrize("spoil", [damaged, poisoned, incomplete, foreign, of_another_space])
def test_weights_that_do_not_fit_are_refused_and_the_old_ones_stay(spoil: Any) -> None:
    policy = make_policy()
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    with pytest.raises(WeightsError, match=r"\(9, 9\)"):
        policy.load(spoil(debug_agent(VECTOR, TURN, seed=5)))
    assert policy.version == (1, 0)
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())


def test_asking_for_the_columns_of_a_record_moves_no_random_numbers() -> None:
    before = torch.get_rng_state()
    columns = record_columns(debug_config(), OBS, ACTIONS)
    assert torch.equal(torch.get_rng_state(), before)
    assert columns[-2:] == [("deter", "float16", (16,)), ("stoch", "uint8", (4,))]
    flags = ("is_first", "is_last", "is_terminal")
    assert [column for column in columns if column[1] == "bool"] == [
        (name, "bool", ()) for name in flags
    ]


def test_a_held_environment_keeps_its_state_while_the_others_go_on() -> None:
    policy = make_policy()
    run(policy, VECTOR, 3)
    before = policy._state
    policy.step(random_obs(VECTOR, (3,), seed=9), first(3, False), held=np.array([1, 1, 0], bool))
    assert before is not None and policy._state is not None
    for old, new in zip(before[:2], policy._state[:2], strict=True):
        assert torch.equal(old[:2], new[:2]) and not torch.equal(old[2], new[2])
    assert torch.equal(before[2][:2], policy._state[2][:2])
