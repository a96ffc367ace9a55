"""Layers that a loop applies at every step: weights are cast once and get one gradient for all.

Autograd would take the gradient of every weight at every one of T steps, on B rows each, and add
them up: T small products, and 2·T passes over memory as large as the weights. Inside a `Loop` a
layer sees its weight without gradient, and an offset oₜ with one,

    yₜ = W xₜ + oₜ        oₜ = bias, (B, out)

so that ∂L/∂oₜ = ∂L/∂yₜ, and when all of those are known ∂L/∂W = Σₜ (∂L/∂yₜ)ᵀ xₜ is one product on
T·B rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn


class Affine(Protocol):
    """A layer y = W x + b that can run inside a loop; an ``nn.Module``."""

    slot: int
    """Its place among the layers of the loop."""
    out_features: int

    def loop_parameters(self) -> tuple[Tensor, Tensor | None]:
        """Return W, or the part of it that the loop applies, and b (out) or None."""

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """(N, in) → (N, out) with a weight that stands in for the layer's own."""

    def weight_gradient(self, x: Tensor, grad: Tensor) -> Tensor:
        """Return Σₙ (∂L/∂yₙ)ᵀ xₙ in the weight's shape, from (N, in) and (N, out)."""


class Step(NamedTuple):
    """What the layers of a loop use at one step in place of their own parameters, by slot.

    ``offsets`` are (B, out), or just biases (out) where no gradient is wanted.
    """

    weights: tuple[Tensor, ...]
    offsets: tuple[Tensor | None, ...]
    norms: tuple[tuple[Tensor, ...], ...]


class Inside:
    """One step of a loop as its layers see it. ``inputs`` holds what each was given, by slot."""

    def __init__(self, step: Step) -> None:
        self._step = step
        self._inputs: dict[int, Tensor] = {}

    def affine(self, layer: Affine, x: Tensor) -> Tensor:
        """Return the layer's output (N, out) for (N, in)."""
        weight, offset = self._step.weights[layer.slot], self._step.offsets[layer.slot]
        x = x.to(weight.dtype)
        self._inputs[layer.slot] = x.detach()
        if offset is None or offset.dim() == 1:
            return layer.product(x, weight, offset)
        return layer.product(x, weight) + offset

    def norm(self, slot: int) -> tuple[Tensor, ...]:
        """Return the parameters of a norm for this step."""
        return self._step.norms[slot]

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """What each layer was given, (N, in) without gradient, in the order of the slots."""
        return tuple(self._inputs[slot] for slot in range(len(self._step.weights)))


class Loop:
    """The parameters of some modules for T steps on B rows, with their gradient.

    Args:
        modules: whose layers run inside; each of them runs once at every step.
        steps: T.
        rows: B.

    Attributes:
        steps: what the layers use at each step.
    """

    steps: list[Step]

    def __init__(self, *modules: nn.Module, steps: int, rows: int) -> None:
        affine, norms = _layers(modules)
        self._taps = [_Tap(layer) for layer in affine]
        weights, offsets = [], []
        for tap in self._taps:
            weight, bias = tap.layer.loop_parameters()
            weights.append(_cast(weight.detach()))
            given = (weight, bias, tap, steps, rows)
            offset: Tensor = _Offset.apply(*given)  # type: ignore[no-untyped-call]
            offsets.append(offset.unbind(0))
        # Norms are small: their gradients are stacked and added up once.
        each = [[p.expand(steps, *p.shape).unbind(0) for p in norm.parameters()] for norm in norms]
        self.steps = [
            Step(
                tuple(weights),
                tuple(offset[t] for offset in offsets),
                tuple(tuple(param[t] for param in norm) for norm in each),
            )
            for t in range(steps)
        ]

    def note(self, inputs: list[tuple[Tensor, ...]]) -> None:
        """Keep what the layers were given at every step, before the backward pass needs it."""
        for tap, given in zip(self._taps, zip(*inputs, strict=True), strict=True):
            tap.inputs = torch.stack(given)


def without_gradient(*modules: nn.Module) -> Step:
    """Return the parameters of some modules for every step of a loop that needs no gradient."""
    affine, norms = _layers(modules)
    pairs = [layer.loop_parameters() for layer in affine]
    return Step(
        tuple(_cast(weight.detach()) for weight, _ in pairs),
        tuple(None if bias is None else _cast(bias.detach()) for _, bias in pairs),
        tuple(tuple(param.detach() for param in norm.parameters()) for norm in norms),
    )


class _Tap:
    """A layer of a loop, and what it was given at all steps (T, B, in)."""

    def __init__(self, layer: Any) -> None:
        self.layer: Affine = layer
        self.inputs: Tensor | None = None


class _Offset(torch.autograd.Function):
    """(W, b) → the offsets of all steps (T, B, out), whose gradient becomes that of W and b."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, bias: Tensor | None, tap: _Tap, steps: int, rows: int
    ) -> Tensor:
        ctx.tap, ctx.biased = tap, bias is not None
        width = tap.layer.out_features
        if bias is None:
            return weight.new_zeros(steps, rows, width)
        return bias.expand(steps, rows, width).clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        given = ctx.tap.inputs
        assert given is not None, "the loop's inputs were not noted"
        rows = grad.flatten(0, 1)
        weight = ctx.tap.layer.weight_gradient(given.flatten(0, 1), rows.to(given.dtype))
        bias = rows.sum(0) if ctx.biased else None
        return weight.to(grad.dtype), bias, None, None, None


def _layers(modules: tuple[nn.Module, ...]) -> tuple[list[Any], list[Any]]:
    """Return the affine layers and the norms of some modules, and number them."""
    parts: list[Any] = [part for module in modules for part in module.modules()]
    affine = [part for part in parts if hasattr(part, "loop_parameters")]
    norms = [part for part in parts if hasattr(part, "is_loop_norm")]
    for found in (affine, norms):
        for slot, layer in enumerate(found):
            layer.slot = slot
    return affine, norms


def _cast(tensor: Tensor) -> Tensor:
    """Return what autocast would make of a matrix product's operand, here and now."""
    kind = tensor.device.type
    if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
        return tensor
    return tensor.to(torch.get_autocast_dtype(kind))
