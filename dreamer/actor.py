"""Policies over any mix of discrete and continuous actions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dreamer import ops
from dreamer.dists import ActionDist, Categorical, Part
from dreamer.loop import Inside
from dreamer.nets import MLP, RMS_SILU, Style
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
        self.continuous = all(isinstance(spec, BoxAction) for spec in self.space.values())

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


Continuous = Callable[[Tensor, Tensor], Part]
"""Distribution from what the network gives for the mean and the deviation, (…, d) each."""


class Actor(nn.Module):
    """MLP policy: feature (…, F) → `ActionDist`."""

    def __init__(
        self,
        inputs: int,
        space: ActionSpace,
        *,
        layers: int,
        units: int,
        continuous: Continuous,
        outscale: float = 1.0,
        unimix: float = 0.0,
        style: Style = RMS_SILU,
    ) -> None:
        super().__init__()
        self.codec, self.unimix = ActionCodec(space), unimix
        self._continuous = continuous
        self.mlp = MLP(inputs, layers, units, style)
        outputs = sum(sum(self._widths(spec)) for spec in self.codec.space.values())
        self.out = style.out(units, outputs, outscale)

    @staticmethod
    def _widths(spec: ActionSpec) -> tuple[int, ...]:
        return (spec.size, spec.size) if isinstance(spec, BoxAction) else discrete_classes(spec)

    def forward(self, feature: Tensor, loop: Inside | None = None) -> ActionDist:
        outputs = self.out(self.mlp(feature, loop), loop).float()
        parts: list[Part] = []
        start = 0
        for spec in self.codec.space.values():
            widths = self._widths(spec)
            pieces = outputs[..., start : start + sum(widths)].split(widths, -1)
            start += sum(widths)
            if isinstance(spec, BoxAction):
                parts.append(self._continuous(*pieces))
            else:
                parts.extend(Categorical(piece, self.unimix) for piece in pieces)
        return ActionDist(parts)
