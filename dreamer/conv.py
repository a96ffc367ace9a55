"""Convolutional towers of DreamerV3 (Nature 2025): halving encoder and doubling decoder.

Images travel as (n, h, w, c) contiguous tensors: that is PyTorch's channels-last layout seen from
outside, so the permutes around each convolution are free and the norms read contiguous channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreamer import ops
from dreamer.nets import MLP, BlockLinear, Linear, RMSNorm, trunc_normal_


class Conv(nn.Module):
    """Same-padded stride-1 convolution kernel and bias with DreamerV3's initialiser."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(outputs))
        trunc_normal_(self.weight, inputs * kernel * kernel)

    def forward(self, x: Tensor) -> Tensor:
        """(n, h, w, inputs) → (n, h, w, outputs)."""
        weight = self.weight.contiguous(memory_format=torch.channels_last)
        out = F.conv2d(x.permute(0, 3, 1, 2), weight, self.bias, padding=self.weight.shape[-1] // 2)
        return out.permute(0, 2, 3, 1)


class UpsampleConv(Conv):
    """Nearest ×2 upsampling followed by the convolution, without building the large image."""

    def forward(self, x: Tensor) -> Tensor:
        """(n, h, w, inputs) → (n, 2h, 2w, outputs)."""
        return upsample_conv(x, self.weight, self.bias)


def phase_matrix(kernel: int, device: torch.device | None = None) -> Tensor:
    """Return (2, taps, kernel): which small-image tap each kernel tap reads, per output parity.

    After nearest ×2 upsampling, output row 2i+a reads large rows 2i+a+k−r, that is small rows
    i + ⌊(a+k−r)/2⌋; kernel taps that read the same small row add up. Computed on the device: a
    copy from the host would stop a CUDA graph from being captured.
    """
    radius = kernel // 2
    reach = (radius + 1) // 2
    parity, tap = torch.arange(2, device=device)[:, None], torch.arange(kernel, device=device)
    read = (parity + tap - radius) // 2 + reach  # (2, kernel)
    return ops.onehot(read, 2 * reach + 1).transpose(1, 2)


def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return conv(nearest_x2(x)) with same padding, exactly, at the small image's resolution.

    A 5×5 kernel on a doubled image reads only 3×3 different pixels, so four 3×3 kernels, one per
    output parity, compute the same sums with 9 instead of 25 products per output.

    Args:
        x: (n, h, w, inputs) float.
        weight: (outputs, inputs, k, k) with k odd.
        bias: (outputs,).
    """
    outputs, inputs, kernel, _ = weight.shape
    phases = phase_matrix(kernel, weight.device).to(weight.dtype)
    taps = phases.shape[1]
    small = torch.einsum("puk,oikl,qvl->pqoiuv", phases, weight, phases)
    small = small.reshape(4 * outputs, inputs, taps, taps)
    small = small.contiguous(memory_format=torch.channels_last)
    out = F.conv2d(x.permute(0, 3, 1, 2), small, bias.repeat(4), padding=taps // 2)
    n, h, w = x.shape[:3]
    out = out.permute(0, 2, 3, 1).reshape(n, h, w, 2, 2, outputs)
    return out.permute(0, 1, 3, 2, 4, 5).reshape(n, 2 * h, 2 * w, outputs)


class ConvEncoder(nn.Module):
    """Convolution → 2×2 max-pool → norm → SiLU per stage: (n, s, s, c) → (n, outputs)."""

    def __init__(self, size: int, channels: int, depths: tuple[int, ...], kernel: int) -> None:
        super().__init__()
        widths = (channels, *depths)
        self.convs = nn.ModuleList(
            Conv(a, b, kernel) for a, b in zip(widths[:-1], widths[1:], strict=True)
        )
        self.norms = nn.ModuleList(RMSNorm(depth) for depth in depths)
        self.outputs = (size // 2 ** len(depths)) ** 2 * depths[-1]

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.max_pool2d(conv(x).permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
            x = F.silu(norm(x))
        return x.reshape(x.shape[0], -1)


class ConvDecoder(nn.Module):
    """Spatial stem from the latent state, then doubling stages: → logits (n, s, s, c)."""

    def __init__(
        self,
        size: int,
        channels: int,
        depths: tuple[int, ...],
        kernel: int,
        deter: int,
        stoch: int,
        units: int,
        blocks: int,
    ) -> None:
        super().__init__()
        self.side, self.width, self.blocks = size // 2 ** len(depths), depths[-1], blocks
        pixels = self.side**2 * self.width
        self.from_deter = BlockLinear(deter, pixels, blocks)
        self.stoch_mlp = MLP(stoch, 1, 2 * units)
        self.from_stoch = Linear(2 * units, pixels)
        self.stem_norm = RMSNorm(self.width)
        widths = tuple(reversed(depths))
        self.convs = nn.ModuleList(
            UpsampleConv(a, b, kernel) for a, b in zip(widths, (*widths[1:], channels), strict=True)
        )
        self.norms = nn.ModuleList(RMSNorm(width) for width in widths[1:])

    def forward(self, deter: Tensor, stoch: Tensor) -> Tensor:
        """(n, D), (n, S·K) → logits (n, s, s, c)."""
        n, side = deter.shape[0], self.side
        # Each block supplies width/blocks channels of every pixel.
        spread = self.from_deter(deter).reshape(n, self.blocks, side * side, -1)
        spread = spread.transpose(1, 2).reshape(n, side, side, self.width)
        flat = self.from_stoch(self.stoch_mlp(stoch)).reshape(n, side, side, self.width)
        x = F.silu(self.stem_norm(spread + flat))
        for conv, norm in zip(self.convs[:-1], self.norms, strict=True):
            x = F.silu(norm(conv(x)))
        logits: Tensor = self.convs[-1](x)
        return logits


def check_image_size(key: str, size: int, stages: int) -> None:
    """Raise ValueError unless the image halves cleanly through every stage."""
    unit = 2**stages
    if size % unit:
        down, up = max(unit, size // unit * unit), (size // unit + 1) * unit
        raise ValueError(
            f"image {key!r} is {size}×{size}, but {stages} halving stages need a multiple of "
            f"{unit} (the published sizes are 64 and 96); use --environment.image-size {down} "
            f"or {up}"
        )
