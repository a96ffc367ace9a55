"""DreamerPro (arXiv:2110.14565): prototypes instead of reconstruction, on V2 or on V3."""

from __future__ import annotations

import torch
from torch import Tensor

from dreamer import ops
from dreamer.agent import Agent, Losses, Metrics, Pictures, Rollout, Trajectory
from dreamer.batch import Batch
from dreamer.dists import Part, TanhNormal
from dreamer.earlier import ProConfig, ProV3Config
from dreamer.nets import Style
from dreamer.prototypes import LOSSES, Prototypes
from dreamer.v2 import DreamerV2
from dreamer.v3 import DreamerV3

MIN_STD = 0.1
"""Smallest standard deviation of the policy before the tanh."""


class PrototypeLearner(Agent):
    """What both backbones share: two views, the prototypes' losses, the slow teacher."""

    prototypes: Prototypes
    objective_names: tuple[str, ...] = LOSSES

    def update(self, batch: Batch) -> tuple[Metrics, dict[str, Tensor]]:
        """Train on one batch, or on its two views if the whole agent learns from them."""
        if self.prototypes.config.rollout == "augmented":
            batch = self.prototypes.views(batch)
        return super().update(batch)

    def representation_losses(self, batch: Batch, rollout: Rollout) -> tuple[Losses, Metrics]:
        """Return the losses of the two views, rolling them out first if that was not done."""
        if self.prototypes.config.rollout == "clean":
            batch = self.prototypes.views(batch)
            rollout = self.observe(batch)
        return self.prototypes.losses(batch.obs, rollout.embed, rollout.states.feature())

    def update_slow(self) -> None:
        """Move the slow critic and the teacher."""
        super().update_slow()
        self.prototypes.move(self.encoder)

    @torch.no_grad()
    def open_loop(self, batch: Batch, context: int = 5) -> dict[str, Pictures]:
        """Return {image key: what was seen, and two views of it}.

        There is no decoder that could show predictions; the views show what the agent learns from.
        """
        views = self.prototypes.views(batch).obs
        return {
            key: Pictures(x.float() / 255.0, (views[key] / 255.0).chunk(2), None)
            for key, x in batch.obs.items()
            if x.dim() == 5
        }


class DreamerPro(PrototypeLearner, DreamerV2):
    """DreamerPro as published: the world model and the behaviour of an early DreamerV2."""

    config: ProConfig

    def build_objective(self, feature: int, style: Style) -> None:
        """Build what the representation learns from: prototypes."""
        embed = self.encoder.outputs
        self.prototypes = Prototypes(self.config.prototypes, self.encoder, embed, feature)

    @staticmethod
    def continuous(mean: Tensor, std: Tensor) -> Part:
        """Return the distribution of continuous actions."""
        return TanhNormal(mean, std, MIN_STD, 0.0)

    @property
    def horizon(self) -> int:
        """Imagined steps: the published horizon counts the replayed state."""
        return self.config.imagination.horizon - 1

    def behaviour_losses(
        self, batch: Batch, rollout: Rollout, trajectory: Trajectory
    ) -> tuple[Losses, Metrics]:
        """Return the losses of early DreamerV2: an action earns R of the state it is taken in."""
        rule, feature = self.config.imagination, trajectory.feature
        with torch.set_grad_enabled(self.differentiable):
            reward, slow = self.reward(feature).mean(), self.slow_critic(feature).mean()
            live = self.discounts(batch, feature)
            returns = ops.lambda_return_current(reward, slow, live, rule.lambda_)
        weight = ops.weight_from_one(live.detach())[:, :-1]
        # Actor
        still = feature[:, :-1].detach()
        policy, critic = self.actor(still), self.critic(still)
        actions = trajectory.actions[:, :-1].detach()
        gain = self.objective(policy, actions, returns, critic.mean())
        entropy = policy.entropy()
        losses = {"policy": -weight * (gain + rule.entropy * entropy)}
        # Critic
        losses["value"] = weight * critic.loss(returns.detach())
        return losses, self.behaviour_metrics(entropy, returns, critic.mean(), reward, live)

    def scale(self, loss: str) -> float:
        """Return the weight of a loss."""
        own = {"rew": self.config.reward_scale, "norm": self.config.prototypes.norm_scale}
        return own[loss] if loss in own else super().scale(loss)


class DreamerProV3(PrototypeLearner, DreamerV3):
    """The same objective on DreamerV3 (2025), whose rollout stays clean."""

    config: ProV3Config

    def build_objective(self, deter: int, stoch: int) -> None:
        """Build what the representation learns from: prototypes."""
        embed, feature = self.encoder.outputs, deter + stoch
        self.prototypes = Prototypes(self.config.prototypes, self.encoder, embed, feature)

    def scale(self, loss: str) -> float:
        """Return the weight of a loss."""
        own = {"swav": 1.0, "temp": 1.0, "norm": self.config.prototypes.norm_scale}
        return own[loss] if loss in own else super().scale(loss)
