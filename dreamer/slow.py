"""Slowly moving copies of networks."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def frozen_copy(module: Module) -> Module:
    """Return a copy without gradient, equal to the module now."""
    return copy.deepcopy(module).requires_grad_(False)


@torch.no_grad()
def move_towards(slow: nn.Module, fast: nn.Module, rate: float | Tensor) -> None:
    """Move every parameter of the copy by a share of its distance (DreamerV3, DreamerPro).

    A ``rate`` that is known on the device alone is a 0-d tensor.
    """
    if isinstance(rate, Tensor):
        for kept, new in zip(slow.parameters(), fast.parameters(), strict=True):
            kept.lerp_(new, rate)
    else:
        torch._foreach_lerp_(list(slow.parameters()), list(fast.parameters()), rate)


class CopyClock(nn.Module):
    """Counts updates on the device and says when to copy (DreamerV2, DreamerPro).

    The decision is a number, not a branch, so that an update can be captured in a CUDA graph.
    """

    count: Tensor

    def __init__(self, every: int) -> None:
        super().__init__()
        self.every = every
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def copy(self, slow: nn.Module, fast: nn.Module) -> None:
        """Copy at calls 0, every, 2·every, …; otherwise leave the copy as it is."""
        due = self.count % self.every == 0
        self.count += 1
        for kept, new in zip(slow.parameters(), fast.parameters(), strict=True):
            kept.copy_(torch.where(due, new, kept))
