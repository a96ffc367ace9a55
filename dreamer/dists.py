"""Distributions over actions: categorical, and the three continuous ones of the papers."""

from __future__ import annotations

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dreamer import ops

MODE_DRAWS = 100
"""Samples from which mode and entropy of a distribution without closed form are taken."""


class Part(Protocol):
    """Distribution over one slice of the flat action."""

    size: int
    """Width of the slice."""

    def rsample(self) -> Tensor:
        """Draw (…, size) with gradient: reparameterised, or straight-through if discrete."""

    def mode(self) -> Tensor:
        """Return the most likely (…, size)."""

    def log_prob(self, action: Tensor) -> Tensor:
        """(…, size) → (…)."""

    def entropy(self) -> Tensor:
        """Return nats, (…)."""

    def explore(self, action: Tensor, noise: float, epsilon: float) -> Tensor:
        """Return the action (…, size) disturbed: Gaussian noise, or a random choice."""

    def uniform(self) -> Tensor:
        """Draw (…, size) from all that is possible, whatever the policy."""


class ActionDist:
    """A policy's distribution over flat actions: independent parts, each over its own slice."""

    def __init__(self, parts: list[Part]) -> None:
        self.parts = parts

    def sample(self) -> Tensor:
        """Draw flat actions (…, A), without gradient."""
        with torch.no_grad():
            return self.rsample()

    def rsample(self) -> Tensor:
        """Draw flat actions (…, A), with gradient."""
        return torch.cat([part.rsample() for part in self.parts], -1)

    def mode(self) -> Tensor:
        """Return the most likely flat action (…, A)."""
        return torch.cat([part.mode() for part in self.parts], -1)

    def log_prob(self, flat: Tensor) -> Tensor:
        """Return log π(a) summed over the parts: (…, A) → (…)."""
        slices = torch.split(flat, [part.size for part in self.parts], -1)
        terms = [part.log_prob(x) for part, x in zip(self.parts, slices, strict=True)]
        return torch.stack(terms).sum(0)

    def entropy(self) -> Tensor:
        """Return the entropy in nats summed over the parts, (…)."""
        return torch.stack([part.entropy() for part in self.parts]).sum(0)

    def explore(self, flat: Tensor, noise: float, epsilon: float) -> Tensor:
        """Return the flat action (…, A) with what an actor adds to explore (DreamerV1)."""
        slices = torch.split(flat, [part.size for part in self.parts], -1)
        pairs = zip(self.parts, slices, strict=True)
        return torch.cat([part.explore(x, noise, epsilon) for part, x in pairs], -1)

    def uniform(self) -> Tensor:
        """Draw flat actions (…, A) from all that is possible, whatever the policy."""
        return torch.cat([part.uniform() for part in self.parts], -1)


class Categorical:
    """One-hot categorical with a uniform mix, from logits (…, K)."""

    def __init__(self, logits: Tensor, unimix: float) -> None:
        self.log_p = ops.log_unimix(logits, unimix)
        self.size = logits.shape[-1]

    def rsample(self) -> Tensor:
        """Draw (…, K) one-hot with the gradient of the probabilities."""
        probs = self.log_p.exp()
        onehot = ops.sample_onehot(probs)
        return ops.straight_through(onehot, probs) if probs.requires_grad else onehot

    def mode(self) -> Tensor:
        """Return (…, K) one-hot of the most likely choice."""
        return ops.onehot(self.log_p.argmax(-1), self.size)

    def log_prob(self, action: Tensor) -> Tensor:
        """(…, K) one-hot → (…)."""
        return (self.log_p * action).sum(-1)

    def entropy(self) -> Tensor:
        """Return nats, (…)."""
        return -(self.log_p.exp() * self.log_p).sum(-1)

    def explore(self, action: Tensor, noise: float, epsilon: float) -> Tensor:
        """Replace a share ``epsilon`` of the actions by uniform ones."""
        if epsilon == 0.0:
            return action
        chance = torch.rand_like(action[..., :1])
        return torch.where(chance < epsilon, self.uniform(), action)

    def uniform(self) -> Tensor:
        """Draw (…, K) one-hot, every choice alike."""
        return ops.sample_onehot(torch.full_like(self.log_p, 1.0 / self.size))


class _Continuous:
    """Exploration with actions in [−1, 1]."""

    size: int
    mean: Tensor

    def explore(self, action: Tensor, noise: float, epsilon: float) -> Tensor:
        """Add normal noise of deviation ``noise`` and clip to [−1, 1]."""
        if noise == 0.0:
            return action
        return (action + noise * torch.randn_like(action)).clamp(-1.0, 1.0)

    def uniform(self) -> Tensor:
        """Draw (…, d) evenly from [−1, 1]."""
        return 2.0 * torch.rand_like(self.mean) - 1.0


class BoundedNormal(_Continuous):
    """N(tanh m, (hi−lo)·sigmoid(s+2)+lo): not squashed; the environment clips (DreamerV3)."""

    def __init__(self, mean: Tensor, std: Tensor, min_std: float, max_std: float) -> None:
        self.mean = torch.tanh(mean)
        self.std = (max_std - min_std) * torch.sigmoid(std + 2.0) + min_std
        self.size = mean.shape[-1]

    def rsample(self) -> Tensor:
        """Draw (…, d), unclipped."""
        return self.mean + self.std * torch.randn_like(self.mean)

    def mode(self) -> Tensor:
        """Return the mean (…, d)."""
        return self.mean

    def log_prob(self, action: Tensor) -> Tensor:
        """(…, d) → (…)."""
        return ops.normal_log_prob(action, self.mean, self.std)

    def entropy(self) -> Tensor:
        """Return nats, (…)."""
        return ops.normal_entropy(self.std)


class TanhNormal(_Continuous):
    """tanh(u) with u ~ N(5·tanh(m/5), softplus(s + s₀) + lo) (DreamerV1, DreamerPro).

    s₀ makes the deviation ``init_std`` (plus ``lo``) where the network gives 0.
    """

    def __init__(self, mean: Tensor, std: Tensor, min_std: float, init_std: float) -> None:
        shift = math.log(math.expm1(init_std)) if init_std else 0.0
        self.mean = 5.0 * torch.tanh(mean / 5.0)
        self.std = F.softplus(std + shift) + min_std
        self.size = mean.shape[-1]

    def rsample(self) -> Tensor:
        """Draw (…, d) in (−1, 1)."""
        return torch.tanh(self.mean + self.std * torch.randn_like(self.mean))

    def mode(self) -> Tensor:
        """Return the likeliest of 100 samples, chosen for every row by itself."""
        draws = self._draws()
        best = self.log_prob(draws).argmax(0, keepdim=True)[..., None]
        return draws.gather(0, best.expand(1, *draws.shape[1:]))[0]

    def log_prob(self, action: Tensor) -> Tensor:
        """(…, d) → (…), by the inverse and the stable logarithm of its Jacobian."""
        u = torch.atanh(action.clamp(-1.0 + 6e-8, 1.0 - 6e-8))
        jacobian = 2.0 * (math.log(2.0) - u - F.softplus(-2.0 * u))
        return ops.normal_log_prob(u, self.mean, self.std) - jacobian.sum(-1)

    def entropy(self) -> Tensor:
        """Return the mean of −log π over 100 samples, nats (…)."""
        return -self.log_prob(self._draws()).mean(0)

    def _draws(self) -> Tensor:
        noise = torch.randn(MODE_DRAWS, *self.mean.shape, device=self.mean.device)
        return torch.tanh(self.mean + self.std * noise)


class TruncatedNormal(_Continuous):
    """N(tanh m, 2·sigmoid(s/2) + lo) cut to [−1, 1] (DreamerV2)."""

    def __init__(self, mean: Tensor, std: Tensor, min_std: float) -> None:
        self.mean = torch.tanh(mean)
        self.std = 2.0 * torch.sigmoid(std / 2.0) + min_std
        self.size = mean.shape[-1]
        low, high = (-1.0 - self.mean) / self.std, (1.0 - self.mean) / self.std
        self._low, self._high = low, high
        self._below = torch.special.ndtr(low)
        self._mass = torch.special.ndtr(high) - self._below

    def rsample(self) -> Tensor:
        """Draw (…, d) by inverting the distribution; the clip at the ends passes the gradient."""
        point = self._below + self._mass * torch.rand_like(self.mean)
        draw = self.mean + self.std * torch.special.ndtri(point.clamp(1e-6, 1.0 - 1e-6))
        inside = draw.detach().clamp(-1.0 + 1e-6, 1.0 - 1e-6)
        clipped: Tensor = draw + (inside - draw.detach())
        return clipped

    def mode(self) -> Tensor:
        """Return the mean parameter (…, d), which lies inside."""
        return self.mean

    def log_prob(self, action: Tensor) -> Tensor:
        """(…, d) → (…)."""
        return ops.normal_log_prob(action, self.mean, self.std) - torch.log(self._mass).sum(-1)

    def entropy(self) -> Tensor:
        """Return nats, (…)."""
        density = _normal_density
        tails = self._low * density(self._low) - self._high * density(self._high)
        each: Tensor = torch.log(self.std * self._mass) + tails / (2.0 * self._mass)
        return (each + 0.5 * math.log(2.0 * math.pi * math.e)).sum(-1)


def _normal_density(x: Tensor) -> Tensor:
    return torch.exp(-0.5 * x**2) / math.sqrt(2.0 * math.pi)
