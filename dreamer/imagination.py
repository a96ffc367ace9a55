"""Rolling a policy through the model's prior from replayed states."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dreamer.rssm import State

Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""deter (N, D), flat stoch (N, Z) → the next two and the action (N, A) that led there."""


@torch.no_grad()
def sampled(step: Step, start: State, horizon: int) -> tuple[Tensor, Tensor]:
    """Return features (N, H+1, F) and actions (N, H+1, A), the last one 0, without gradient."""
    deter, stoch = start.deter, start.stoch.flatten(1)
    width = deter.shape[1]
    # Written in place: stacking and joining the states would copy the largest tensor thrice.
    feature = deter.new_empty(len(deter), horizon + 1, width + stoch.shape[1])
    actions = []
    for t in range(horizon):
        feature[:, t, :width], feature[:, t, width:] = deter, stoch
        deter, stoch, action = step(deter, stoch)
        actions.append(action)
    feature[:, horizon, :width], feature[:, horizon, width:] = deter, stoch
    # The action in the last state has no successor: it only completes the shape.
    actions.append(torch.zeros_like(actions[0]))
    return feature, torch.stack(actions, 1)


def differentiable(step: Step, start: State, horizon: int) -> tuple[Tensor, Tensor]:
    """Return what `sampled` does, with the gradient through actions and dynamics."""
    deter, stoch = start.deter, start.stoch.flatten(1)
    features, actions = [torch.cat([deter, stoch], -1)], []
    for _ in range(horizon):
        deter, stoch, action = step(deter, stoch)
        features.append(torch.cat([deter, stoch], -1))
        actions.append(action)
    actions.append(torch.zeros_like(actions[0]))
    return torch.stack(features, 1), torch.stack(actions, 1)
