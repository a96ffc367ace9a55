"""Optimisers as modules: their state is buffers, so it moves, saves and loads with the agent.

A step takes a 0-d flag that says whether it counts. It is a number on the device and not a branch
on the host, so that an update with a non-finite gradient can be skipped inside a CUDA graph:
nothing then changes, neither parameters nor moments nor the count of steps.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LaProp(nn.Module):
    """LaProp with per-tensor adaptive gradient clipping and a linear warm-up.

    Order of DreamerV3 (Nature 2025): clip g to 0.3·max(1e-3, ‖p‖) → divide by the root of its
    running square → momentum → −lr. The rate multiplies after the momentum, so a changing rate
    acts at once; update 0 uses rate 0. Everything is a fixed sequence of multi-tensor kernels on
    device tensors, so it can be captured in a CUDA graph.
    """

    count: Tensor

    def __init__(
        self,
        params: list[nn.Parameter],
        *,
        lr: float,
        warmup: int,
        beta1: float,
        beta2: float,
        eps: float,
        agc: float,
        agc_floor: float,
    ) -> None:
        super().__init__()
        self._params = tuple(params)  # a tuple: the agent owns the parameters, not this module
        self.lr, self.warmup, self.eps = lr, warmup, eps
        self.beta1, self.beta2, self.agc, self.agc_floor = beta1, beta2, agc, agc_floor
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        for i, param in enumerate(params):
            self.register_buffer(f"square_{i}", torch.zeros_like(param))
            self.register_buffer(f"momentum_{i}", torch.zeros_like(param))

    def rate(self) -> Tensor:
        """Return the learning rate of the coming update, a 0-d tensor."""
        if self.warmup == 0:
            return torch.full_like(self.count, self.lr)
        return self.lr * (self.count / self.warmup).clamp(max=1.0)

    @torch.no_grad()
    def step(self, grads: list[Tensor], apply: Tensor) -> dict[str, Tensor]:
        """Apply one update in place, if ``apply`` (0-d bool) says so; return 0-d metrics."""
        params: list[Tensor] = list(self._params)
        squares = [getattr(self, f"square_{i}") for i in range(len(params))]
        momenta = [getattr(self, f"momentum_{i}") for i in range(len(params))]
        rate, count = self.rate(), self.count + 1
        self.count += apply
        grads, clipped, norm = self._clip(params, _masked(grads, apply))
        torch._foreach_mul_(squares, _if(apply, self.beta2, 1.0))
        torch._foreach_addcmul_(squares, grads, grads, 1.0 - self.beta2)
        unbias = (1.0 - self.beta2**count).float()
        roots = torch._foreach_div(squares, unbias)
        torch._foreach_sqrt_(roots)
        torch._foreach_add_(roots, self.eps)
        torch._foreach_div_(grads, roots)
        torch._foreach_mul_(momenta, _if(apply, self.beta1, 1.0))
        torch._foreach_add_(momenta, grads, alpha=1.0 - self.beta1)
        scale = (rate / (1.0 - self.beta1**count)).float() * apply
        steps = list(torch._foreach_mul(momenta, -scale))
        torch._foreach_add_(params, steps)
        return _described(params, steps, rate=rate, grad_norm=norm, clipped=clipped)

    def _clip(
        self, params: list[Tensor], grads: list[Tensor]
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        grad_norms = torch.stack(torch._foreach_norm(grads))
        limits = torch.stack(torch._foreach_norm(params)).clamp_min(self.agc_floor) * self.agc
        factors = 1.0 / torch.clamp_min(grad_norms / limits, 1.0)
        clipped = list(torch._foreach_mul(grads, list(factors.unbind())))
        return clipped, (grad_norms > limits).float().mean(), grad_norms.norm()


class Adam(nn.Module):
    """Adam with global-norm clipping and decoupled decay (DreamerV1, V2, V3 of 2023, DreamerPro).

    ``hat`` is Keras' form of eps, added to the *uncorrected* root of the running square; without
    it eps is added after the correction, as PyTorch and optax do. ``decay`` multiplies every
    tensor by 1 − decay before the step, whatever the rate (DreamerV2).
    """

    count: Tensor

    def __init__(
        self,
        params: list[nn.Parameter],
        *,
        lr: float,
        eps: float,
        clip: float,
        decay: float = 0.0,
        hat: bool = True,
        beta1: float = 0.9,
        beta2: float = 0.999,
    ) -> None:
        super().__init__()
        self._params = tuple(params)
        self.lr, self.eps, self.clip, self.decay, self.hat = lr, eps, clip, decay, hat
        self.beta1, self.beta2 = beta1, beta2
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        for i, param in enumerate(params):
            self.register_buffer(f"square_{i}", torch.zeros_like(param))
            self.register_buffer(f"momentum_{i}", torch.zeros_like(param))

    @property
    def params(self) -> list[nn.Parameter]:
        """What it moves, in the order of the gradients."""
        return list(self._params)

    @torch.no_grad()
    def step(self, grads: list[Tensor], apply: Tensor) -> dict[str, Tensor]:
        """Apply one update in place, if ``apply`` (0-d bool) says so; return 0-d metrics."""
        params: list[Tensor] = list(self._params)
        squares = [getattr(self, f"square_{i}") for i in range(len(params))]
        momenta = [getattr(self, f"momentum_{i}") for i in range(len(params))]
        count = self.count + 1
        self.count += apply
        grads = _masked(grads, apply)
        norm = torch.stack(torch._foreach_norm(grads)).norm()
        factor = self.clip / torch.clamp_min(norm, self.clip)
        grads = list(torch._foreach_mul(grads, factor))
        torch._foreach_mul_(momenta, _if(apply, self.beta1, 1.0))
        torch._foreach_add_(momenta, grads, alpha=1.0 - self.beta1)
        torch._foreach_mul_(squares, _if(apply, self.beta2, 1.0))
        torch._foreach_addcmul_(squares, grads, grads, 1.0 - self.beta2)
        unbias1 = (1.0 - self.beta1**count).float()
        unbias2 = (1.0 - self.beta2**count).float().sqrt()
        roots = list(torch._foreach_sqrt(squares))
        if self.hat:
            torch._foreach_add_(roots, self.eps)
            rate = self.lr * unbias2 / unbias1
        else:
            torch._foreach_div_(roots, unbias2)
            torch._foreach_add_(roots, self.eps)
            rate = self.lr / unbias1
        steps = list(torch._foreach_div(momenta, roots))
        torch._foreach_mul_(steps, -rate * apply)
        if self.decay:
            torch._foreach_mul_(params, _if(apply, 1.0 - self.decay, 1.0))
        torch._foreach_add_(params, steps)
        rate, clipped = torch.full_like(norm, self.lr), norm > self.clip
        return _described(params, steps, rate=rate, grad_norm=norm, clipped=clipped)


def _described(
    params: list[Tensor], steps: list[Tensor], *, rate: Tensor, grad_norm: Tensor, clipped: Tensor
) -> dict[str, Tensor]:
    """Return what every optimiser says of a step, as 0-d tensors.

    ``update_rms`` is the root mean square of what the gradient moved the parameters by, decay left
    out; ``grad_clip_fraction`` the share of clipped tensors, 0 or 1 where all are clipped as one.
    """
    size = sum(param.numel() for param in params)
    return {
        "lr": rate.float(),
        "grad_norm": grad_norm,
        "grad_clip_fraction": clipped.float(),
        "param_norm": torch.stack(torch._foreach_norm(params)).norm(),
        "update_rms": torch.stack(torch._foreach_norm(steps)).norm() / size**0.5,
    }


def _if(apply: Tensor, value: float, otherwise: float) -> Tensor:
    """Return a 0-d float32 that multiplies tensors on the device without asking the host."""
    return torch.where(apply, value, otherwise).float()


def _masked(grads: list[Tensor], apply: Tensor) -> list[Tensor]:
    """Return zeros in place of gradients that must not count: NaN times 0 would still be NaN."""
    return [torch.where(apply, grad, 0.0) for grad in grads]
