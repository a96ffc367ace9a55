"""What the agents before 2025 build alike from a `WorldConfig`."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from dreamer import ops
from dreamer.decoder import SQUARED_LINEAR, UNIT_NORMAL, Decoder
from dreamer.earlier import WorldConfig
from dreamer.encoder import Encoder
from dreamer.latent import GaussianLatent, Latent, OneHotLatent
from dreamer.nets import Style
from dreamer.spaces import ObsSpace
from dreamer.strided import same_decoder, same_encoder, valid_decoder, valid_encoder


def make_latent(world: WorldConfig, std: Callable[[Tensor], Tensor]) -> Latent:
    """Return categorical groups, or a Gaussian with this deviation if there are no classes."""
    if world.classes:
        return OneHotLatent(world.stoch, world.classes, world.unimix)
    return GaussianLatent(world.stoch, std)


def centred_encoder(space: ObsSpace, world: WorldConfig, style: Style) -> Encoder:
    """Return the encoder of DreamerV1 and V2, with valid padding; vectors enter as they are."""

    def tower(key: str, size: int, channels: int) -> nn.Module:
        return valid_encoder(size, channels, world.depth, style)

    layers, units = world.vector_layers, world.vector_units
    return Encoder(space, tower, layers, units, style=style, transform=lambda x: x)


def centred_decoder(space: ObsSpace, world: WorldConfig, inputs: int, style: Style) -> Decoder:
    """Return the decoder of DreamerV1 and V2: unit normals around centred images and vectors."""

    def tower(key: str, size: int, channels: int) -> nn.Module:
        return valid_decoder(size, channels, inputs, world.depth, style)

    layers, units = world.vector_layers, world.vector_units
    return Decoder(space, inputs, tower, layers, units, style=style, likelihood=UNIT_NORMAL)


def symlog_encoder(space: ObsSpace, world: WorldConfig, style: Style) -> Encoder:
    """Return the encoder of DreamerV3 of 2023, with same padding; vectors enter in symlog."""

    def tower(key: str, size: int, channels: int) -> nn.Module:
        return same_encoder(size, channels, world.depth, style)

    layers, units = world.vector_layers, world.vector_units
    return Encoder(space, tower, layers, units, style=style, transform=ops.symlog)


def symlog_decoder(space: ObsSpace, world: WorldConfig, inputs: int, style: Style) -> Decoder:
    """Return the decoder of DreamerV3 of 2023: squared errors, vectors in symlog."""

    def tower(key: str, size: int, channels: int) -> nn.Module:
        return same_decoder(size, channels, inputs, world.depth, style)

    layers, units = world.vector_layers, world.vector_units
    return Decoder(space, inputs, tower, layers, units, style=style, likelihood=SQUARED_LINEAR)
