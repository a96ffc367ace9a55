"""Observation encoder: any number of images, vectors and discrete scalars → one embedding."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dreamer import ops
from dreamer.config import EncoderConfig
from dreamer.conv import ConvEncoder, check_image_size
from dreamer.nets import MLP
from dreamer.spaces import DiscreteSpec, ImageSpec, ObsSpace, VectorSpec, check_observation_names

Tensors = dict[str, Tensor]


def image_groups(space: ObsSpace) -> dict[int, list[str]]:
    """Return the image keys by size: images of one size share a tower, stacked over channels."""
    groups: dict[int, list[str]] = {}
    for key in sorted(space):
        spec = space[key]
        if isinstance(spec, ImageSpec):
            groups.setdefault(spec.shape[0], []).append(key)
    return groups


def image_channels(space: ObsSpace, key: str) -> int:
    """Return the channels of an image key."""
    spec = space[key]
    assert isinstance(spec, ImageSpec), spec
    return spec.shape[2]


def vector_keys(space: ObsSpace) -> list[str]:
    """Return the sorted keys that the MLPs handle: vectors and discrete scalars."""
    return [key for key in sorted(space) if isinstance(space[key], VectorSpec | DiscreteSpec)]


def vector_width(space: ObsSpace, key: str) -> int:
    """Return the dimensions of a vector key, or the classes of a discrete one."""
    spec = space[key]
    if isinstance(spec, DiscreteSpec):
        return spec.classes
    assert isinstance(spec, VectorSpec), spec
    return spec.shape[0]


class Encoder(nn.Module):
    """Embed observations: {key: (B, T, …)} → (B, T, E)."""

    def __init__(self, space: ObsSpace, config: EncoderConfig) -> None:
        super().__init__()
        if not space:
            raise ValueError("the observation space is empty; an agent needs at least one key")
        check_observation_names(space)
        self.space, self.groups, self.vectors = space, image_groups(space), vector_keys(space)
        depths = tuple(config.depth * mult for mult in config.mults)
        self.towers = nn.ModuleDict()
        self.outputs = 0
        for size, keys in self.groups.items():
            check_image_size(keys[0], size, len(depths))
            channels = sum(image_channels(space, key) for key in keys)
            tower = ConvEncoder(size, channels, depths, config.kernel)
            self.towers[str(size)] = tower
            self.outputs += tower.outputs
        if self.vectors:
            inputs = sum(vector_width(space, key) for key in self.vectors)
            self.mlp = MLP(inputs, config.layers, config.units)
            self.outputs += config.units

    def forward(self, obs: Tensors) -> Tensor:
        parts, lead = [], next(iter(obs.values())).shape[:2]
        if self.vectors:
            parts.append(
                self.mlp(torch.cat([self._vector(key, obs[key]) for key in self.vectors], -1))
            )
        for size, keys in self.groups.items():
            images = [obs[key].flatten(0, 1) for key in keys]
            pixels = images[0] if len(images) == 1 else torch.cat(images, -1)
            embed = self.towers[str(size)](pixels.float() / 255.0 - 0.5)
            parts.append(embed.reshape(*lead, -1))
        return torch.cat(parts, -1)

    def _vector(self, key: str, value: Tensor) -> Tensor:
        spec = self.space[key]
        if isinstance(spec, DiscreteSpec):
            return ops.onehot(value, spec.classes)
        return ops.symlog(value.float())
