"""Observation decoder and its reconstruction losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreamer import ops
from dreamer.encoder import (
    MakeTower,
    Tensors,
    image_channels,
    image_groups,
    vector_keys,
    vector_width,
)
from dreamer.nets import MLP, RMS_SILU, Style
from dreamer.spaces import DiscreteSpec, ImageSpec, ObsSpace


class Likelihood(NamedTuple):
    """How reconstructions are compared with observations.

    Losses are element-wise, from prediction and target: images have targets in [0, 1].
    """

    image: Callable[[Tensor, Tensor], Tensor]
    vector: Callable[[Tensor, Tensor], Tensor]
    brightness: Callable[[Tensor], Tensor]
    """Image prediction → brightness in [0, 1]."""


def _small_errors_are_none(predicted: Tensor, target: Tensor) -> Tensor:
    error = (predicted - ops.symlog(target)).square()
    return torch.where(error < 1e-8, 0.0, error)


SQUARED = Likelihood(
    image=lambda predicted, target: (torch.sigmoid(predicted) - target).square(),
    vector=lambda predicted, target: (predicted - ops.symlog(target)).square(),
    brightness=torch.sigmoid,
)
"""Squared error without a half, images through a sigmoid (DreamerV3, Nature 2025)."""
SQUARED_LINEAR = Likelihood(
    image=lambda predicted, target: (predicted + 0.5 - target).square(),
    vector=_small_errors_are_none,
    brightness=lambda predicted: predicted + 0.5,
)
"""Squared error without a half, images linear around the middle (DreamerV3, January 2023)."""
UNIT_NORMAL = Likelihood(
    image=lambda predicted, target: ops.unit_normal_loss(predicted, target - 0.5),
    vector=ops.unit_normal_loss,
    brightness=lambda predicted: predicted + 0.5,
)
"""−log N(·, 1) of centred images and raw vectors (DreamerV1, DreamerV2)."""


class Decoder(nn.Module):
    """Reconstruct every observation key from the latent state."""

    def __init__(
        self,
        space: ObsSpace,
        inputs: int,
        tower: MakeTower,
        layers: int,
        units: int,
        *,
        style: Style = RMS_SILU,
        likelihood: Likelihood = SQUARED,
    ) -> None:
        """Build towers and MLP; a tower takes (n, D) and (n, Z), ``inputs`` wide together."""
        super().__init__()
        self.space, self.groups, self.vectors = space, image_groups(space), vector_keys(space)
        self.likelihood = likelihood
        self.towers = nn.ModuleDict()
        for size, keys in self.groups.items():
            channels = sum(image_channels(space, key) for key in keys)
            self.towers[str(size)] = tower(keys[0], size, channels)
        if self.vectors:
            self.mlp = MLP(inputs, layers, units, style)
            # A list, because not every key can be the name of a module.
            self.outs = nn.ModuleList(
                style.out(units, vector_width(space, key)) for key in self.vectors
            )

    def forward(self, deter: Tensor, stoch: Tensor) -> Tensors:
        """(B, T, D), (B, T, S·K) → {key: (B, T, …)}.

        Discrete keys come as logits, the others as the likelihood reads them.
        """
        lead, out = deter.shape[:2], {}
        if self.vectors:
            hidden = self.mlp(torch.cat([deter, stoch], -1))
            for key, head in zip(self.vectors, self.outs, strict=True):
                out[key] = head(hidden).float()
        for size, keys in self.groups.items():
            logits = self.towers[str(size)](deter.flatten(0, 1), stoch.flatten(0, 1)).float()
            widths = [image_channels(self.space, key) for key in keys]
            for key, part in zip(keys, logits.split(widths, -1), strict=True):
                out[key] = torch.unflatten(part, 0, lead)
        return out

    def losses(self, predicted: Tensors, obs: Tensors) -> Tensors:
        """Return {key: (B, T)}: the loss summed over pixels or dimensions.

        Discrete keys are compared by cross-entropy.
        """
        return {key: self._loss(key, predicted[key], obs[key]) for key in predicted}

    def _loss(self, key: str, predicted: Tensor, target: Tensor) -> Tensor:
        spec = self.space[key]
        if isinstance(spec, ImageSpec):
            return self.likelihood.image(predicted, target.float() / 255.0).flatten(2).sum(-1)
        if isinstance(spec, DiscreteSpec):
            flat = F.cross_entropy(
                predicted.flatten(0, 1), target.long().flatten(), reduction="none"
            )
            return torch.unflatten(flat, 0, target.shape[:2])
        return self.likelihood.vector(predicted, target.float()).sum(-1)

    def images(self, deter: Tensor, stoch: Tensor) -> Tensors:
        """Return the reconstructed images: {key: (B, T, h, w, c)}, about in [0, 1]."""
        out, brightness = self(deter, stoch), self.likelihood.brightness
        return {key: brightness(out[key]) for keys in self.groups.values() for key in keys}
