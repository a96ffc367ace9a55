"""Layers: linear, block-diagonal linear, RMS norm, MLP, and the initialiser of DreamerV3."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def trunc_normal_(weight: Tensor, fan_in: int, scale: float = 1.0) -> None:
    """Fill with a normal cut at two deviations; variance 1/fan_in after the cut (DreamerV3)."""
    std = 1.1368 * math.sqrt(1.0 / fan_in)
    with torch.no_grad():
        nn.init.trunc_normal_(weight, std=std, a=-2.0 * std, b=2.0 * std)
        weight.mul_(scale)


class Linear(nn.Linear):
    """Affine map with DreamerV3's initialiser; ``outscale`` 0 starts at zero."""

    def __init__(self, inputs: int, outputs: int, outscale: float = 1.0, fan_in: int = 0) -> None:
        self.outscale, self.fan_in = outscale, fan_in or inputs
        super().__init__(inputs, outputs)

    def reset_parameters(self) -> None:
        trunc_normal_(self.weight, self.fan_in, self.outscale)
        nn.init.zeros_(self.bias)


class BlockLinear(nn.Module):
    """Block-diagonal affine map: (…, inputs) → (…, outputs), ``blocks`` equal blocks.

    The initialiser counts the full input width as fan-in, as the official code does.
    """

    def __init__(self, inputs: int, outputs: int, blocks: int, fan_in: int = 0) -> None:
        super().__init__()
        assert inputs % blocks == 0 and outputs % blocks == 0, (inputs, outputs, blocks)
        self.blocks = blocks
        self.weight = nn.Parameter(torch.empty(blocks, inputs // blocks, outputs // blocks))
        self.bias = nn.Parameter(torch.zeros(outputs))
        trunc_normal_(self.weight, fan_in or inputs)

    def forward(self, x: Tensor) -> Tensor:
        lead = x.shape[:-1]
        grouped = x.reshape(-1, self.blocks, self.weight.shape[1]).transpose(0, 1)
        bias = self.bias.reshape(self.blocks, 1, -1)
        out = torch.baddbmm(bias, grouped, self.weight)  # (g, N, out/g)
        return out.transpose(0, 1).reshape(*lead, -1)


class RMSNorm(nn.Module):
    """x / sqrt(mean x² + eps) · scale over the last axis, computed in float32 (eps 1e-4)."""

    def __init__(self, size: int, eps: float = 1e-4) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.weight, self.eps).to(x.dtype)


class Dense(nn.Module):
    """Linear → RMS norm → SiLU."""

    def __init__(self, inputs: int, units: int) -> None:
        super().__init__()
        self.linear = Linear(inputs, units)
        self.norm = RMSNorm(units)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.norm(self.linear(x)))


class MLP(nn.Sequential):
    """``layers`` times `Dense`: (…, inputs) → (…, units)."""

    def __init__(self, inputs: int, layers: int, units: int) -> None:
        super().__init__(*(Dense(inputs if i == 0 else units, units) for i in range(layers)))
