"""What agents show of themselves: predictions in an open loop, or the views they learn from."""

from typing import Any

import pytest
import torch

from dreamer.agent import Agent
from dreamer.batch import Batch
from tests.dreamer.cases import PIXELS, TURN, batch_of, build, close

DECODING = ["v1", "v2", "v3-2023", "v3"]


@pytest.mark.parametrize("name", DECODING)
def test_an_episode_that_begins_inside_the_window_is_seen_before_it_is_imagined(name: str) -> None:
    agent = build(name, PIXELS, TURN)
    batch = batch_of(agent, length=9)  # the first sequence starts over at 3
    _, _, seen = agent.open_loop(batch, context=2)["image"]
    assert seen is not None
    assert seen[0].tolist() == [True, True, False, True, True, False, False, False, False]
    assert seen[1].tolist() == [True, True, *7 * [False]]
    # What comes after the start is what the episode alone would give, with nothing from before it.
    alone = Batch(
        obs={key: x[:1, 3:] for key, x in batch.obs.items()},
        **{key: getattr(batch, key)[:1, 3:] for key in Batch._fields[1:-1]},
        initial=agent.rssm.initial(1),
    )
    without_noise(agent)
    (whole,) = agent.open_loop(batch, context=2)["image"].made
    (part,) = agent.open_loop(alone, context=2)["image"].made
    close(whole[0, 3:], part[0], rtol=1e-4, atol=1e-5)
    # And the imagined frames before it do not look ahead.
    batch.obs["image"][:, 2] = 255 - batch.obs["image"][:, 2]
    batch.obs["image"][:, 5:] = 0
    assert torch.equal(agent.open_loop(batch, context=2)["image"].made[0], whole)
    batch.obs["image"][:, 4] = 0
    changed = (agent.open_loop(batch, context=2)["image"].made[0] != whole).flatten(2).any(-1)
    assert changed.tolist() == [[*4 * [False], *5 * [True]], 9 * [False]]


def without_noise(agent: Agent) -> None:
    """Let the latent follow smoothly from its statistics, so that rollouts can be compared."""
    latent: Any = agent.rssm.latent
    latent.sample = lambda stats, noise=None: torch.unflatten(
        stats[..., : latent.size].tanh(), -1, latent.shape
    )
