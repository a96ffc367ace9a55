"""Policies over any mix of discrete and continuous actions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dreamer import ops
from dreamer.config import ActorNetConfig
from dreamer.nets import MLP, Linear
from dreamer.spaces import (
    ActionSpace,
    ActionSpec,
    BoxAction,
    DiscreteAction,
    MultiBinaryAction,
    MultiDiscreteAction,
)

Actions = dict[str, Tensor]


def discrete_classes(spec: ActionSpec) -> tuple[int, ...]:
    """Return the number of choices of each discrete part; empty for a continuous action."""
    if isinstance(spec, DiscreteAction):
        return (spec.classes,)
    if isinstance(spec, MultiDiscreteAction):
        return spec.classes
    if isinstance(spec, MultiBinaryAction):
        return (2,) * spec.size
    return ()


class ActionCodec:
    """Between actions as they are stored and the flat vector that the recurrent core reads.

    The flat vector concatenates, over sorted keys, one-hots of the discrete parts and the raw
    values of the continuous ones.
    """

    def __init__(self, space: ActionSpace) -> None:
        if not space:
            raise ValueError("the action space is empty; an agent needs at least one action")
        self.space = {key: space[key] for key in sorted(space)}
        self.size = sum(
            spec.size if isinstance(spec, BoxAction) else sum(discrete_classes(spec))
            for spec in self.space.values()
        )

    def flatten(self, actions: Actions) -> Tensor:
        """Record form {key: (…)} or {key: (…, n)} → (…, A) float32."""
        parts = []
        for key, spec in self.space.items():
            value = actions[key]
            if isinstance(spec, BoxAction):
                parts.append(value.float())
            elif isinstance(spec, DiscreteAction):
                parts.append(ops.onehot(value, spec.classes))
            else:
                for i, classes in enumerate(discrete_classes(spec)):
                    parts.append(ops.onehot(value[..., i], classes))
        return torch.cat(parts, -1)

    def record(self, flat: Tensor) -> Actions:
        """(…, A) → record form: int32 indices for discrete parts, float32 for continuous ones."""
        actions, start = {}, 0
        for key, spec in self.space.items():
            if isinstance(spec, BoxAction):
                actions[key] = flat[..., start : start + spec.size]
                start += spec.size
                continue
            indices = []
            for classes in discrete_classes(spec):
                indices.append(flat[..., start : start + classes].argmax(-1).to(torch.int32))
                start += classes
            single = isinstance(spec, DiscreteAction)
            actions[key] = indices[0] if single else torch.stack(indices, -1)
        return actions


class ActionDist:
    """A policy's distribution over flat actions: independent parts, each over its own slice."""

    def __init__(self, parts: list[Categorical | BoundedNormal]) -> None:
        self.parts = parts

    def sample(self) -> Tensor:
        """Draw flat actions (…, A), without gradient."""
        return torch.cat([part.sample() for part in self.parts], -1)

    def mode(self) -> Tensor:
        """Return the most likely flat action (…, A)."""
        return torch.cat([part.mode() for part in self.parts], -1)

    def log_prob(self, flat: Tensor) -> Tensor:
        """Return log π(a) summed over the parts: (…, A) → (…)."""
        slices = torch.split(flat, [part.size for part in self.parts], -1)
        terms = [part.log_prob(x) for part, x in zip(self.parts, slices, strict=True)]
        return torch.stack(terms).sum(0)

    def entropy(self) -> Tensor:
        """Return the entropy in nats summed over the parts, (…)."""
        return torch.stack([part.entropy() for part in self.parts]).sum(0)


class Categorical:
    """One-hot categorical with a uniform mix, from logits (…, K)."""

    def __init__(self, logits: Tensor, unimix: float) -> None:
        self.log_p = ops.log_unimix(logits, unimix)
        self.size = logits.shape[-1]

    def sample(self) -> Tensor:
        """Draw (…, K) one-hot."""
        return ops.sample_onehot(self.log_p.exp())

    def mode(self) -> Tensor:
        """Return (…, K) one-hot of the most likely choice."""
        return ops.onehot(self.log_p.argmax(-1), self.size)

    def log_prob(self, onehot: Tensor) -> Tensor:
        """(…, K) → (…)."""
        return (self.log_p * onehot).sum(-1)

    def entropy(self) -> Tensor:
        """Return nats, (…)."""
        return -(self.log_p.exp() * self.log_p).sum(-1)


class BoundedNormal:
    """N(tanh m, (hi−lo)·sigmoid(s+2)+lo): not squashed; the environment clips (DreamerV3)."""

    def __init__(self, mean: Tensor, std: Tensor, min_std: float, max_std: float) -> None:
        self.mean = torch.tanh(mean)
        self.std = (max_std - min_std) * torch.sigmoid(std + 2.0) + min_std
        self.size = mean.shape[-1]

    def sample(self) -> Tensor:
        """Draw (…, d), unclipped, without gradient."""
        with torch.no_grad():
            return self.mean + self.std * torch.randn_like(self.mean)

    def mode(self) -> Tensor:
        """Return the mean (…, d)."""
        return self.mean

    def log_prob(self, action: Tensor) -> Tensor:
        """(…, d) → (…)."""
        return ops.normal_log_prob(action, self.mean, self.std)

    def entropy(self) -> Tensor:
        """Return nats, (…)."""
        return ops.normal_entropy(self.std)


class Actor(nn.Module):
    """MLP policy: feature (…, F) → `ActionDist`."""

    def __init__(self, inputs: int, space: ActionSpace, config: ActorNetConfig) -> None:
        super().__init__()
        self.codec, self.config = ActionCodec(space), config
        self.mlp = MLP(inputs, config.layers, config.units)
        outputs = sum(sum(self._widths(spec)) for spec in self.codec.space.values())
        self.out = Linear(config.units, outputs, config.outscale)

    @staticmethod
    def _widths(spec: ActionSpec) -> tuple[int, ...]:
        return (spec.size, spec.size) if isinstance(spec, BoxAction) else discrete_classes(spec)

    def forward(self, feature: Tensor) -> ActionDist:
        outputs = self.out(self.mlp(feature)).float()
        parts: list[Categorical | BoundedNormal] = []
        start = 0
        for spec in self.codec.space.values():
            widths = self._widths(spec)
            pieces = outputs[..., start : start + sum(widths)].split(widths, -1)
            start += sum(widths)
            if isinstance(spec, BoxAction):
                mean, std = pieces
                parts.append(BoundedNormal(mean, std, self.config.min_std, self.config.max_std))
            else:
                parts.extend(Categorical(piece, self.config.unimix) for piece in pieces)
        return ActionDist(parts)
