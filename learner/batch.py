"""From replayed windows to what an update reads: the one place where actions are shifted.

A replay record holds the action chosen *after* its observation; the world model wants the action
that *led to* an observation:

    record      context   1      2      …      T
    obs                   o₁     o₂            o_T
    action      a₀        a₁     a₂     …      a_T
    prev_action           a₀     a₁     …      a_T₋₁
    initial     (h₀, z₀)
"""

from __future__ import annotations

import torch
from torch import Tensor

from dreamer.agent import Agent
from dreamer.batch import Batch


def make_batch(window: dict[str, Tensor], agent: Agent) -> Batch:
    """Return the batch of a window of records.

    Args:
        window: {column: (B, C+T, …)} in record types; C is 1 if the agent stores latents, else 0.
        agent: whose spaces and stored latents the window has.

    ``is_last`` is also set where the next record starts an episode: an abandoned episode ends
    there, and the critic must not bootstrap across it (without a successor the flag is kept).
    """
    context = agent.config.context
    actions = agent.codec.flatten({key: window[key] for key in agent.codec.space})
    if context:
        prev_action = actions[:, :-1]
        initial = agent.from_record(window["deter"][:, 0], window["stoch"][:, 0])
    else:
        prev_action = torch.cat([torch.zeros_like(actions[:, :1]), actions[:, :-1]], 1)
        initial = agent.rssm.initial(actions.shape[0])
    is_first = window["is_first"][:, context:]
    abandoned = torch.cat([is_first[:, 1:], torch.zeros_like(is_first[:, :1])], 1)
    if not context:
        # Without a stored latent every window starts from the initial state.
        is_first = torch.cat([torch.ones_like(is_first[:, :1]), is_first[:, 1:]], 1)
    return Batch(
        obs={key: window[key][:, context:] for key in agent.obs_space},
        prev_action=prev_action,
        reward=window["reward"][:, context:],
        is_first=is_first,
        is_last=window["is_last"][:, context:] | abandoned,
        is_terminal=window["is_terminal"][:, context:],
        initial=initial,
    )
