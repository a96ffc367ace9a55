"""The acting half of an agent: encoder, RSSM and actor, from published weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dreamer.actor import ActionCodec
from dreamer.agent import agent_class, record_columns
from dreamer.config import AgentConfig
from dreamer.spaces import ActionSpace, ObsSpace
from dreamer.weights import PackedWeights, Version, WeightsError

__all__ = ["Policy", "record_columns"]

Arrays = dict[str, NDArray[Any]]
State = tuple[Tensor, Tensor, Tensor]
MODES = ("sample", "explore", "greedy")


class Policy(nn.Module):
    """Act in K environments at once, keeping one recurrent state for each.

    Runs on the CPU in float32. The number of environments may change between calls only by
    starting over (every ``is_first`` True).
    """

    def __init__(
        self, config: AgentConfig, obs_space: ObsSpace, action_space: ActionSpace, *, seed: int = 0
    ) -> None:
        super().__init__()
        parts = agent_class(config.name).policy_parts(config, obs_space, action_space)
        self.encoder, self.rssm, self.actor = parts
        self.config, self.codec = config, ActionCodec(action_space)
        self.requires_grad_(False)
        self.version: Version = (-1, -1)
        # Sampling draws from torch's global generator, so the stream of this policy is kept apart.
        self._random = torch.Generator().manual_seed(seed).get_state()
        self._state: State | None = None

    def load(self, weights: PackedWeights) -> None:
        """Swap in new weights, all or none.

        Quick if ``weights.tensors`` has been read before: the parameters are replaced, not copied.

        Raises:
            WeightsError: damaged, not finite, or of another network; the old weights stay.
        """
        tensors, own = weights.tensors, self.state_dict()
        wrong = [k for k in own if k not in tensors or tensors[k].shape != own[k].shape]
        extra = [k for k in tensors if k not in own]
        if wrong or extra:
            raise WeightsError(
                f"weights {weights.version} do not fit this policy: {len(wrong)} tensors missing "
                f"or of another shape (first: {wrong[:1]}), {len(extra)} unknown (first: "
                f"{extra[:1]}); learner and actors must run the same configuration"
            )
        self.load_state_dict(tensors, assign=True)
        self.version = weights.version

    @torch.inference_mode()
    def step(
        self,
        obs: Mapping[str, NDArray[Any]],
        is_first: NDArray[np.bool_],
        mode: str = "sample",
        held: NDArray[np.bool_] | None = None,
    ) -> tuple[Arrays, Arrays]:
        """Choose actions for K environments.

        Args:
            obs: {key: (K, …)} in record types.
            is_first: (K,) bool; there the recurrent state and previous action start over.
            mode: "sample" from the policy, "explore" by a sample and what the paper's actors add to
                it, or the policy's "greedy" mode.
            held: (K,) bool; there nothing is decided and the recurrent state stays as it is, which
                is how an environment is left out of a batch whose shape never changes. What is
                returned for it means nothing.

        Returns:
            Actions {key: (K, …)} in record form, and the latent after seeing ``obs`` in record
            types, {} if the agent stores none.
        """
        if mode not in MODES:
            raise ValueError(f"unknown acting mode {mode!r}; use one of {', '.join(MODES)}")
        count = len(is_first)
        if self._state is None or len(self._state[0]) != count:
            self._state = self.initial_state(count)
        before = self._state
        outer = torch.get_rng_state()
        torch.set_rng_state(self._random)
        try:
            action = self._step(obs, torch.from_numpy(np.array(is_first)), mode)
        finally:
            self._random = torch.get_rng_state()
            torch.set_rng_state(outer)
        # Copies, because the recurrent state keeps the action for the next step.
        actions = {key: value.numpy().copy() for key, value in self.codec.record(action).items()}
        latents = self._record()
        if held is not None:
            self._hold(before, torch.from_numpy(np.array(held))[:, None])
        return actions, latents

    def _hold(self, before: State, held: Tensor) -> None:
        """Put back what the states of some environments were before a step."""
        assert self._state is not None
        deter, stoch, action = (
            torch.where(held, old, new) for old, new in zip(before, self._state, strict=True)
        )
        self._state = (deter, stoch, action)

    def _step(self, obs: Mapping[str, NDArray[Any]], is_first: Tensor, mode: str) -> Tensor:
        assert self._state is not None
        # Arrays that are not contiguous or read-only are copied: torch cannot wrap them.
        arrays = {key: np.require(x, requirements=["C", "W"]) for key, x in obs.items()}
        tensors = {key: torch.from_numpy(x).unsqueeze(1) for key, x in arrays.items()}
        action, self._state = self.decide(tensors, is_first, self._state, mode)
        return action

    def initial_state(self, count: int) -> State:
        """Return (deter, flat stoch, action) of zeros for so many environments."""
        initial = self.rssm.initial(count)
        return initial.deter, initial.stoch.flatten(1), torch.zeros(count, self.codec.size)

    def decide(
        self, obs: dict[str, Tensor], is_first: Tensor, state: State, mode: str
    ) -> tuple[Tensor, State]:
        """Return actions (K, A) as the networks see them, and the next state.

        Args:
            obs: {key: (K, 1, …)}.
            is_first: (K,) bool.
            state: of `initial_state`, or what the last call returned.
            mode: as for `step`.
        """
        deter, stoch, previous = state
        keep = (~is_first).float()[:, None]
        embed = self.rssm.posterior.project_embed(self.encoder(obs)[:, 0])
        drive = self.rssm.core.project_action(previous * keep)
        start = self.rssm.start()
        deter, stoch, _ = self.rssm.observe_step(deter, stoch, drive, embed, keep, start)
        dist = self.actor(torch.cat([deter, stoch], -1))
        action: Tensor = dist.mode() if mode == "greedy" else dist.sample()
        if mode == "explore":
            exploration, updates = self.config.exploration, self.version[1]
            if exploration.random_start and updates <= 0:
                action = dist.uniform()
            else:
                action = dist.explore(action, *exploration.at(updates))
        return action, (deter, stoch, action)

    def latents(self) -> tuple[Tensor, Tensor]:
        """Return (K, D) and (K, Z), flat: the latents after the observations of the last step."""
        assert self._state is not None, "step first"
        deter, stoch, _ = self._state
        return deter, stoch

    def _record(self) -> Arrays:
        assert self._state is not None
        if not self.config.context:
            return {}
        deter, stoch, _ = self._state
        latent = self.rssm.latent
        indices = latent.to_record(torch.unflatten(stoch, -1, latent.shape))
        return {"deter": deter.to(torch.float16).numpy(), "stoch": indices.numpy()}
