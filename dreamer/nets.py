"""Layers: linear, block-diagonal linear, norms, MLP, and each paper's way to initialise them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreamer.loop import Inside

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

    slot = 0

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

    def forward(self, x: Tensor, loop: Inside | None = None) -> Tensor:
        """(…, in) → (…, out); inside a loop its step stands in for the parameters."""
        return super().forward(x) if loop is None else loop.affine(self, x)

    def loop_parameters(self) -> tuple[Tensor, Tensor | None]:
        """Return weight (out, in) and bias."""
        return self.weight, self.bias

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """(N, in) → (N, out) with another weight."""
        return F.linear(x, weight, bias)

    def weight_gradient(self, x: Tensor, grad: Tensor) -> Tensor:
        """(N, in), (N, out) → (out, in)."""
        return grad.T @ x


class SplitLinear(Linear):
    """Affine map of [x, y] in two products: y is known for all steps of a loop beforehand.

    Called with [x, y] it is an ordinary `Linear`.
    """

    def __init__(
        self,
        first: int,
        second: int,
        outputs: int,
        *,
        init: Initialiser = fan_in_normal_,
        bias: bool = True,
    ) -> None:
        super().__init__(first + second, outputs, init=init, bias=bias)
        self.first = first

    def head(self, x: Tensor, loop: Inside | None = None) -> Tensor:
        """(…, first) → (…, out), without bias."""
        if loop is None:
            return F.linear(x, self.weight[:, : self.first])
        return loop.affine(self, x)

    def tail(self, y: Tensor) -> Tensor:
        """(…, second) → (…, out), bias included."""
        return F.linear(y, self.weight[:, self.first :], self.bias)

    def loop_parameters(self) -> tuple[Tensor, Tensor | None]:
        """Return the weight of the first inputs (out, first); the bias is the second's."""
        return self.weight[:, : self.first], None


class BlockLinear(nn.Module):
    """Block-diagonal affine map: (…, inputs) → (…, outputs), ``blocks`` equal blocks.

    The initialiser counts the full input width as fan-in, as the official code does.
    """

    slot = 0

    def __init__(self, inputs: int, outputs: int, blocks: int, fan_in: int = 0) -> None:
        super().__init__()
        assert inputs % blocks == 0 and outputs % blocks == 0, (inputs, outputs, blocks)
        self.blocks, self.out_features = blocks, outputs
        self.weight = nn.Parameter(torch.empty(blocks, inputs // blocks, outputs // blocks))
        self.bias = nn.Parameter(torch.zeros(outputs))
        trunc_normal_(self.weight, fan_in or inputs)

    def forward(self, x: Tensor, loop: Inside | None = None) -> Tensor:
        """(…, in) → (…, out); inside a loop its step stands in for the parameters."""
        return self.product(x, self.weight, self.bias) if loop is None else loop.affine(self, x)

    def loop_parameters(self) -> tuple[Tensor, Tensor | None]:
        """Return weight (g, in/g, out/g) and bias (out)."""
        return self.weight, self.bias

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """(…, in) → (…, out) with another weight."""
        grouped = self._grouped(x)
        if bias is None:
            out = torch.bmm(grouped, weight)  # (g, N, out/g)
        else:
            out = torch.baddbmm(bias.reshape(self.blocks, 1, -1), grouped, weight)
        return out.transpose(0, 1).reshape(*x.shape[:-1], -1)

    def weight_gradient(self, x: Tensor, grad: Tensor) -> Tensor:
        """(N, in), (N, out) → (g, in/g, out/g)."""
        return torch.bmm(self._grouped(x).transpose(1, 2), self._grouped(grad))

    def _grouped(self, x: Tensor) -> Tensor:
        return x.reshape(-1, self.blocks, x.shape[-1] // self.blocks).transpose(0, 1)


class RMSNorm(nn.Module):
    """x / sqrt(mean x² + eps) · scale over the last axis, computed in float32 (eps 1e-4)."""

    is_loop_norm, slot = True, 0

    def __init__(self, size: int, eps: float = 1e-4) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor, loop: Inside | None = None) -> Tensor:
        weight = self.weight if loop is None else loop.norm(self.slot)[0]
        return F.rms_norm(x.float(), x.shape[-1:], weight, self.eps).to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """Layer norm over the last axis, computed in float32 with Keras' eps 1e-3."""

    is_loop_norm, slot = True, 0

    def __init__(self, size: int) -> None:
        super().__init__(size, eps=1e-3)

    def forward(self, x: Tensor, loop: Inside | None = None) -> Tensor:
        weight, bias = (self.weight, self.bias) if loop is None else loop.norm(self.slot)
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class NoNorm(nn.Module):
    """Changes nothing."""

    def __init__(self, size: int) -> None:
        super().__init__()

    def forward(self, x: Tensor, loop: Inside | None = None) -> Tensor:
        return x


class Style(NamedTuple):
    """How a paper builds its layers: linear → norm → activation, and how weights start."""

    norm: Callable[[int], RMSNorm | LayerNorm | NoNorm]
    act: Callable[[Tensor], Tensor]
    bias: bool
    """Whether linear maps before a norm have a bias."""
    hidden_init: Initialiser
    output_init: Initialiser

    def out(self, inputs: int, outputs: int, outscale: float = 1.0) -> Linear:
        """Return an output layer."""
        return Linear(inputs, outputs, outscale, init=self.output_init)


RMS_SILU = Style(RMSNorm, F.silu, True, fan_in_normal_, fan_in_normal_)
"""DreamerV3, Nature 2025."""
LAYER_SILU = Style(LayerNorm, F.silu, False, fan_average_normal_, glorot_uniform_)
"""DreamerV3, January 2023."""
PLAIN_ELU = Style(NoNorm, F.elu, True, glorot_uniform_, glorot_uniform_)
"""DreamerV1, DreamerV2, DreamerPro."""
PLAIN_RELU = PLAIN_ELU._replace(act=F.relu)
"""The convolutions of DreamerV1, whose other layers have ELU."""
LAYER_ELU = Style(LayerNorm, F.elu, True, glorot_uniform_, glorot_uniform_)
"""DreamerV2 on Crafter."""


class Dense(nn.Module):
    """Linear → norm → activation."""

    def __init__(self, inputs: int, units: int, style: Style = RMS_SILU) -> None:
        super().__init__()
        self.linear = Linear(inputs, units, init=style.hidden_init, bias=style.bias)
        self.norm, self.act = style.norm(units), style.act

    def forward(self, x: Tensor, loop: Inside | None = None) -> Tensor:
        return self.act(self.norm(self.linear(x, loop), loop))


class SplitDense(nn.Module):
    """`Dense` on [x, y], where y is known for all steps of a loop beforehand.

    Called with [x, y] it is an ordinary `Dense`.
    """

    def __init__(self, first: int, second: int, units: int, style: Style = RMS_SILU) -> None:
        super().__init__()
        self.linear = SplitLinear(first, second, units, init=style.hidden_init, bias=style.bias)
        self.norm, self.act = style.norm(units), style.act

    def forward(self, both: Tensor) -> Tensor:
        return self.act(self.norm(self.linear(both)))

    def project(self, y: Tensor) -> Tensor:
        """(…, second) → (…, units): the part of y, bias included."""
        return self.linear.tail(y)

    def finish(self, x: Tensor, projected: Tensor, loop: Inside | None = None) -> Tensor:
        """Return the layer's output from (N, first) and what `project` gave for the rest."""
        return self.act(self.norm(self.linear.head(x, loop) + projected, loop))


class MLP(nn.Sequential):
    """``layers`` times `Dense`: (…, inputs) → (…, units)."""

    def __init__(self, inputs: int, layers: int, units: int, style: Style = RMS_SILU) -> None:
        super().__init__(*(Dense(units if i else inputs, units, style) for i in range(layers)))

    def forward(self, x: Tensor, loop: Inside | None = None) -> Tensor:
        for layer in self:
            x = layer(x, loop)
        return x
