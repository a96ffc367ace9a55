"""Acting as one file: encoder, RSSM and actor in a graph that needs torch and nothing of ours."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dreamer.policy import Policy, State
from dreamer.spaces import ActionSpace, ObsSpace, record_column

DESCRIPTION = "description.json"
"""Name of the description inside the file."""


class ActingStep(nn.Module):
    """One step of acting: state in, state out.

    Latents are drawn from torch's global generator, so a seed set before gives the same actions.

    Args:
        policy: with weights.
        mode: "sample" or "greedy".
    """

    def __init__(self, policy: Policy, mode: str) -> None:
        super().__init__()
        assert mode in ("sample", "greedy"), mode
        self.policy, self.mode = policy, mode

    def forward(
        self, obs: dict[str, Tensor], is_first: Tensor, deter: Tensor, stoch: Tensor, last: Tensor
    ) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
        """Choose actions for K environments.

        Args:
            obs: {key: (K, …)} in record types.
            is_first: (K,) bool; there the state starts over.
            deter, stoch, last: (K, D), (K, Z) and (K, A), the state; zeros at the very beginning.

        Returns:
            Actions {key: (K, …)} in record types, and the next state.
        """
        tensors = {key: value.unsqueeze(1) for key, value in obs.items()}
        action, state = self.policy.decide(tensors, is_first, (deter, stoch, last), self.mode)
        return self.policy.codec.record(action), *state


def export_acting(
    policy: Policy, obs_space: ObsSpace, action_space: ActionSpace, *, envs: int, mode: str
) -> bytes:
    """Return a ``.pt2`` file of acting in `envs` environments at once.

    `torch.export.load` reads it, and its description as an extra file. Nothing in it is unpickled.
    """
    inputs = example_inputs(policy, obs_space, envs)
    program = torch.export.export(ActingStep(policy, mode).eval(), inputs)
    text = describe(policy, obs_space, action_space, envs=envs, mode=mode)
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={DESCRIPTION: json.dumps(text, indent=2)})
    return buffer.getvalue()


def example_inputs(policy: Policy, obs_space: ObsSpace, envs: int) -> tuple[Any, ...]:
    """Return arguments of `ActingStep` for tracing, and part the policy's weights from each other.

    Published weights are views of one buffer, which would be written whole for each of them.
    """
    policy.load_state_dict({k: v.clone() for k, v in policy.state_dict().items()}, assign=True)
    obs = {key: _zeros(obs_space, key, envs) for key in obs_space}
    return obs, torch.ones(envs, dtype=torch.bool), *policy.initial_state(envs)


def describe(
    policy: Policy, obs_space: ObsSpace, action_space: ActionSpace, *, envs: int, mode: str
) -> dict[str, Any]:
    """Return what an exported file says about itself: columns, shapes of the state, version."""
    state: State = policy.initial_state(envs)
    return {
        "obs": {key: _column(obs_space, key) for key in obs_space},
        "actions": {key: _column(action_space, key) for key in action_space},
        "state": {k: list(x.shape) for k, x in zip(("deter", "stoch", "last"), state, strict=True)},
        "envs": envs,
        "mode": mode,
        "version": list(policy.version),
    }


def _column(space: Mapping[str, Any], key: str) -> dict[str, Any]:
    dtype, shape = record_column(space[key])
    return {"dtype": dtype, "shape": list(shape)}


def _zeros(space: ObsSpace, key: str, envs: int) -> Tensor:
    dtype, shape = record_column(space[key])
    return torch.zeros(envs, *shape, dtype=getattr(torch, dtype))
