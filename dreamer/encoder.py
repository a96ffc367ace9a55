"""Observation encoder: any number of images, vectors and discrete scalars → one embedding."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dreamer import ops
from dreamer.nets import MLP, RMS_SILU, Style
from dreamer.spaces import DiscreteSpec, ImageSpec, ObsSpace, VectorSpec, check_observation_names

Tensors = dict[str, Tensor]
MakeTower = Callable[[str, int, int], nn.Module]
"""(first key, side, channels) → a tower that embeds images, (n, s, s, c) → (n, ``outputs``)."""


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
    """Embed observations: {key: (B, T, …)} → (B, T, E).

    Images enter a tower for their size, centred in [−0.5, 0.5]; vectors, after ``transform``, and
    one-hots of discrete scalars enter one MLP.
    """

    def __init__(
        self,
        space: ObsSpace,
        tower: MakeTower,
        layers: int,
        units: int,
        *,
        style: Style = RMS_SILU,
        transform: Callable[[Tensor], Tensor] = ops.symlog,
    ) -> None:
        super().__init__()
        if not space:
            raise ValueError("the observation space is empty; an agent needs at least one key")
        check_observation_names(space)
        self.space, self.groups, self.vectors = space, image_groups(space), vector_keys(space)
        self.transform = transform
        self.towers = nn.ModuleDict()
        self.outputs = 0
        for size, keys in self.groups.items():
            made = tower(keys[0], size, sum(image_channels(space, key) for key in keys))
            self.towers[str(size)] = made
            self.outputs += int(made.outputs)  # type: ignore[arg-type]
        if self.vectors:
            inputs = sum(vector_width(space, key) for key in self.vectors)
            self.mlp = MLP(inputs, layers, units, style)
            self.outputs += units

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
        return self.transform(value.float())
