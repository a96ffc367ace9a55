"""DreamerV2 (arXiv:2010.02193v4)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from dreamer import ops
from dreamer.actor import ActionCodec, Actor
from dreamer.agent import Agent, Group, Losses, Metrics, PolicyParts, Rollout, Trajectory
from dreamer.backbone import centred_decoder, centred_encoder, layer_style, make_latent
from dreamer.batch import Batch
from dreamer.config import AgentConfig
from dreamer.core import LayerNormGRU
from dreamer.dists import ActionDist, Part, TruncatedNormal
from dreamer.earlier import V2Config
from dreamer.heads import BernoulliHead, GaussHead
from dreamer.latent import sigmoid2_std
from dreamer.nets import Style
from dreamer.optim import Adam
from dreamer.rssm import RSSM
from dreamer.slow import CopyClock, frozen_copy
from dreamer.spaces import ActionSpace, ObsSpace

MIN_STD = 0.1
"""Smallest standard deviation of a continuous action."""


class DreamerV2(Agent):
    """Categorical latents, KL balancing, REINFORCE for discrete actions, a slow critic."""

    config: V2Config
    objective_names: tuple[str, ...] = ("rec",)
    """Losses of the representation."""

    def __init__(self, config: V2Config, obs_space: ObsSpace, action_space: ActionSpace) -> None:
        super().__init__(config, obs_space, action_space)
        self.encoder, self.rssm, self.actor = self.policy_parts(config, obs_space, action_space)
        feature, heads = config.world.deter + self.rssm.latent.size, config.heads
        style = layer_style(config)
        self.build_objective(feature, style)
        self.reward = GaussHead(feature, heads.reward_layers, heads.units, style)
        self.cont = (
            BernoulliHead(feature, heads.cont_layers, heads.units, style=style)
            if config.cont
            else None
        )
        others = {*self.actor.parameters()}
        model = [x for x in self.parameters() if x.requires_grad and x not in others]
        self.critic = GaussHead(feature, heads.critic_layers, heads.units, style)
        self.slow_critic, self.slow_clock = frozen_copy(self.critic), CopyClock(config.slow_every)
        optim = config.optim
        adam = partial(Adam, clip=optim.model_clip, decay=optim.decay)
        self.model_adam = adam(model, lr=optim.model_lr, eps=optim.eps)
        adam = partial(adam, clip=optim.behaviour_clip, eps=optim.behaviour_eps)
        self.actor_adam = adam(list(self.actor.parameters()), lr=optim.actor_lr)
        self.critic_adam = adam(list(self.critic.parameters()), lr=optim.critic_lr)
        self.gradient = config.imagination.gradient
        if self.gradient == "auto":
            self.gradient = "dynamics" if self.codec.continuous else "reinforce"
        self.differentiable = self.gradient != "reinforce"

    def build_objective(self, feature: int, style: Style) -> None:
        """Build what the representation learns from: the decoder."""
        self.decoder = centred_decoder(self.obs_space, self.config.world, feature, style)

    @classmethod
    def policy_parts(
        cls, config: AgentConfig, obs_space: ObsSpace, action_space: ActionSpace
    ) -> PolicyParts:
        """Return the encoder, RSSM and actor with fresh parameters."""
        assert isinstance(config, V2Config), config
        world, style = config.world, layer_style(config)
        encoder, latent = centred_encoder(obs_space, world, style), make_latent(world, sigmoid2_std)
        action = ActionCodec(action_space).size
        core = LayerNormGRU(world.deter, latent.size, action, world.hidden, style)
        rssm = RSSM(core, latent, encoder.outputs, world.hidden, 1, 1, style)
        actor = Actor(
            world.deter + latent.size,
            action_space,
            layers=config.heads.actor_layers,
            units=config.heads.units,
            continuous=cls.continuous,
            style=style,
        )
        return PolicyParts(encoder, rssm, actor)

    @staticmethod
    def continuous(mean: Tensor, std: Tensor) -> Part:
        """Return the distribution of continuous actions."""
        return TruncatedNormal(mean, std, MIN_STD)

    @property
    def horizon(self) -> int:
        """Imagined steps H."""
        return self.config.imagination.horizon

    def model_losses(self, batch: Batch, rollout: Rollout) -> tuple[Losses, Metrics]:
        """Return Eq. 2: reconstruction, reward, discount, and the balanced KL (Algorithm 2)."""
        config, latent = self.config, self.rssm.latent
        feature = rollout.states.feature()
        losses, metrics = self.representation_losses(batch, rollout)
        losses["rew"] = self.reward(feature).loss(ops.squash(batch.reward, config.reward))
        if self.cont is not None:
            # The discount is inside the continuation: its target is γ or 0.
            target = config.imagination.discount * (~batch.is_terminal).float()
            losses["con"] = self.cont(feature).loss(target)
        dyn = latent.kl(rollout.post.detach(), rollout.prior)
        rep = latent.kl(rollout.post, rollout.prior.detach())
        losses["dyn"] = ops.free_nats_of_mean(dyn, config.free_nats)
        losses["rep"] = ops.free_nats_of_mean(rep, config.free_nats)
        return losses, metrics | self.kl_metrics("dyn", dyn, rollout)

    def representation_losses(self, batch: Batch, rollout: Rollout) -> tuple[Losses, Metrics]:
        """Return the reconstruction of every key, each in its metrics too."""
        assert self.decoder is not None
        predicted = self.decoder(rollout.states.deter, rollout.states.stoch.flatten(2))
        keys = self.decoder.losses(predicted, batch.obs)
        metrics = {f"loss/rec_{key}": value.detach().mean() for key, value in keys.items()}
        return {"rec": torch.stack(list(keys.values())).sum(0)}, metrics

    def behaviour_losses(
        self, batch: Batch, rollout: Rollout, trajectory: Trajectory
    ) -> tuple[Losses, Metrics]:
        """Return Eq. 5–6, over the replayed state and the H imagined ones that follow it."""
        rule, feature = self.config.imagination, trajectory.feature
        with torch.set_grad_enabled(self.differentiable):
            reward, slow = self.reward(feature).mean(), self.slow_critic(feature).mean()
            live = self.discounts(batch, feature)
            returns = ops.lambda_return_current(reward, slow, live, rule.lambda_)
        weight = ops.weight_from_one(live.detach())[:, :-1]
        # Actor: an action earns what comes after it, R_{t+1}, so the last state has none.
        policy = self.actor(feature[:, :-2].detach())
        actions = trajectory.actions[:, :-2].detach()
        gain = self.objective(policy, actions, returns[:, 1:], slow[:, :-2])
        entropy = policy.entropy()
        losses = {"policy": -weight[:, :-1] * (gain + rule.entropy * entropy)}
        # Critic
        critic = self.critic(feature[:, :-1].detach())
        losses["value"] = weight * critic.loss(returns.detach())
        return losses, self.behaviour_metrics(entropy, returns, critic.mean(), reward, live)

    def discounts(self, batch: Batch, feature: Tensor) -> Tensor:
        """Return γ times the continuation (N, H+1), the true one where a trajectory starts.

        Without a head it is γ.
        """
        discount = self.config.imagination.discount
        if self.cont is None:
            return torch.full_like(feature[..., 0], discount)
        true = discount * (~batch.is_terminal).float().reshape(-1, 1)
        return torch.cat([true, self.cont(feature[:, 1:]).mean()], 1)

    def objective(
        self, policy: ActionDist, actions: Tensor, returns: Tensor, baseline: Tensor
    ) -> Tensor:
        """Return what the actor maximises: the return, its score-function estimate, or a mix."""
        if self.gradient == "dynamics":
            return returns
        reinforce = policy.log_prob(actions) * (returns - baseline).detach()
        if self.gradient == "reinforce":
            return reinforce
        mix = self.config.imagination.mix
        return mix * returns + (1.0 - mix) * reinforce

    def scale(self, loss: str) -> float:
        """Return the weight of a loss."""
        config = self.config
        weights = {
            "rec": config.rec_scale,
            "con": config.cont_scale,
            "dyn": config.kl_scale * config.kl_balance,
            "rep": config.kl_scale * (1.0 - config.kl_balance),
        }
        return weights.get(loss, 1.0)

    def groups(self) -> list[Group]:
        """Return three groups; the model's gradient never comes from the behaviour."""
        names = (*self.objective_names, "rew", "dyn", "rep")
        names += ("con",) if self.cont is not None else ()
        return [
            Group("model", names, self.model_adam.params, self.model_adam),
            Group("actor", ("policy",), self.actor_adam.params, self.actor_adam),
            Group("critic", ("value",), self.critic_adam.params, self.critic_adam),
        ]

    def update_slow(self) -> None:
        """Copy the critic every so many updates."""
        self.slow_clock.copy(self.slow_critic, self.critic)
