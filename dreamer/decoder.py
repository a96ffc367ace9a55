"""Observation decoder and its reconstruction losses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreamer import ops
from dreamer.config import DecoderConfig
from dreamer.conv import ConvDecoder, check_image_size
from dreamer.encoder import (
    Tensors,
    image_channels,
    image_groups,
    vector_keys,
    vector_width,
)
from dreamer.nets import MLP, Linear
from dreamer.spaces import DiscreteSpec, ImageSpec, ObsSpace


class Decoder(nn.Module):
    """Reconstruct every observation key from the latent state."""

    def __init__(self, space: ObsSpace, config: DecoderConfig, deter: int, stoch: int) -> None:
        super().__init__()
        self.space, self.groups, self.vectors = space, image_groups(space), vector_keys(space)
        depths = tuple(config.depth * mult for mult in config.mults)
        self.towers = nn.ModuleDict()
        for size, keys in self.groups.items():
            check_image_size(keys[0], size, len(depths))
            channels = sum(image_channels(space, key) for key in keys)
            self.towers[str(size)] = ConvDecoder(
                size, channels, depths, config.kernel, deter, stoch, config.units, config.blocks
            )
        if self.vectors:
            self.mlp = MLP(deter + stoch, config.layers, config.units)
            # A list, because not every key can be the name of a module.
            self.outs = nn.ModuleList(
                Linear(config.units, vector_width(space, key)) for key in self.vectors
            )

    def forward(self, deter: Tensor, stoch: Tensor) -> Tensors:
        """(B, T, D), (B, T, S·K) → {key: (B, T, …)}.

        Images come as logits of their brightness, vectors in symlog space, discrete keys as logits.
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
        """Return {key: (B, T)}: squared error summed over pixels or dimensions, without a half.

        Images are compared in [0, 1], vectors in symlog space, discrete keys by cross-entropy
        (DreamerV3, Nature 2025).
        """
        return {key: self._loss(key, predicted[key], obs[key]) for key in predicted}

    def _loss(self, key: str, predicted: Tensor, target: Tensor) -> Tensor:
        spec = self.space[key]
        if isinstance(spec, ImageSpec):
            error = torch.sigmoid(predicted) - target.float() / 255.0
            return error.square().flatten(2).sum(-1)
        if isinstance(spec, DiscreteSpec):
            flat = F.cross_entropy(
                predicted.flatten(0, 1), target.long().flatten(), reduction="none"
            )
            return torch.unflatten(flat, 0, target.shape[:2])
        return (predicted - ops.symlog(target.float())).square().sum(-1)

    def images(self, deter: Tensor, stoch: Tensor) -> Tensors:
        """Return the reconstructed images in [0, 1]: {key: (B, T, h, w, c)}."""
        out = self(deter, stoch)
        return {key: torch.sigmoid(out[key]) for keys in self.groups.values() for key in keys}
