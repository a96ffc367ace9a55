"""Convolutional towers with stride 2: valid padding (V1, V2, Pro) and same padding (V3 of 2023).

Images travel as (n, h, w, c), as in ``conv.py``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreamer.nets import Initialiser, Linear, Style

ENCODER_KERNEL = 4
DECODER_KERNELS = (5, 5, 6, 6)
"""Kernels that take one pixel to 5, 13, 30 and 64."""
VALID_SIDE = 64
"""The only image side that the valid-padded towers fit."""
SMALLEST = 4
"""Side of the innermost image of the same-padded towers."""


class StridedConv(nn.Module):
    """Convolution of stride 2, or its transpose: (n, h, w, inputs) → (n, h', w', outputs)."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        init: Initialiser,
        *,
        padding: int = 0,
        transpose: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__()
        shape = (inputs, outputs) if transpose else (outputs, inputs)
        self.weight = nn.Parameter(torch.empty(*shape, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self._convolve = F.conv_transpose2d if transpose else F.conv2d
        self._padding = padding
        with torch.no_grad():
            init(self.weight, inputs * kernel**2, outputs * kernel**2)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.contiguous(memory_format=torch.channels_last)
        x = x.permute(0, 3, 1, 2)
        return self._convolve(x, weight, self.bias, stride=2, padding=self._padding).permute(
            0, 2, 3, 1
        )


class StridedEncoder(nn.Module):
    """Halving convolutions with norm and activation: (n, s, s, c) → (n, outputs)."""

    def __init__(
        self, size: int, channels: int, depths: tuple[int, ...], style: Style, padding: int
    ) -> None:
        super().__init__()
        widths = (channels, *depths)
        self.act = style.act
        self.convs = nn.ModuleList(
            StridedConv(a, b, ENCODER_KERNEL, style.hidden_init, padding=padding, bias=style.bias)
            for a, b in zip(widths[:-1], depths, strict=True)
        )
        self.norms = nn.ModuleList(style.norm(depth) for depth in depths)
        for _ in depths:
            size = (size + 2 * padding - ENCODER_KERNEL) // 2 + 1
        self.outputs = size**2 * depths[-1]

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = self.act(norm(conv(x)))
        return x.reshape(x.shape[0], -1)


class StridedDecoder(nn.Module):
    """Linear stem, then doubling convolutions: → (n, s, s, c), the last one without norm."""

    def __init__(
        self,
        inputs: int,
        side: int,
        widths: tuple[int, ...],
        kernels: tuple[int, ...],
        style: Style,
        padding: int,
    ) -> None:
        """Build the tower; ``widths`` are the channels from the stem to the image."""
        super().__init__()
        self.shape, self.act = (side, side, widths[0]), style.act
        self.stem = Linear(inputs, side**2 * widths[0], init=style.hidden_init)
        last = len(kernels) - 1
        self.convs = nn.ModuleList(
            StridedConv(
                a,
                b,
                kernel,
                style.hidden_init,
                padding=padding,
                transpose=True,
                bias=style.bias or i == last,
            )
            for i, (a, b, kernel) in enumerate(zip(widths[:-1], widths[1:], kernels, strict=True))
        )
        self.norms = nn.ModuleList(style.norm(width) for width in widths[1:-1])

    def forward(self, deter: Tensor, stoch: Tensor) -> Tensor:
        """(n, D), (n, Z) → (n, s, s, c)."""
        x = self.stem(torch.cat([deter, stoch], -1)).unflatten(-1, self.shape)
        for conv, norm in zip(self.convs[:-1], self.norms, strict=True):
            x = self.act(norm(conv(x)))
        image: Tensor = self.convs[-1](x)
        return image


def valid_encoder(size: int, channels: int, depth: int, style: Style) -> StridedEncoder:
    """Return the encoder of DreamerV1 and V2: 64 → 31 → 14 → 6 → 2, channels d, 2d, 4d, 8d."""
    _require_side(size)
    return StridedEncoder(size, channels, (depth, 2 * depth, 4 * depth, 8 * depth), style, 0)


def valid_decoder(
    size: int, channels: int, inputs: int, depth: int, style: Style
) -> StridedDecoder:
    """Return the decoder of DreamerV1 and V2: 1 → 5 → 13 → 30 → 64 from 32d features."""
    _require_side(size)
    widths = (32 * depth, 4 * depth, 2 * depth, depth, channels)
    return StridedDecoder(inputs, 1, widths, DECODER_KERNELS, style, 0)


def same_encoder(size: int, channels: int, depth: int, style: Style) -> StridedEncoder:
    """Return the encoder of DreamerV3 (2023): halved down to 4×4, channels doubling from d."""
    depths = tuple(depth * 2**i for i in range(_stages(size)))
    return StridedEncoder(size, channels, depths, style, 1)


def same_decoder(size: int, channels: int, inputs: int, depth: int, style: Style) -> StridedDecoder:
    """Return the decoder of DreamerV3 (2023), its encoder's mirror image."""
    stages = _stages(size)
    widths = tuple(depth * 2**i for i in reversed(range(stages)))
    kernels = (ENCODER_KERNEL,) * stages
    return StridedDecoder(inputs, SMALLEST, (*widths, channels), kernels, style, 1)


def _stages(size: int) -> int:
    stages = (size // SMALLEST).bit_length() - 1
    if stages < 1 or SMALLEST * 2**stages != size:
        raise ValueError(
            f"this agent halves images down to {SMALLEST}×{SMALLEST}, so their side must be "
            f"{SMALLEST} times a power of two, got {size}; use --environment.image-size 64"
        )
    return stages


def _require_side(size: int) -> None:
    if size != VALID_SIDE:
        raise ValueError(
            f"this agent's convolutions fit images of {VALID_SIDE}×{VALID_SIDE}, got "
            f"{size}×{size}; use --environment.image-size {VALID_SIDE}"
        )
