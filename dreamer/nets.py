"""Layers: linear, block-diagonal linear, norms, MLP, and each paper's way to initialise them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Initialiser = Callable[[Tensor, int, int], None]
"""Fills a weight in place from its fan-in and fan-out."""


def trunc_normal_(weight: Tensor, fan_in: int, scale: float = 1.0) -> None:
    """Fill with a normal cut at two deviations; variance 1/fan_in after the cut (DreamerV3)."""
    std = 1.1368 * math.sqrt(1.0 / fan_in)
    with torch.no_grad():
        nn.init.trunc_normal_(weight, std=std, a=-2.0 * std, b=2.0 * std)
        weight.mul_(scale)


def fan_in_normal_(weight: Tensor, fan_in: int, fan_out: int) -> None:
    """Fill as DreamerV3 (Nature 2025): a cut normal by fan-in alone."""
    trunc_normal_(weight, fan_in)


def fan_average_normal_(weight: Tensor, fan_in: int, fan_out: int) -> None:
    """Fill as hidden layers of DreamerV3 (January 2023): a cut normal by the mean of both fans."""
    std = math.sqrt(2.0 / (fan_in + fan_out)) / 0.87962566103423978
    nn.init.trunc_normal_(weight, std=std, a=-2.0 * std, b=2.0 * std)


def glorot_uniform_(weight: Tensor, fan_in: int, fan_out: int) -> None:
    """Fill uniformly with variance 1 / mean fan (Keras' default; V3's output layers of 2023)."""
    limit = math.sqrt(6.0 / (fan_in + fan_out))
    nn.init.uniform_(weight, -limit, limit)


class Linear(nn.Linear):
    """Affine map; ``outscale`` multiplies what the initialiser draws, 0 starts at zero."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        outscale: float = 1.0,
        fan_in: int = 0,
        *,
        init: Initialiser = fan_in_normal_,
        bias: bool = True,
    ) -> None:
        self.outscale, self.fan_in, self.init = outscale, fan_in or inputs, init
        super().__init__(inputs, outputs, bias)

    def reset_parameters(self) -> None:
        self.init(self.weight, self.fan_in, self.out_features)
        with torch.no_grad():
            self.weight.mul_(self.outscale)
        if self.bias is not None:
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


class LayerNorm(nn.LayerNorm):
    """Layer norm over the last axis, computed in float32 with Keras' eps 1e-3."""

    def __init__(self, size: int) -> None:
        super().__init__(size, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).to(x.dtype)


class Style(NamedTuple):
    """How a paper builds its layers: linear → norm → activation, and how weights start."""

    norm: Callable[[int], nn.Module]
    act: Callable[[Tensor], Tensor]
    bias: bool
    """Whether linear maps before a norm have a bias."""
    hidden_init: Initialiser
    output_init: Initialiser

    def out(self, inputs: int, outputs: int, outscale: float = 1.0) -> Linear:
        """Return an output layer."""
        return Linear(inputs, outputs, outscale, init=self.output_init)


def no_norm(size: int) -> nn.Module:
    """Return a layer that changes nothing."""
    return nn.Identity()


RMS_SILU = Style(RMSNorm, F.silu, True, fan_in_normal_, fan_in_normal_)
"""DreamerV3, Nature 2025."""
LAYER_SILU = Style(LayerNorm, F.silu, False, fan_average_normal_, glorot_uniform_)
"""DreamerV3, January 2023."""
PLAIN_ELU = Style(no_norm, F.elu, True, glorot_uniform_, glorot_uniform_)
"""DreamerV1, DreamerV2, DreamerPro."""
LAYER_ELU = Style(LayerNorm, F.elu, True, glorot_uniform_, glorot_uniform_)
"""DreamerV2 on Crafter."""


class Dense(nn.Module):
    """Linear → norm → activation."""

    def __init__(self, inputs: int, units: int, style: Style = RMS_SILU) -> None:
        super().__init__()
        self.linear = Linear(inputs, units, init=style.hidden_init, bias=style.bias)
        self.norm, self.act = style.norm(units), style.act

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(self.linear(x))

    def finish(self, x: Tensor) -> Tensor:
        """Return norm and activation of what the linear map gave."""
        return self.act(self.norm(x))


class MLP(nn.Sequential):
    """``layers`` times `Dense`: (…, inputs) → (…, units)."""

    def __init__(self, inputs: int, layers: int, units: int, style: Style = RMS_SILU) -> None:
        super().__init__(*(Dense(units if i else inputs, units, style) for i in range(layers)))
