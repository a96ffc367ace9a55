"""DreamerV3 as published in Nature (2025) and arXiv:2301.04104v2."""

from __future__ import annotations

import torch
from torch import Tensor

from dreamer import ops
from dreamer.actor import ActionCodec, Actor
from dreamer.agent import Agent, Group, Losses, Metrics, PolicyParts, Rollout, Trajectory
from dreamer.backbone import pooled_decoder, pooled_encoder
from dreamer.batch import Batch
from dreamer.config import AgentConfig, V3Config
from dreamer.core import BlockGRU
from dreamer.dists import BoundedNormal
from dreamer.heads import BernoulliHead, TwoHot, TwoHotHead
from dreamer.latent import OneHotLatent
from dreamer.normalize import PercentileScale
from dreamer.optim import LaProp
from dreamer.rssm import RSSM
from dreamer.slow import frozen_copy, move_towards
from dreamer.spaces import ActionSpace, ObsSpace


class DreamerV3(Agent):
    """World model, actor and critic under one optimiser; REINFORCE for every action type."""

    config: V3Config
    objective_names: tuple[str, ...] = ("rec",)
    """Losses of the representation."""

    def __init__(self, config: V3Config, obs_space: ObsSpace, action_space: ActionSpace) -> None:
        super().__init__(config, obs_space, action_space)
        self.encoder, self.rssm, self.actor = self.policy_parts(config, obs_space, action_space)
        deter, stoch = config.rssm.deter, self.rssm.latent.size
        feature = deter + stoch
        self.build_objective(deter, stoch)
        self.reward = TwoHotHead(
            feature, config.reward.layers, config.reward.units, config.reward.outscale,
            config.reward.bins,
        )  # fmt: skip
        self.cont = BernoulliHead(
            feature, config.cont.layers, config.cont.units, config.cont.outscale
        )
        self.critic = TwoHotHead(
            feature, config.critic.layers, config.critic.units, config.critic.outscale,
            config.critic.bins,
        )  # fmt: skip
        trained = [param for param in self.parameters() if param.requires_grad]
        # A copy, made after initialisation: both critics start equal.
        self.slow_critic = frozen_copy(self.critic)
        rule = config.behaviour
        self.return_scale = PercentileScale(
            rate=rule.return_rate, low=rule.return_low, high=rule.return_high,
            limit=rule.return_limit,
        )  # fmt: skip
        optim = config.optim
        self.optimiser = LaProp(
            trained, lr=optim.lr, warmup=optim.warmup, beta1=optim.beta1, beta2=optim.beta2,
            eps=optim.eps, agc=optim.agc, agc_floor=optim.agc_floor,
        )  # fmt: skip
        self._trained = tuple(trained)

    def build_objective(self, deter: int, stoch: int) -> None:
        """Build what the representation learns from: the decoder."""
        self.decoder = pooled_decoder(self.obs_space, self.config.decoder, deter, stoch)

    @staticmethod
    def policy_parts(
        config: AgentConfig, obs_space: ObsSpace, action_space: ActionSpace
    ) -> PolicyParts:
        """Return the encoder, RSSM and actor with fresh parameters."""
        assert isinstance(config, V3Config), config
        encoder, rssm = pooled_encoder(obs_space, config.encoder), config.rssm
        latent = OneHotLatent(rssm.stoch, rssm.classes, rssm.unimix)
        action = ActionCodec(action_space).size
        core = BlockGRU(rssm.deter, latent.size, action, rssm.hidden, rssm.blocks)
        dynamics = RSSM(
            core, latent, encoder.outputs, rssm.hidden, rssm.prior_layers, rssm.post_layers
        )
        net = config.actor
        actor = Actor(
            rssm.deter + latent.size,
            action_space,
            layers=net.layers,
            units=net.units,
            continuous=lambda mean, std: BoundedNormal(mean, std, net.min_std, net.max_std),
            outscale=net.outscale,
            unimix=net.unimix,
        )
        return PolicyParts(encoder, dynamics, actor)

    @property
    def horizon(self) -> int:
        """Imagined steps H."""
        return self.config.behaviour.imag_horizon

    @property
    def discount(self) -> float:
        """γ = 1 − 1 / horizon."""
        return 1.0 - 1.0 / self.config.behaviour.discount_horizon

    def model_losses(self, batch: Batch, rollout: Rollout) -> tuple[Losses, Metrics]:
        """Return Eq. 2–3: reconstruction, reward, continuation, dynamics and representation."""
        latent, feature = self.rssm.latent, rollout.states.feature()
        losses, metrics = self.representation_losses(batch, rollout)
        # The discount is inside the continuation: its target is γ or 0.
        losses["rew"] = self.reward(feature).loss(batch.reward)
        losses["con"] = self.cont(feature).loss(self.discount * (~batch.is_terminal).float())
        dyn = latent.kl(rollout.post.detach(), rollout.prior)
        rep = latent.kl(rollout.post, rollout.prior.detach())
        losses["dyn"] = ops.free_nats_per_element(dyn, self.config.free_nats)
        losses["rep"] = ops.free_nats_per_element(rep, self.config.free_nats)
        return losses, metrics | self.kl_metrics("dyn", dyn, rollout)

    def representation_losses(self, batch: Batch, rollout: Rollout) -> tuple[Losses, Metrics]:
        """Return the reconstruction of every key, each in its metrics, under one scale."""
        assert self.decoder is not None
        predicted = self.decoder(rollout.states.deter, rollout.states.stoch.flatten(2))
        keys = self.decoder.losses(predicted, batch.obs)
        metrics = {f"loss/rec_{key}": value.detach().mean() for key, value in keys.items()}
        return {"rec": torch.stack(list(keys.values())).sum(0)}, metrics

    def behaviour_losses(
        self, batch: Batch, rollout: Rollout, trajectory: Trajectory
    ) -> tuple[Losses, Metrics]:
        """Return Eq. 5–7: actor, critic in imagination, critic on replay."""
        rule = self.config.behaviour
        feature = trajectory.feature
        critic = self.critic(feature)
        with torch.no_grad():
            value, slow = critic.mean(), self.slow_critic(feature).mean()
            reward, live = self.reward(feature).mean(), self.cont(feature).mean()
            weight = ops.cumulative_weight(live, 1.0)[:, :-1]
            returns = ops.lambda_return_next(reward, value, live, rule.lambda_)
            scale = self.return_scale.update(returns)
            advantage = (returns - value[:, :-1]) / scale
        # Actor
        # Evaluated on all states, the last one too: a slice of the features would be copied.
        policy = self.actor(feature)
        entropy = policy.entropy()[:, :-1]
        log_prob = policy.log_prob(trajectory.actions)[:, :-1]
        losses = {"policy": -weight * (log_prob * advantage + rule.entropy * entropy)}
        # Critic
        losses["value"] = weight * self._regress(critic.without_last(), returns, slow[:, :-1])
        losses["repval"] = self._replay_critic_loss(batch, rollout, returns[:, 0])
        seen = (entropy, returns, value, reward, live, self.return_scale)
        metrics = self.behaviour_metrics(*seen) | {"advantage_abs": advantage.abs().mean()}
        return losses, metrics

    def _regress(self, critic: TwoHot, returns: Tensor, slow: Tensor) -> Tensor:
        """Cross-entropy to the returns, and to the slow critic's mean as a regulariser."""
        weight = self.config.behaviour.slow_regulariser
        return critic.mixed_loss(torch.stack([returns, slow], -1), (1.0, weight))

    def _replay_critic_loss(self, batch: Batch, rollout: Rollout, imagined: Tensor) -> Tensor:
        """Return the critic loss on replayed rewards (B, T−1), with gradient into the model.

        Bootstraps and interpolates with the return imagined from each replayed state, and cuts
        the trace where an episode ends for any reason.
        """
        boot = imagined.reshape(batch.reward.shape)
        goes_on = (~batch.is_last).float()
        live = self.discount * (~batch.is_terminal).float()
        trace = self.config.behaviour.lambda_ * goes_on
        returns = ops.lambda_return_next(batch.reward, boot, live, trace)
        feature = rollout.states.feature()[:, :-1]
        with torch.no_grad():
            slow = self.slow_critic(feature).mean()
        return goes_on[:, :-1] * self._regress(self.critic(feature), returns, slow)

    def scale(self, loss: str) -> float:
        """Return the weight of a loss."""
        weight: float = getattr(self.config.scales, loss)
        return weight

    def groups(self) -> list[Group]:
        """Return one group: every loss moves every part that its gradient reaches."""
        names = (*self.objective_names, "rew", "con", "dyn", "rep", "policy", "value", "repval")
        return [Group("", names, list(self._trained), self.optimiser)]

    def update_slow(self) -> None:
        """Move the slow critic towards the fast one."""
        move_towards(self.slow_critic, self.critic, self.config.behaviour.slow_rate)
