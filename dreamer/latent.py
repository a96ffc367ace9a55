"""The stochastic part of the latent state: distributions over z."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dreamer import ops


class Latent(Protocol):
    """What the RSSM and the losses need from a distribution over z."""

    @property
    def stats_size(self) -> int:
        """Width P of the statistics that a network gives."""

    @property
    def size(self) -> int:
        """Width of a flat sample."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a sample."""

    def noise(self, *lead: int, device: torch.device) -> Tensor:
        """Return the random numbers (*lead, …) that `sample` would draw."""

    def sample(self, stats: Tensor, noise: Tensor | None = None) -> Tensor:
        """Draw z (…, *shape) with gradient, from random numbers of `noise` where they are given."""

    def mode(self, stats: Tensor) -> Tensor:
        """Return the most likely z (…, *shape), with gradient only where it moves smoothly."""

    def kl(self, post: Tensor, prior: Tensor) -> Tensor:
        """Return KL(post‖prior) in nats from statistics: (…, P) each → (…)."""

    def entropy(self, stats: Tensor) -> Tensor:
        """Return nats: (…, P) → (…)."""

    def record_spec(self) -> tuple[str, tuple[int, ...]]:
        """Return (dtype, shape) of a stored sample."""

    def to_record(self, stoch: Tensor) -> Tensor:
        """(…, *shape) → record form."""

    def from_record(self, stored: Tensor) -> Tensor:
        """Record form → (…, *shape)."""


def softplus_std(raw: Tensor) -> Tensor:
    """Return softplus(x) + 0.1 (DreamerV1)."""
    return F.softplus(raw) + 0.1


def sigmoid2_std(raw: Tensor) -> Tensor:
    """Return 2·sigmoid(x/2) + 0.1 (DreamerV2, DreamerPro)."""
    return 2.0 * torch.sigmoid(raw / 2.0) + 0.1


class GaussianLatent:
    """Diagonal Gaussian with reparameterised samples (DreamerV1; DreamerPro on DMC).

    Statistics are mean ⊕ raw deviation (…, 2S); a sample is (…, S).
    """

    def __init__(self, stoch: int, std: Callable[[Tensor], Tensor]) -> None:
        self.size, self.stats_size = stoch, 2 * stoch
        self.shape: tuple[int, ...] = (stoch,)
        self._std = std

    def moments(self, stats: Tensor) -> tuple[Tensor, Tensor]:
        """(…, 2S) → mean and standard deviation (…, S), in float32."""
        mean, raw = stats.float().chunk(2, -1)
        return mean, self._std(raw)

    def noise(self, *lead: int, device: torch.device) -> Tensor:
        """Return standard normal numbers (*lead, S)."""
        return torch.randn(*lead, self.size, device=device)

    def sample(self, stats: Tensor, noise: Tensor | None = None) -> Tensor:
        """Draw z (…, S), differentiable in mean and deviation."""
        mean, std = self.moments(stats)
        return mean + std * (torch.randn_like(mean) if noise is None else noise)

    def mode(self, stats: Tensor) -> Tensor:
        """Return the mean (…, S)."""
        return self.moments(stats)[0]

    def kl(self, post: Tensor, prior: Tensor) -> Tensor:
        """Return KL(post‖prior) in nats from statistics: (…, 2S) each → (…)."""
        return ops.gaussian_kl(*self.moments(post), *self.moments(prior))

    def entropy(self, stats: Tensor) -> Tensor:
        """Return the entropy in nats: (…, 2S) → (…)."""
        return ops.normal_entropy(self.moments(stats)[1])

    def record_spec(self) -> tuple[str, tuple[int, ...]]:
        """Return (dtype, shape) of a stored sample."""
        return "float32", self.shape

    def to_record(self, stoch: Tensor) -> Tensor:
        """Return the sample itself."""
        return stoch.float()

    def from_record(self, stored: Tensor) -> Tensor:
        """Return the sample itself."""
        return stored.float()


class OneHotLatent:
    """Groups of categoricals with straight-through gradients (DreamerV2, V3, Pro on Atari).

    Statistics are logits (…, S·K); a sample is (…, S, K) one-hot.
    """

    def __init__(self, stoch: int, classes: int, unimix: float) -> None:
        self.stoch, self.classes, self.unimix = stoch, classes, unimix
        self.stats_size = self.size = stoch * classes
        self.shape: tuple[int, ...] = (stoch, classes)

    def log_probs(self, stats: Tensor) -> Tensor:
        """(…, S·K) logits → (…, S, K) float32 log-probabilities after the uniform mix."""
        return ops.log_unimix(torch.unflatten(stats.float(), -1, self.shape), self.unimix)

    def noise(self, *lead: int, device: torch.device) -> Tensor:
        """Return numbers (*lead, S, 1), even over [0, 1)."""
        return torch.rand(*lead, self.stoch, 1, device=device)

    def sample(self, stats: Tensor, noise: Tensor | None = None) -> Tensor:
        """Draw z (…, S, K) with the gradient of its probabilities."""
        probs = self.log_probs(stats).exp()
        onehot = ops.sample_onehot(probs, noise)
        return ops.straight_through(onehot, probs) if probs.requires_grad else onehot

    def mode(self, stats: Tensor) -> Tensor:
        """Return the likeliest classes (…, S, K), without gradient: only samples have one."""
        return ops.onehot(torch.unflatten(stats, -1, self.shape).argmax(-1), self.classes)

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
