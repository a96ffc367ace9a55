from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dreamer.agent import Agent, make_agent
from dreamer.presets import agent_config
from dreamer.spaces import BoxAction, DiscreteAction, VectorSpec
from learner.batch import make_batch

OBS = {"vector": VectorSpec(shape=(1,))}
ACTIONS = {"action.a": DiscreteAction(classes=4), "action.b": BoxAction(low=(-1.0,), high=(1.0,))}
B, T = 2, 5


def make_test_agent(context: int) -> Agent:
    torch.manual_seed(0)
    return make_agent(replace(agent_config("v3", "debug"), context=context), OBS, ACTIONS)


def window(length: int) -> dict[str, Tensor]:
    """Records numbered 0, 1, 2, …: every column of record t says t."""
    number = torch.arange(length).expand(B, length)
    flags = {
        name: torch.zeros(B, length, dtype=torch.bool)
        for name in ("is_first", "is_last", "is_terminal")
    }
    return {
        "vector": number[..., None].float(),
        "action.a": (number % 4).int(),
        "action.b": 0.1 * number[..., None].float(),
        "reward": 10.0 * number,
        "deter": number[..., None].expand(B, length, 16).half(),
        "stoch": (number % 4)[..., None].expand(B, length, 4).byte(),
        **flags,
    }


def numbers(prev_action: Tensor) -> list[int]:
    """Read the record number back from the continuous part of each action."""
    return (10 * prev_action[0, :, 4]).round().int().tolist()


def test_the_context_record_gives_its_action_and_latent_and_nothing_else() -> None:
    batch = make_batch(window(1 + T), make_test_agent(1))
    assert batch.obs["vector"][0, :, 0].tolist() == [1, 2, 3, 4, 5]
    assert batch.reward[0].tolist() == [10, 20, 30, 40, 50]
    assert numbers(batch.prev_action) == [0, 1, 2, 3, 4]
    assert batch.initial.deter[0].tolist() == [0.0] * 16
    assert batch.initial.stoch.argmax(-1).tolist() == [[0] * 4] * B


def test_the_initial_latent_is_the_stored_one_in_float32() -> None:
    records = {name: column[:, 2:] for name, column in window(3 + T).items()}
    initial = make_batch(records, make_test_agent(1)).initial
    assert initial.deter.dtype == torch.float32 and (initial.deter == 2).all()
    assert initial.stoch.shape == (B, 4, 4)
    assert torch.equal(initial.stoch, torch.eye(4)[2].expand(B, 4, 4))


def test_without_stored_latents_every_window_starts_anew() -> None:
    records = window(T)
    del records["deter"], records["stoch"]
    batch = make_batch(records, make_test_agent(0))
    assert batch.obs["vector"][0, :, 0].tolist() == [0, 1, 2, 3, 4]
    assert numbers(batch.prev_action) == [0, 0, 1, 2, 3]
    assert not batch.prev_action[:, 0].any()
    assert batch.is_first.tolist() == [[True, False, False, False, False]] * B
    assert not batch.initial.deter.any() and not batch.initial.stoch.any()


def test_actions_are_flattened_over_sorted_keys() -> None:
    batch = make_batch(window(1 + T), make_test_agent(1))
    assert batch.prev_action.shape == (B, T, 5)
    assert torch.equal(batch.prev_action[0, 3, :4], torch.eye(4)[3])


def test_flags_are_those_of_the_trained_records() -> None:
    records = window(1 + T)
    records["is_first"][0, 0] = True  # the context's own start is no start of the batch
    records["is_last"][0, 3] = records["is_terminal"][0, 3] = True
    records["is_first"][0, 4] = True
    batch = make_batch(records, make_test_agent(1))
    assert batch.is_first[0].tolist() == [False, False, False, True, False]
    assert batch.is_last[0].tolist() == [False, False, True, False, False]
    assert batch.is_terminal[0].tolist() == [False, False, True, False, False]


def test_a_window_that_starts_an_episode_keeps_its_start() -> None:
    records = window(1 + T)
    records["is_last"][0, 0] = records["is_first"][0, 1] = True
    batch = make_batch(records, make_test_agent(1))
    assert batch.is_first[0].tolist() == [True, False, False, False, False]
    assert not batch.is_last.any()


def test_an_abandoned_episode_ends_where_the_next_one_starts() -> None:
    records = window(1 + T)
    records["is_first"][1, 3] = True
    batch = make_batch(records, make_test_agent(1))
    assert batch.is_last.tolist() == [[False] * 5, [False, True, False, False, False]]
    assert not batch.is_terminal.any()


@pytest.mark.parametrize("context", [0, 1])
def test_the_window_is_not_changed(context: int) -> None:
    records = window(context + T)
    records["is_first"][:, 3] = True
    before = {name: column.clone() for name, column in records.items()}
    make_batch(records, make_test_agent(context))
    assert all(torch.equal(column, before[name]) for name, column in records.items())


def test_the_first_latent_of_a_batch_is_reached_from_the_context_alone() -> None:
    agent = make_test_agent(1)
    records = window(1 + T)
    batch = make_batch(records, agent)
    torch.manual_seed(1)
    states, _ = agent.rssm.observe(
        agent.encoder(batch.obs), batch.prev_action, batch.is_first, batch.initial
    )
    led = agent.codec.flatten({key: records[key][:, 0] for key in ACTIONS})
    drive = agent.rssm.core.project_action(led)
    start = agent.from_record(records["deter"][:, 0], records["stoch"][:, 0])
    want = agent.rssm.core(start.deter, start.stoch.flatten(1), drive)
    torch.testing.assert_close(states.deter[:, 0], want)
