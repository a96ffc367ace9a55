"""Recurrent state-space model: posterior rollouts over data, prior rollouts in imagination."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from dreamer.core import Core
from dreamer.latent import Latent
from dreamer.loop import Inside, Loop, Step
from dreamer.nets import MLP, RMS_SILU, SplitDense, Style


class State(NamedTuple):
    """Latent state: ``deter`` (…, D) float32 and ``stoch`` (…, S, K) or (…, S)."""

    deter: Tensor
    stoch: Tensor

    def feature(self) -> Tensor:
        """Return deter ⊕ flat stoch, (…, F)."""
        flat = self.stoch.reshape(*self.deter.shape[:-1], -1)
        return torch.cat([self.deter, flat.to(self.deter.dtype)], -1)

    def detach(self) -> State:
        """Return the state without gradient."""
        return State(self.deter.detach(), self.stoch.detach())

    def flatten(self) -> State:
        """Merge the first two axes: (B, T, …) → (B·T, …)."""
        return State(self.deter.flatten(0, 1), self.stoch.flatten(0, 1))


class Posterior(nn.Module):
    """q(z|h, e): hidden layers on [h, e], then the latent's statistics.

    The first layer's product with the embedding does not depend on the state, so a rollout
    computes it for all time steps at once (`project_embed`).
    """

    def __init__(
        self,
        deter: int,
        embed: int,
        layers: int,
        hidden: int,
        outputs: int,
        style: Style = RMS_SILU,
    ) -> None:
        super().__init__()
        assert layers >= 1, layers
        self.first = SplitDense(deter, embed, hidden, style)
        self.rest = MLP(hidden, layers - 1, hidden, style)
        self.logits = style.out(hidden, outputs)

    def project_embed(self, embed: Tensor) -> Tensor:
        """(…, E) → (…, U), bias included."""
        return self.first.project(embed)

    def forward(self, deter: Tensor, embed: Tensor, loop: Inside | None = None) -> Tensor:
        """Return statistics (…, P) from h and the projected embedding."""
        hidden = self.first.finish(deter, embed, loop)
        logits: Tensor = self.logits(self.rest(hidden, loop), loop)
        return logits


class Prior(nn.Sequential):
    """p(z|h): hidden layers, then the latent's statistics."""

    def __init__(
        self, deter: int, layers: int, hidden: int, outputs: int, style: Style = RMS_SILU
    ) -> None:
        super().__init__(
            MLP(deter, layers, hidden, style), style.out(hidden if layers else deter, outputs)
        )

    def forward(self, deter: Tensor, loop: Inside | None = None) -> Tensor:
        """(…, D) → (…, P)."""
        hidden, out = self
        logits: Tensor = out(hidden(deter, loop), loop)
        return logits


class RSSM(nn.Module):
    """The world model's dynamics, from any recurrent core and any latent distribution."""

    def __init__(
        self,
        core: Core,
        latent: Latent,
        embed: int,
        hidden: int,
        prior_layers: int,
        post_layers: int,
        style: Style = RMS_SILU,
    ) -> None:
        super().__init__()
        self.core, self.latent = core, latent
        outputs = latent.stats_size
        self.prior_net = Prior(core.deter, prior_layers, hidden, outputs, style)
        self.posterior = Posterior(core.deter, embed, post_layers, hidden, outputs, style)

    def initial(self, batch_size: int) -> State:
        """Return zeros for every member of the batch."""
        device = self.posterior.logits.weight.device
        deter = torch.zeros(batch_size, self.core.deter, device=device)
        return State(deter, torch.zeros(batch_size, *self.latent.shape, device=device))

    def prior(self, deter: Tensor, loop: Inside | None = None) -> Tensor:
        """Return the prior's statistics (…, P) from (…, D)."""
        logits: Tensor = self.prior_net(deter, loop)
        return logits

    def observe(
        self, embed: Tensor, prev_action: Tensor, is_first: Tensor, state: State
    ) -> tuple[State, Tensor]:
        """Filter a window: start over at first → core → posterior, for every step.

        Args:
            embed: (B, T, E).
            prev_action: (B, T, A) flat, the action that led to each step.
            is_first: (B, T) bool; there the previous action is masked and the state starts over.
            state: the latent before the window.

        Returns:
            The posterior states (B, T, …) with gradient, and the posterior's statistics (B, T, P).
        """
        keep = (~is_first).float()[..., None]  # (B, T, 1)
        actions = self.core.project_action(prev_action * keep).unbind(1)
        embeds = self.posterior.project_embed(embed).unbind(1)
        rows, steps = is_first.shape
        noise = self.latent.noise(steps, rows, device=embed.device).unbind(0)
        loop = Loop(*self.core.state_layers(), self.posterior, steps=steps, rows=rows)
        deter, stoch = state.deter, state.stoch.flatten(1)
        start, found = self.start(), []
        for t, mask in enumerate(keep.unbind(1)):
            given = (actions[t], embeds[t], mask, start, noise[t])
            found.append(self.observe_step_inside(deter, stoch, *given, loop.steps[t]))
            deter, stoch, *_ = found[-1]
        deters, stochs, stats, inputs = zip(*found, strict=True)
        loop.note(list(inputs))
        stacked = torch.unflatten(torch.stack(stochs, 1), -1, self.latent.shape)
        return State(torch.stack(deters, 1), stacked), torch.stack(stats, 1)

    def start(self) -> tuple[Tensor, Tensor] | None:
        """Return where episodes start, (D) and (S·K), or None for zeros."""
        return None

    def observe_step(
        self,
        deter: Tensor,
        stoch: Tensor,
        action: Tensor,
        embed: Tensor,
        keep: Tensor,
        start: tuple[Tensor, Tensor] | None = None,
        noise: Tensor | None = None,
        loop: Inside | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (deter (B, D), flat stoch (B, S·K), statistics) after one posterior step.

        Where ``keep`` (B, 1) is 0 the state is replaced by ``start`` first.
        """
        deter, stoch = deter * keep, stoch * keep
        if start is not None:
            deter = deter + start[0] * (1.0 - keep)
            stoch = stoch + start[1] * (1.0 - keep)
        deter = self.core(deter, stoch, action, loop)
        stats = self.posterior(deter, embed, loop)
        return deter, self.latent.sample(stats, noise).flatten(1), stats

    def observe_step_inside(
        self,
        deter: Tensor,
        stoch: Tensor,
        action: Tensor,
        embed: Tensor,
        keep: Tensor,
        start: tuple[Tensor, Tensor] | None,
        noise: Tensor,
        step: Step,
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
        """Return what `observe_step` does, and what the layers of the loop were given."""
        loop = Inside(step)
        after = self.observe_step(deter, stoch, action, embed, keep, start, noise, loop)
        return (*after, loop.inputs)

    def imagination_layers(self) -> list[nn.Module]:
        """Return what `imagine_step` applies, the layers that `observe` applies too first."""
        return [*self.core.state_layers(), self.prior_net, *self.core.action_layers()]

    def imagine_step(
        self, deter: Tensor, stoch: Tensor, action: Tensor, loop: Inside | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return (deter (N, D), flat stoch (N, S·K)) after one prior step with action (N, A)."""
        deter = self.core(deter, stoch, self.core.project_action(action, loop), loop)
        return deter, self.latent.sample(self.prior(deter, loop)).flatten(1)


class LearnedStartRSSM(RSSM):
    """RSSM whose episodes start from h₀ = tanh(w) and the prior's mode (DreamerV3, 2023).

    As in the official code the mode of categoricals has no gradient: where episodes start, as
    anywhere else, nothing but the dynamics loss moves the prior.
    """

    def __init__(
        self,
        core: Core,
        latent: Latent,
        embed: int,
        hidden: int,
        prior_layers: int,
        post_layers: int,
        style: Style = RMS_SILU,
    ) -> None:
        super().__init__(core, latent, embed, hidden, prior_layers, post_layers, style)
        self.first_deter = nn.Parameter(torch.zeros(core.deter))

    def start(self) -> tuple[Tensor, Tensor]:
        """Return the learned start, with gradient in h₀."""
        deter = torch.tanh(self.first_deter)
        return deter, self.latent.mode(self.prior(deter[None])).flatten()
