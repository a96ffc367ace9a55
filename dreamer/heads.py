"""Scalar heads: two-hot or Gaussian regression of reward and value, Bernoulli continuation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dreamer import ops
from dreamer.nets import MLP, RMS_SILU, Style


class TwoHot:
    """Distribution over symexp-spaced bins, from logits (…, bins) in float32."""

    def __init__(self, logits: Tensor, bins: Tensor) -> None:
        self.logits, self.bins = logits, bins

    def mean(self) -> Tensor:
        """Return the expectation in raw space, (…)."""
        return ops.twohot_mean(self.logits, self.bins)

    def loss(self, target: Tensor) -> Tensor:
        """Return the cross-entropy with the two-hot encoding of ``target`` (…)."""
        return ops.twohot_loss(self.logits, target, self.bins)

    def mixed_loss(self, targets: Tensor, weights: tuple[float, ...]) -> Tensor:
        """Return the weighted sum of the losses of several targets (…, M)."""
        return ops.twohot_mixed_loss(self.logits, targets, weights, self.bins)

    def without_last(self) -> TwoHot:
        """Drop the last entry of axis 1, the state that only bootstraps."""
        return TwoHot(self.logits[:, :-1], self.bins)


class SymlogTwoHot(TwoHot):
    """Distribution over bins spaced evenly in symlog space (DreamerV3, January 2023)."""

    def mean(self) -> Tensor:
        """Return symexp of the expectation in symlog space, (…)."""
        return ops.symexp(ops.twohot_mean(self.logits, self.bins))

    def loss(self, target: Tensor) -> Tensor:
        """Return the cross-entropy with the two-hot encoding of symlog(target) (…)."""
        return ops.twohot_loss(self.logits, ops.symlog(target), self.bins)

    def mixed_loss(self, targets: Tensor, weights: tuple[float, ...]) -> Tensor:
        """Return the weighted sum of the losses of several targets (…, M)."""
        return ops.twohot_mixed_loss(self.logits, ops.symlog(targets), weights, self.bins)

    def without_last(self) -> SymlogTwoHot:
        """Drop the last entry of axis 1, the state that only bootstraps."""
        return SymlogTwoHot(self.logits[:, :-1], self.bins)


class TwoHotHead(nn.Module):
    """MLP with a two-hot output: feature (…, F) → `TwoHot`."""

    bins: Tensor

    def __init__(self, inputs: int, layers: int, units: int, outscale: float, bins: int) -> None:
        super().__init__()
        self.mlp = MLP(inputs, layers, units)
        self.out = RMS_SILU.out(units, bins, outscale)
        self.register_buffer("bins", ops.symexp_bins(bins), persistent=False)

    def forward(self, feature: Tensor) -> TwoHot:
        return TwoHot(self.out(self.mlp(feature)).float(), self.bins)


class SymlogTwoHotHead(nn.Module):
    """MLP with a two-hot output in symlog space: feature (…, F) → `SymlogTwoHot`."""

    bins: Tensor

    def __init__(
        self, inputs: int, layers: int, units: int, outscale: float, bins: int, style: Style
    ) -> None:
        super().__init__()
        self.mlp = MLP(inputs, layers, units, style)
        self.out = style.out(units, bins, outscale)
        self.register_buffer("bins", ops.symlog_bins(bins), persistent=False)

    def forward(self, feature: Tensor) -> SymlogTwoHot:
        return SymlogTwoHot(self.out(self.mlp(feature)).float(), self.bins)


class Gauss:
    """N(mean, 1) over a scalar, from means (…) in float32."""

    def __init__(self, value: Tensor) -> None:
        self._value = value

    def mean(self) -> Tensor:
        """Return the mean, (…)."""
        return self._value

    def loss(self, target: Tensor) -> Tensor:
        """Return −log N(target; mean, 1), (…): half the squared error and a constant."""
        return ops.unit_normal_loss(self._value, target)


class GaussHead(nn.Module):
    """MLP with one mean: feature (…, F) → `Gauss`."""

    def __init__(self, inputs: int, layers: int, units: int, style: Style) -> None:
        super().__init__()
        self.mlp = MLP(inputs, layers, units, style)
        self.out = style.out(units, 1)

    def forward(self, feature: Tensor) -> Gauss:
        return Gauss(self.out(self.mlp(feature)).float().squeeze(-1))


class Bernoulli:
    """Probability that the episode goes on, from logits (…) in float32."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    def mean(self) -> Tensor:
        """Return the probability, (…)."""
        return torch.sigmoid(self.logits)

    def loss(self, target: Tensor) -> Tensor:
        """Return the cross-entropy with a soft ``target`` (…) in [0, 1]."""
        return ops.bernoulli_loss(self.logits, target)


class BernoulliHead(nn.Module):
    """MLP with one logit: feature (…, F) → `Bernoulli`."""

    def __init__(
        self,
        inputs: int,
        layers: int,
        units: int,
        outscale: float = 1.0,
        style: Style = RMS_SILU,
    ) -> None:
        super().__init__()
        self.mlp = MLP(inputs, layers, units, style)
        self.out = style.out(units, 1, outscale)

    def forward(self, feature: Tensor) -> Bernoulli:
        return Bernoulli(self.out(self.mlp(feature)).float().squeeze(-1))
