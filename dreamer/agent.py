"""The update that all four papers share, and the parts that acting and learning have in common."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from dreamer import imagination, ops
from dreamer.actor import ActionCodec
from dreamer.batch import Batch
from dreamer.config import AgentConfig
from dreamer.decoder import Decoder
from dreamer.encoder import Encoder
from dreamer.loop import Inside, Step, without_gradient
from dreamer.normalize import PercentileScale
from dreamer.presets import AGENTS
from dreamer.rssm import RSSM, State
from dreamer.spaces import ActionSpace, ObsSpace, record_column

Losses = dict[str, Tensor]
Metrics = dict[str, Tensor]


class Rollout(NamedTuple):
    """Posterior states over a batch, with gradient.

    ``post`` and ``prior`` are the latent's statistics (B, T, …).
    """

    embed: Tensor
    states: State
    post: Tensor
    prior: Tensor


class Trajectory(NamedTuple):
    """Imagined states and the actions taken in them, without gradient unless the paper needs it.

    ``feature`` (N, H+1, F) starts with the replayed state; ``actions`` (N, H+1, A).
    """

    feature: Tensor
    actions: Tensor


class Pictures(NamedTuple):
    """Moving pictures of what an agent learns from, (B, T, h, w, c) each, about in [0, 1]."""

    truth: Tensor
    made: tuple[Tensor, ...]
    """The model's prediction, or the views that take its place."""
    seen: Tensor | None
    """(B, T) bool, the steps whose truth the prediction saw; None where nothing is predicted."""


class Optimiser(Protocol):
    """What a group needs from its optimiser."""

    def step(self, grads: list[Tensor], apply: Tensor) -> Metrics:
        """Apply one update in place where ``apply``, a 0-d bool, is true; else change nothing."""


class PolicyParts(NamedTuple):
    """What acting needs, and what is published."""

    encoder: Encoder
    rssm: RSSM
    actor: nn.Module


class Group(NamedTuple):
    """Parameters that one optimiser moves, and the losses whose gradient moves them."""

    name: str
    """Ends the names of its metrics, as in ``grad_norm/model``; empty for an only group."""
    losses: tuple[str, ...]
    params: list[nn.Parameter]
    optimiser: Optimiser


class Agent(nn.Module):
    """One Dreamer: *observe → model losses → imagine → behaviour losses → optimise → slow copies*.

    A paper is a subclass that builds the parts in its constructor and fills in the losses. The
    encoder, the RSSM and the actor are what acting needs; their tensors are published.
    """

    encoder: Encoder
    rssm: RSSM
    actor: nn.Module
    decoder: Decoder | None
    differentiable: bool = False
    """Whether imagination keeps the gradient through actions and dynamics."""

    def __init__(self, config: AgentConfig, obs_space: ObsSpace, action_space: ActionSpace) -> None:
        super().__init__()
        self.config, self.obs_space, self.action_space = config, obs_space, action_space
        self.codec = ActionCodec(action_space)
        self.decoder = None
        self.amp: torch.dtype | None = None
        self.step_loss: Tensor | None = None
        """(B, T) of the last update, (2B, T) if it trained on two views: the scaled sum of those
        losses of the world model that every step has."""

    @staticmethod
    def policy_parts(
        config: AgentConfig, obs_space: ObsSpace, action_space: ActionSpace
    ) -> PolicyParts:
        """Return the parts that acting needs, with fresh parameters."""
        raise NotImplementedError

    def update(self, batch: Batch) -> tuple[Metrics, dict[str, Tensor]]:
        """Train on one batch, without synchronising with the host.

        An update with a non-finite loss or gradient changes no parameter, no moment and no running
        scale.

        Returns:
            Metrics as 0-d tensors on the device, with ``finite`` (bool) among them, and the
            recomputed latents of the batch ``{"deter": (B, T, D), "stoch": (B, T, S)}`` in the
            types of the replay record.
        """
        scales = [(scale, scale.clone()) for scale in self._running_scales()]
        # One autocast context per phase: its cache of cast weights must not carry a cast made
        # without gradient, in imagination, over to a phase that needs the gradient.
        with self._precision(batch):
            rollout = self.observe(batch)
            losses, metrics = self.model_losses(batch, rollout)
        steps = batch.reward.shape
        each = [x.detach() * self.scale(k) for k, x in losses.items() if x.shape == steps]
        self.step_loss = torch.stack(each).sum(0)
        with self._precision(batch):
            trajectory = self.imagine(rollout)
        with self._precision(batch):
            behaviour, more = self.behaviour_losses(batch, rollout, trajectory)
        losses |= behaviour
        metrics |= more | {f"loss/{name}": value.detach().mean() for name, value in losses.items()}
        metrics |= self.optimise(losses)
        for scale, before in scales:
            scale.copy_(torch.where(metrics["finite"], scale, before))
        self.update_slow()
        return metrics, self.to_record(rollout.states)

    def _running_scales(self) -> list[Tensor]:
        parts = [part for part in self.modules() if isinstance(part, PercentileScale)]
        return [buffer for part in parts for buffer in part.buffers()]

    def _precision(self, batch: Batch) -> AbstractContextManager[object]:
        if self.amp is None:
            return nullcontext()
        return torch.autocast(batch.reward.device.type, dtype=self.amp)

    def observe(self, batch: Batch) -> Rollout:
        """Return the posterior rollout of the batch, with gradient."""
        embed = self.encoder(batch.obs)
        states, post = self.rssm.observe(embed, batch.prev_action, batch.is_first, batch.initial)
        return Rollout(embed, states, post, self.rssm.prior(states.deter))

    def model_losses(self, batch: Batch, rollout: Rollout) -> tuple[Losses, Metrics]:
        """Return the world model's losses, each (B, T) or already a mean."""
        raise NotImplementedError

    def kl_metrics(self, name: str, kl: Tensor, rollout: Rollout) -> Metrics:
        """Return the mean KL and the entropies of both distributions in nats, without gradient."""
        entropy = self.rssm.latent.entropy
        return {
            f"kl_nats/{name}": kl.detach().mean(),
            "kl_nats/prior_entropy": entropy(rollout.prior.detach()).mean(),
            "kl_nats/post_entropy": entropy(rollout.post.detach()).mean(),
        }

    @staticmethod
    def behaviour_metrics(
        entropy: Tensor,
        returns: Tensor,
        value: Tensor,
        reward: Tensor,
        live: Tensor,
        running: PercentileScale | None = None,
    ) -> Metrics:
        """Return what is worth watching of trajectories, without gradient.

        Percentiles of the returns are those of this update, or the running ones that scale the
        returns where there are such.
        """
        means = {
            "entropy_nats": entropy,
            "return_mean": returns,
            "value_mean": value,
            "imagined_reward": reward,
            "imagined_cont": live,
        }
        metrics = {name: x.detach().mean() for name, x in means.items()}
        metrics |= _percentiles("value_percentile", value)
        found = _percentiles("return_percentile", returns) if running is None else running.metrics()
        return metrics | found

    @property
    def horizon(self) -> int:
        """Imagined steps H."""
        raise NotImplementedError

    def imagine(self, rollout: Rollout) -> Trajectory:
        """Return trajectories from every replayed state under the current policy."""
        start = rollout.states.detach().flatten()
        if self.differentiable:
            roll = imagination.differentiable(self.imagined_step, start, self.horizon)
        else:
            fixed = without_gradient(*self.rssm.imagination_layers(), self.actor)
            step = partial(self.imagined_step, fixed=fixed)
            roll = imagination.sampled(step, start, self.horizon)
        return Trajectory(*roll)

    def imagined_step(
        self, deter: Tensor, stoch: Tensor, fixed: Step | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Act in (N, D), flat (N, Z), and return the next two and the action (N, A).

        The policy's input has no gradient: a policy acts on what is, it does not arrange it.
        ``fixed`` stands in for the parameters where no gradient is wanted.
        """
        loop = None if fixed is None else Inside(fixed)
        policy = self.actor(torch.cat([deter, stoch], -1).detach(), loop)
        action = policy.rsample() if self.differentiable else policy.sample()
        return (*self.rssm.imagine_step(deter, stoch, action, loop), action)

    def behaviour_losses(
        self, batch: Batch, rollout: Rollout, trajectory: Trajectory
    ) -> tuple[Losses, Metrics]:
        """Return the actor's and critic's losses."""
        raise NotImplementedError

    def scale(self, loss: str) -> float:
        """Return the weight of a loss."""
        raise NotImplementedError

    def groups(self) -> list[Group]:
        """Return the optimiser groups in the order in which they step."""
        raise NotImplementedError

    def update_slow(self) -> None:
        """Move the slow copies after the optimiser's step."""
        raise NotImplementedError

    def compile_parts(self) -> None:
        """Let ``torch.compile`` fuse the functions that do most of the work, in place.

        The recurrent steps are compiled once and called in a loop: compiling the unrolled loops
        takes minutes and gains little more.
        """
        parts: list[tuple[nn.Module, str]] = [(self.rssm, "observe_step_inside")]
        parts += [(self, name) for name in ("model_losses", "imagined_step", "behaviour_losses")]
        on_cpu = next(self.parameters()).device.type == "cpu"
        if not on_cpu:
            # Pooling, norms and activations between the convolutions become one kernel each.
            parts += [(self.encoder, "forward"), (self.rssm, "prior")]
        # The compiled generator of random numbers is one thread and one number at a time on CPUs.
        options: dict[str, str | int | bool | Callable[..., Any]] = {"fallback_random": on_cpu}
        for owner, name in parts:
            compiled = torch.compile(getattr(owner, name), dynamic=False, options=options)
            setattr(owner, name, compiled)

    def optimise(self, losses: Losses) -> Metrics:
        """Step every group on the scaled sum of its losses' means, or none if one is not finite."""
        groups = self.groups()
        named = [name for group in groups for name in group.losses]
        assert sorted(named) == sorted(losses), (sorted(named), sorted(losses))
        grads = [
            torch.autograd.grad(
                torch.stack(
                    [losses[name].mean() * self.scale(name) for name in group.losses]
                ).sum(),
                group.params,
                retain_graph=group is not groups[-1],
                materialize_grads=True,
            )
            for group in groups
        ]
        checked = [*losses.values(), *(grad for given in grads for grad in given)]
        norms = torch._foreach_norm([x.detach() for x in checked])
        finite = torch.stack(norms).isfinite().all()
        metrics: Metrics = {"finite": finite}
        metrics |= self._gradient_norms(groups, norms[len(losses) :])
        for group, grad in zip(groups, grads, strict=True):
            found = group.optimiser.step(list(grad), finite)
            metrics |= {f"{key}/{group.name}" if group.name else key: x for key, x in found.items()}
        return metrics

    def _gradient_norms(self, groups: list[Group], norms: Sequence[Tensor]) -> Metrics:
        """Return ``grad_norm/<module>`` of every trained module, before clipping."""
        owners = {id(param): name.split(".")[0] for name, param in self.named_parameters()}
        params = [param for group in groups for param in group.params]
        parts: dict[str, list[Tensor]] = {}
        for param, norm in zip(params, norms, strict=True):
            parts.setdefault(owners[id(param)], []).append(norm)
        return {f"grad_norm/{name}": torch.stack(found).norm() for name, found in parts.items()}

    def to_record(self, states: State) -> dict[str, Tensor]:
        """Return latents in the types of the replay record, or nothing if none are stored."""
        if not self.config.context:
            return {}
        states = states.detach()
        return {
            "deter": states.deter.to(torch.float16),
            "stoch": self.rssm.latent.to_record(states.stoch),
        }

    def from_record(self, deter: Tensor, stoch: Tensor) -> State:
        """Return a stored latent as a state in float32."""
        return State(deter.float(), self.rssm.latent.from_record(stoch))

    @torch.no_grad()
    def open_loop(self, batch: Batch, context: int = 5) -> dict[str, Pictures]:
        """Return {image key: what happened, and what the model makes of it}.

        The model sees ``context`` frames, then imagines the rest under the recorded actions. It
        cannot know where an episode ends: each one that begins inside the window starts over, and
        its first ``context`` frames are seen too. An agent without a decoder has nothing to show.
        """
        assert context >= 1, context
        if self.decoder is None or not self.decoder.groups:
            return {}
        seen = _first_steps(batch.is_first, context)
        keep = (~batch.is_first).float()[..., None]
        actions = self.rssm.core.project_action(batch.prev_action * keep)
        embeds = self.rssm.posterior.project_embed(self.encoder(batch.obs))
        start = self.rssm.start()
        deter, stoch = batch.initial.deter, batch.initial.stoch.flatten(1)
        deters, stochs = [], []
        for t, look in enumerate(seen.unbind(1)):
            given = (actions[:, t], embeds[:, t], keep[:, t], start)
            found = self.rssm.observe_step(deter, stoch, *given)
            guess = self.rssm.imagine_step(deter, stoch, batch.prev_action[:, t])
            deter = torch.where(look[:, None], found[0], guess[0])
            stoch = torch.where(look[:, None], found[1], guess[1])
            deters.append(deter)
            stochs.append(stoch)
        model = self.decoder.images(torch.stack(deters, 1), torch.stack(stochs, 1))
        return {
            key: Pictures(batch.obs[key].float() / 255.0, (model[key],), seen)
            for key in sorted(model)
        }

    def policy_tensors(self) -> dict[str, Tensor]:
        """Return what acting needs, by name: a subset of ``state_dict()``."""
        prefixes = tuple(f"{name}." for name in POLICY_PARTS)
        return {k: v for k, v in self.state_dict().items() if k.startswith(prefixes)}


POLICY_PARTS = PolicyParts._fields


def _first_steps(is_first: Tensor, count: int) -> Tensor:
    """Return (B, T) bool: the first steps of the window and of every episode in it."""
    steps = torch.arange(is_first.shape[1], device=is_first.device)
    begun = torch.where(is_first, steps, 0).cummax(1).values
    return steps - begun < count


def _percentiles(name: str, x: Tensor) -> Metrics:
    low, high = ops.percentiles(x, 0.05, 0.95)
    return {f"{name}/5": low, f"{name}/95": high}


def make_agent(config: AgentConfig, obs_space: ObsSpace, action_space: ActionSpace) -> Agent:
    """Build the agent that the config names, with fresh parameters on the CPU.

    Raises:
        ValueError: unknown agent, options of another agent, or a space that it cannot take; the
            message says what fits.
    """
    found = agent_class(config.name)
    wanted = type(AGENTS[config.name].config)
    if not isinstance(config, wanted):
        raise ValueError(
            f"agent {config.name!r} takes the options of {wanted.__name__}, got "
            f"{type(config).__name__}; choose the agent by --preset"
        )
    return found(config, obs_space, action_space)


def check_agent(config: AgentConfig, obs_space: ObsSpace, action_space: ActionSpace) -> None:
    """Raise what `make_agent` would, without its memory, time or random numbers."""
    with torch.device("meta"):
        make_agent(config, obs_space, action_space)


def agent_class(name: str) -> type[Agent]:
    """Return the class of a registered agent. Raises ValueError on unknown names."""
    if name not in AGENTS:
        raise ValueError(f"unknown agent {name!r}; choose one of {', '.join(sorted(AGENTS))}")
    module, _, attribute = AGENTS[name].build.partition(":")
    found: type[Agent] = getattr(importlib.import_module(module), attribute)
    return found


def record_columns(
    config: AgentConfig, obs_space: ObsSpace, action_space: ActionSpace
) -> list[tuple[str, str, tuple[int, ...]]]:
    """Return (name, dtype, shape) of every column that a replay record of this agent has."""
    columns = [(key, *record_column(spec)) for key, spec in (obs_space | action_space).items()]
    columns += [("reward", "float32", ())]
    columns += [(name, "bool", ()) for name in ("is_first", "is_last", "is_terminal")]
    if config.context:
        # Only shapes are asked for: no memory, no initialisation, no random numbers.
        with torch.device("meta"):
            rssm = agent_class(config.name).policy_parts(config, obs_space, action_space).rssm
        columns.append(("deter", "float16", (rssm.core.deter,)))
        columns.append(("stoch", *rssm.latent.record_spec()))
    return columns
