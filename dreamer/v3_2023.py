"""DreamerV3 of January 2023 (arXiv:2301.04104v1), the version that the survey describes."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from dreamer import ops
from dreamer.actor import ActionCodec, Actor
from dreamer.agent import Agent, Group, Losses, Metrics, PolicyParts, Rollout, Trajectory
from dreamer.backbone import make_latent, symlog_decoder, symlog_encoder
from dreamer.batch import Batch
from dreamer.config import AgentConfig
from dreamer.core import LayerNormGRU
from dreamer.decoder import Decoder
from dreamer.dists import BoundedNormal
from dreamer.earlier import V3Of2023Config
from dreamer.heads import BernoulliHead, SymlogTwoHotHead
from dreamer.latent import sigmoid2_std
from dreamer.nets import LAYER_SILU
from dreamer.normalize import PercentileScale
from dreamer.optim import Adam
from dreamer.rssm import LearnedStartRSSM
from dreamer.slow import frozen_copy, move_towards
from dreamer.spaces import ActionSpace, ObsSpace

MIN_STD, MAX_STD = 0.1, 1.0
"""Range of the standard deviation of a continuous action."""


class DreamerV3Of2023(Agent):
    """Symlog predictions, two-hot heads, normalised returns, three optimisers."""

    config: V3Of2023Config
    decoder: Decoder

    def __init__(
        self, config: V3Of2023Config, obs_space: ObsSpace, action_space: ActionSpace
    ) -> None:
        super().__init__(config, obs_space, action_space)
        self.encoder, self.rssm, self.actor = self.policy_parts(config, obs_space, action_space)
        feature, heads = config.world.deter + self.rssm.latent.size, config.heads
        self.decoder = symlog_decoder(obs_space, config.world, feature, LAYER_SILU)
        # Reward and critic start at zero.
        twohot = partial(
            SymlogTwoHotHead, feature, units=heads.units, outscale=0.0, bins=heads.bins,
            style=LAYER_SILU,
        )  # fmt: skip
        self.reward = twohot(heads.reward_layers)
        self.cont = BernoulliHead(feature, heads.cont_layers, heads.units, style=LAYER_SILU)
        model = [param for param in self.parameters() if param not in {*self.actor.parameters()}]
        self.critic = twohot(heads.critic_layers)
        self.slow_critic = frozen_copy(self.critic)
        self.return_scale = PercentileScale(
            rate=config.return_rate,
            low=config.return_low,
            high=config.return_high,
            limit=config.return_limit,
        )
        optim = config.optim
        adam = partial(Adam, decay=optim.decay, hat=False)
        self.model_adam = adam(model, lr=optim.model_lr, eps=optim.eps, clip=optim.model_clip)
        adam = partial(adam, clip=optim.behaviour_clip, eps=optim.behaviour_eps)
        self.actor_adam = adam(list(self.actor.parameters()), lr=optim.actor_lr)
        self.critic_adam = adam(list(self.critic.parameters()), lr=optim.critic_lr)
        gradient = config.imagination.gradient
        if gradient == "auto":
            gradient = "dynamics" if self.codec.continuous else "reinforce"
        if gradient == "both":
            raise ValueError(
                "agent v3-2023 takes its actor's gradient from 'reinforce' or 'dynamics', got "
                "'both'; mixing them is DreamerV2's (--preset v2-…)"
            )
        self.differentiable = gradient == "dynamics"

    @staticmethod
    def policy_parts(
        config: AgentConfig, obs_space: ObsSpace, action_space: ActionSpace
    ) -> PolicyParts:
        """Return the encoder, RSSM and actor with fresh parameters."""
        assert isinstance(config, V3Of2023Config), config
        world, style = config.world, LAYER_SILU
        encoder, latent = symlog_encoder(obs_space, world, style), make_latent(world, sigmoid2_std)
        action = ActionCodec(action_space).size
        core = LayerNormGRU(world.deter, latent.size, action, world.hidden, style, unit_action=True)
        rssm = LearnedStartRSSM(core, latent, encoder.outputs, world.hidden, 1, 1, style)
        actor = Actor(
            world.deter + latent.size,
            action_space,
            layers=config.heads.actor_layers,
            units=config.heads.units,
            continuous=lambda mean, std: BoundedNormal(mean, std, MIN_STD, MAX_STD),
            unimix=config.actor_unimix,
            style=style,
        )
        return PolicyParts(encoder, rssm, actor)

    @property
    def horizon(self) -> int:
        """Imagined steps H."""
        return self.config.imagination.horizon

    def model_losses(self, batch: Batch, rollout: Rollout) -> tuple[Losses, Metrics]:
        """Return Eq. 4–5: symlog predictions, and two KLs with free nats for every step."""
        states, latent = rollout.states, self.rssm.latent
        feature = states.feature()
        predicted = self.decoder(states.deter, states.stoch.flatten(2))
        keys = self.decoder.losses(predicted, batch.obs)
        losses = {"rec": torch.stack(list(keys.values())).sum(0)}
        losses["rew"] = self.reward(feature).loss(batch.reward)
        losses["con"] = self.cont(feature).loss((~batch.is_terminal).float())
        dyn = latent.kl(rollout.post.detach(), rollout.prior)
        rep = latent.kl(rollout.post, rollout.prior.detach())
        losses["dyn"] = ops.free_nats_per_element(dyn, self.config.free_nats)
        losses["rep"] = ops.free_nats_per_element(rep, self.config.free_nats)
        metrics = {f"loss/rec_{key}": value.detach().mean() for key, value in keys.items()}
        return losses, metrics | self.kl_metrics("dyn", dyn, rollout)

    def behaviour_losses(
        self, batch: Batch, rollout: Rollout, trajectory: Trajectory
    ) -> tuple[Losses, Metrics]:
        """Return Eq. 8–12: normalised returns for the actor, two-hot returns for the critic."""
        rule, feature = self.config.imagination, trajectory.feature
        with torch.set_grad_enabled(self.differentiable):
            reward, value = self.reward(feature).mean(), self.critic(feature).mean()
            live = rule.discount * self.continues(batch, feature)
            returns = ops.lambda_return_next(reward, value, live, rule.lambda_)
        weight = ops.cumulative_weight(live, rule.discount)[:, :-1]
        advantage = (returns - value[:, :-1]) / self.return_scale.update(returns)
        # Actor
        policy = self.actor(feature[:, :-1].detach())
        entropy = policy.entropy()
        if self.differentiable:
            gain = advantage
        else:
            gain = policy.log_prob(trajectory.actions[:, :-1]) * advantage.detach()
        losses = {"policy": -weight * (gain + rule.entropy * entropy)}
        # Critic, pulled towards its slow copy
        with torch.no_grad():
            slow = self.slow_critic(feature[:, :-1]).mean()
        targets = torch.stack([returns.detach(), slow], -1)
        critic = self.critic(feature[:, :-1].detach())
        pull = self.config.slow_regulariser
        losses["value"] = weight * critic.mixed_loss(targets, (1.0, pull))
        seen = (entropy, returns, value, reward, live, self.return_scale)
        metrics = self.behaviour_metrics(*seen)
        return losses, metrics | {"advantage_abs": advantage.detach().abs().mean()}

    @torch.no_grad()
    def continues(self, batch: Batch, feature: Tensor) -> Tensor:
        """Return (N, H+1) in [0, 1]: the truth where a trajectory starts, the head after that."""
        true = (~batch.is_terminal).float().reshape(-1, 1)
        imagined = self.cont(feature[:, 1:]).mean()
        if self.config.continuation == "mode":
            imagined = (imagined > 0.5).float()
        return torch.cat([true, imagined], 1)

    def scale(self, loss: str) -> float:
        """Return the weight of a loss."""
        config = self.config
        weights = {"rec": config.rec_scale, "dyn": config.dyn_scale, "rep": config.rep_scale}
        return weights.get(loss, 1.0)

    def groups(self) -> list[Group]:
        """Return three groups; the model's gradient never comes from the behaviour."""
        names = ("rec", "rew", "con", "dyn", "rep")
        return [
            Group("model", names, self.model_adam.params, self.model_adam),
            Group("actor", ("policy",), self.actor_adam.params, self.actor_adam),
            Group("critic", ("value",), self.critic_adam.params, self.critic_adam),
        ]

    def update_slow(self) -> None:
        """Move the slow critic towards the fast one."""
        move_towards(self.slow_critic, self.critic, self.config.slow_rate)
