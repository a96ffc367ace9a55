"""DreamerV1 (arXiv:1912.01603v3)."""

from __future__ import annotations

from functools import partial

import torch

from dreamer import ops
from dreamer.actor import ActionCodec, Actor
from dreamer.agent import Agent, Group, Losses, Metrics, PolicyParts, Rollout, Trajectory
from dreamer.backbone import centred_decoder, centred_encoder
from dreamer.batch import Batch
from dreamer.config import AgentConfig
from dreamer.core import KerasGRU
from dreamer.decoder import Decoder
from dreamer.dists import TanhNormal
from dreamer.earlier import V1Config
from dreamer.heads import BernoulliHead, GaussHead
from dreamer.latent import GaussianLatent, softplus_std
from dreamer.nets import PLAIN_ELU, PLAIN_RELU
from dreamer.optim import Adam
from dreamer.rssm import RSSM, State
from dreamer.spaces import ActionSpace, ObsSpace

MIN_STD, INIT_STD = 1e-4, 5.0
"""Smallest and initial standard deviation of the policy before the tanh."""


class DreamerV1(Agent):
    """Gaussian latents; the actor climbs the value through the differentiable model."""

    config: V1Config
    decoder: Decoder
    differentiable = True

    def __init__(self, config: V1Config, obs_space: ObsSpace, action_space: ActionSpace) -> None:
        super().__init__(config, obs_space, action_space)
        self.encoder, self.rssm, self.actor = self.policy_parts(config, obs_space, action_space)
        feature, heads = config.world.deter + config.world.stoch, config.heads
        self.decoder = centred_decoder(obs_space, config.world, feature, PLAIN_ELU, PLAIN_RELU)
        self.reward = GaussHead(feature, heads.reward_layers, heads.units, PLAIN_ELU)
        self.cont = (
            BernoulliHead(feature, heads.cont_layers, heads.units, style=PLAIN_ELU)
            if config.cont
            else None
        )
        self.critic = GaussHead(feature, heads.critic_layers, heads.units, PLAIN_ELU)
        behaviour = {*self.actor.parameters(), *self.critic.parameters()}
        model = [param for param in self.parameters() if param not in behaviour]
        optim = config.optim
        adam = partial(Adam, clip=optim.model_clip, decay=optim.decay)
        self.model_adam = adam(model, lr=optim.model_lr, eps=optim.eps)
        adam = partial(adam, clip=optim.behaviour_clip, eps=optim.behaviour_eps)
        self.actor_adam = adam(list(self.actor.parameters()), lr=optim.actor_lr)
        self.critic_adam = adam(list(self.critic.parameters()), lr=optim.critic_lr)

    @staticmethod
    def policy_parts(
        config: AgentConfig, obs_space: ObsSpace, action_space: ActionSpace
    ) -> PolicyParts:
        """Return the encoder, RSSM and actor with fresh parameters."""
        assert isinstance(config, V1Config), config
        world = config.world
        encoder = centred_encoder(obs_space, world, PLAIN_ELU, PLAIN_RELU)
        latent = GaussianLatent(world.stoch, softplus_std)
        action = ActionCodec(action_space).size
        core = KerasGRU(world.deter, world.stoch, action, world.hidden)
        rssm = RSSM(core, latent, encoder.outputs, world.hidden, 1, 1, PLAIN_ELU)
        actor = Actor(
            world.deter + world.stoch,
            action_space,
            layers=config.heads.actor_layers,
            units=config.heads.units,
            continuous=lambda mean, std: TanhNormal(mean, std, MIN_STD, INIT_STD),
            style=PLAIN_ELU,
        )
        return PolicyParts(encoder, rssm, actor)

    @property
    def horizon(self) -> int:
        """Imagined steps H."""
        return self.config.imagination.horizon

    def imagine(self, rollout: Rollout) -> Trajectory:
        """Imagine from every replayed state, but not from the last ones if episodes can end."""
        if self.cont is None:
            return super().imagine(rollout)
        deter, stoch = rollout.states
        return super().imagine(rollout._replace(states=State(deter[:, :-1], stoch[:, :-1])))

    def model_losses(self, batch: Batch, rollout: Rollout) -> tuple[Losses, Metrics]:
        """Return Eq. 10: reconstruction, reward, and the KL with free nats on its mean."""
        config, latent = self.config, self.rssm.latent
        feature = rollout.states.feature()
        # Reconstruction
        predicted = self.decoder(rollout.states.deter, rollout.states.stoch)
        keys = self.decoder.losses(predicted, batch.obs)
        losses = {"rec": torch.stack(list(keys.values())).sum(0)}
        # Reward, and continuation where the task can end
        losses["rew"] = self.reward(feature).loss(ops.squash(batch.reward, config.reward))
        if self.cont is not None:
            target = config.imagination.discount * (~batch.is_terminal).float()
            losses["con"] = self.cont(feature).loss(target)
        # One KL trains prior and posterior
        kl = latent.kl(rollout.post, rollout.prior)
        losses["kl"] = ops.free_nats_of_mean(kl, config.free_nats)
        metrics = {f"loss/rec_{key}": value.detach().mean() for key, value in keys.items()}
        return losses, metrics | self.kl_metrics("kl", kl, rollout)

    def behaviour_losses(
        self, batch: Batch, rollout: Rollout, trajectory: Trajectory
    ) -> tuple[Losses, Metrics]:
        """Return Eq. 7–8 on the imagined states; the replayed state they start from is left out."""
        rule = self.config.imagination
        feature = trajectory.feature[:, 1:]
        reward, value = self.reward(feature).mean(), self.critic(feature).mean()
        if self.cont is not None:
            live = self.cont(feature).mean()
        else:
            live = torch.full_like(reward, rule.discount)
        returns = ops.lambda_return_current(reward, value, live, rule.lambda_)
        weight = ops.weight_from_one(live.detach())[:, :-1]
        # Actor
        losses = {"policy": -weight * returns}
        # Critic
        critic = self.critic(feature[:, :-1].detach())
        losses["value"] = weight * critic.loss(returns.detach())
        policy = self.actor(trajectory.feature[:, :-1].detach())
        with torch.no_grad():
            entropy = policy.entropy()
        return losses, self.behaviour_metrics(entropy, returns, value, reward, live)

    def scale(self, loss: str) -> float:
        """Return the weight of a loss."""
        config = self.config
        weights = {"rec": config.rec_scale, "kl": config.kl_scale, "con": config.cont_scale}
        return weights.get(loss, 1.0)

    def groups(self) -> list[Group]:
        """Return three groups; the model's gradient never comes from the behaviour."""
        names = ("rec", "rew", "kl") + (("con",) if self.cont is not None else ())
        return [
            Group("model", names, self.model_adam.params, self.model_adam),
            Group("actor", ("policy",), self.actor_adam.params, self.actor_adam),
            Group("critic", ("value",), self.critic_adam.params, self.critic_adam),
        ]

    def update_slow(self) -> None:
        """Do nothing: there are no slow copies."""
