"""Running scale of the returns."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dreamer import ops


class PercentileScale(nn.Module):
    """max(limit, EMA of the range between two return percentiles) (DreamerV3).

    The averages start at 0 without correction, so early returns are scaled by the limit, as in
    the official code; they are updated before they are used.
    """

    low: Tensor
    high: Tensor

    def __init__(self, *, rate: float, low: float, high: float, limit: float) -> None:
        super().__init__()
        self.rate, self.shares, self.limit = rate, (low, high), limit
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))

    @torch.no_grad()
    def update(self, returns: Tensor) -> Tensor:
        """Take in returns of any shape and return the scale, a 0-d tensor."""
        low, high = ops.percentiles(returns, *self.shares)
        self.low.lerp_(low, self.rate)
        self.high.lerp_(high, self.rate)
        return self.scale()

    def scale(self) -> Tensor:
        """Return what returns are divided by, a 0-d tensor."""
        return torch.clamp_min(self.high - self.low, self.limit)

    def metrics(self) -> dict[str, Tensor]:
        """Return the running percentiles and the scale; later updates do not change them."""
        low, high = (f"return_percentile/{100 * share:g}" for share in self.shares)
        return {low: self.low.clone(), high: self.high.clone(), "return_scale": self.scale()}
