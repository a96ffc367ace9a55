"""Encoders, decoders and latents that agents build from their configurations."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from dreamer import ops
from dreamer.config import DecoderConfig, EncoderConfig
from dreamer.conv import ConvDecoder, ConvEncoder, check_image_size
from dreamer.decoder import SQUARED_LINEAR, UNIT_NORMAL, Decoder
from dreamer.earlier import V2Config, WorldConfig
from dreamer.encoder import Encoder
from dreamer.latent import GaussianLatent, Latent, OneHotLatent
from dreamer.nets import LAYER_ELU, PLAIN_ELU, Style
from dreamer.spaces import ObsSpace
from dreamer.strided import same_decoder, same_encoder, valid_decoder, valid_encoder


def make_latent(world: WorldConfig, std: Callable[[Tensor], Tensor]) -> Latent:
    """Return categorical groups, or a Gaussian with this deviation if there are no classes."""
    if world.classes:
        return OneHotLatent(world.stoch, world.classes, world.unimix)
    return GaussianLatent(world.stoch, std)


def layer_style(config: V2Config) -> Style:
    """Return how layers of DreamerV2 are built: with a norm on Crafter, without elsewhere."""
    return LAYER_ELU if config.layer_norm else PLAIN_ELU


def centred_encoder(
    space: ObsSpace, world: WorldConfig, style: Style, images: Style | None = None
) -> Encoder:
    """Return the encoder of DreamerV1 and V2, with valid padding; vectors enter as they are.

    Convolutions are built as ``images`` says, or like all other layers.
    """

    def tower(key: str, size: int, channels: int) -> nn.Module:
        return valid_encoder(size, channels, world.depth, images or style)

    layers, units = world.vector_layers, world.vector_units
    return Encoder(space, tower, layers, units, style=style, transform=lambda x: x)


def centred_decoder(
    space: ObsSpace, world: WorldConfig, inputs: int, style: Style, images: Style | None = None
) -> Decoder:
    """Return the decoder of DreamerV1 and V2: unit normals around centred images and vectors.

    Convolutions are built as ``images`` says, or like all other layers.
    """

    def tower(key: str, size: int, channels: int) -> nn.Module:
        return valid_decoder(size, channels, inputs, world.depth, images or style)

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


def pooled_encoder(space: ObsSpace, config: EncoderConfig) -> Encoder:
    """Return the encoder of DreamerV3: convolutions with pooling, vectors in symlog."""
    depths = tuple(config.depth * mult for mult in config.mults)

    def tower(key: str, size: int, channels: int) -> nn.Module:
        check_image_size(key, size, len(depths))
        return ConvEncoder(size, channels, depths, config.kernel)

    return Encoder(space, tower, config.layers, config.units)


def pooled_decoder(space: ObsSpace, config: DecoderConfig, deter: int, stoch: int) -> Decoder:
    """Return the decoder of DreamerV3, the mirror image of its encoder."""
    depths = tuple(config.depth * mult for mult in config.mults)

    def tower(key: str, size: int, channels: int) -> nn.Module:
        check_image_size(key, size, len(depths))
        return ConvDecoder(
            size, channels, depths, config.kernel, deter, stoch, config.units, config.blocks
        )

    return Decoder(space, deter + stoch, tower, config.layers, config.units)
