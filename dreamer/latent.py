"""The stochastic part of the latent state: distributions over z."""

from __future__ import annotations

import torch
from torch import Tensor

from dreamer import ops


class OneHotLatent:
    """Groups of categoricals with straight-through gradients (DreamerV2, V3, Pro on Atari).

    Statistics are logits (…, S·K); a sample is (…, S, K) one-hot.
    """

    def __init__(self, stoch: int, classes: int, unimix: float) -> None:
        self.stoch, self.classes, self.unimix = stoch, classes, unimix
        self.stats_size = self.size = stoch * classes
        self.shape = (stoch, classes)

    def log_probs(self, stats: Tensor) -> Tensor:
        """(…, S·K) logits → (…, S, K) float32 log-probabilities after the uniform mix."""
        return ops.log_unimix(torch.unflatten(stats.float(), -1, self.shape), self.unimix)

    def sample(self, stats: Tensor) -> Tensor:
        """Draw z (…, S, K) with the gradient of its probabilities."""
        probs = self.log_probs(stats).exp()
        onehot = ops.sample_onehot(probs)
        return ops.straight_through(onehot, probs) if probs.requires_grad else onehot

    def kl(self, post: Tensor, prior: Tensor) -> Tensor:
        """Return KL(post‖prior) in nats from statistics: (…, S·K) each → (…)."""
        return ops.categorical_kl(self.log_probs(post), self.log_probs(prior))

    def entropy(self, stats: Tensor) -> Tensor:
        """Return the entropy in nats, summed over groups: (…, S·K) → (…)."""
        log_p = self.log_probs(stats)
        return -(log_p.exp() * log_p).sum((-2, -1))

    def record_spec(self) -> tuple[str, tuple[int, ...]]:
        """Return (dtype, shape) of a stored sample: one byte per group, the class index."""
        return "uint8", (self.stoch,)

    def to_record(self, stoch: Tensor) -> Tensor:
        """(…, S, K) one-hot → (…, S) uint8 class indices."""
        return stoch.argmax(-1).to(torch.uint8)

    def from_record(self, indices: Tensor) -> Tensor:
        """(…, S) uint8 class indices → (…, S, K) float32 one-hot."""
        return ops.onehot(indices, self.classes)
