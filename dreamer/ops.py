"""Pure functions on tensors: the mathematics of the papers, without state or configuration."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def symlog(x: Tensor) -> Tensor:
    """Return sign(x)·ln(1+|x|) (DreamerV3, arXiv:2301.04104, Eq. 9 of v2, Eq. 2 of v1)."""
    return torch.sign(x) * torch.log1p(torch.abs(x))


def symexp(x: Tensor) -> Tensor:
    """Return sign(x)·(e^|x| − 1), the inverse of `symlog`."""
    return torch.sign(x) * torch.expm1(torch.abs(x))


def log_unimix(logits: Tensor, unimix: float) -> Tensor:
    """Return log((1−u)·softmax(logits) + u/K) over the last axis (DreamerV3, both versions).

    With ``unimix`` 0 this is the plain log-softmax.
    """
    if unimix == 0.0:
        return F.log_softmax(logits, -1)
    probs = F.softmax(logits, -1)
    return torch.log((1.0 - unimix) * probs + unimix / logits.shape[-1])


def onehot(index: Tensor, classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return (…, classes) one-hot vectors of integer indices (…), which are not range-checked.

    Unlike ``torch.nn.functional.one_hot`` it reads no value on the host.
    """
    zeros = torch.zeros(*index.shape, classes, dtype=dtype, device=index.device)
    return zeros.scatter_(-1, index.long()[..., None], 1.0)


def sample_onehot(probs: Tensor, noise: Tensor | None = None) -> Tensor:
    """Draw one-hot vectors over the last axis by inverting the distribution, without gradient.

    One uniform number per draw, from ``noise`` (…, 1) in [0, 1) if it is given: on a CPU several
    times cheaper than one exponential or Gumbel number per class. Counting edges gives exactly one
    class whatever the rounding.
    """
    with torch.no_grad():
        edges = probs.cumsum(-1)
        drawn = torch.rand_like(edges[..., :1]) if noise is None else noise
        point = drawn * edges[..., -1:]
        passed = (point >= edges[..., :-1]).to(probs.dtype).sum(-1, keepdim=True)
        classes = torch.arange(probs.shape[-1], dtype=probs.dtype, device=probs.device)
        return (passed == classes).to(probs.dtype)


def straight_through(sample: Tensor, probs: Tensor) -> Tensor:
    """Return the one-hot value with the gradient of the probabilities (DreamerV2, Algorithm 1)."""
    return sample + (probs - probs.detach())


def categorical_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p‖q) summed over the groups: (…, S, K) normalised log-probabilities → (…)."""
    return (log_p.exp() * (log_p - log_q)).sum((-2, -1))


def gaussian_kl(mean_p: Tensor, std_p: Tensor, mean_q: Tensor, std_q: Tensor) -> Tensor:
    """Return KL(p‖q) of diagonal Gaussians summed over the last axis: (…, S) → (…)."""
    ratio = (std_p / std_q) ** 2
    return 0.5 * (ratio + ((mean_p - mean_q) / std_q) ** 2 - 1.0 - torch.log(ratio)).sum(-1)


def free_nats_per_element(kl: Tensor, free: float) -> Tensor:
    """Return max(free, KL) for every element (DreamerV3): below the floor there is no gradient."""
    return torch.clamp_min(kl, free)


def free_nats_of_mean(kl: Tensor, free: float) -> Tensor:
    """Return max(free, mean KL), one number (DreamerV1, and DreamerV2's ``free_avg``)."""
    return torch.clamp_min(kl.mean(), free)


def symexp_bins(count: int = 255, limit: float = 20.0) -> Tensor:
    """Return two-hot bins symexp(linspace(−limit, 0)) mirrored; the middle one is exactly 0.

    DreamerV3, Nature 2025. ``count`` is odd. Computed in float64, returned in float32.
    """
    assert count % 2 == 1, count
    half = symexp(torch.linspace(-limit, 0.0, count // 2 + 1, dtype=torch.float64))
    return torch.cat([half, -half[:-1].flip(0)]).float()


def symlog_bins(count: int = 255, limit: float = 20.0) -> Tensor:
    """Return two-hot bins equally spaced in symlog space (DreamerV3, arXiv:2301.04104v1)."""
    return torch.linspace(-limit, limit, count, dtype=torch.float64).float()


def twohot_neighbours(target: Tensor, bins: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (index below, index above, weight of above) of each target among sorted bins.

    Values outside the bins saturate on the end bin. An exact hit puts weight 1 on that bin.
    """
    last = bins.shape[0] - 1
    clipped = target.clamp(bins[0], bins[-1])
    below = (torch.bucketize(clipped, bins, right=True) - 1).clamp(0, last)
    above = (below + 1).clamp(max=last)
    low, high = bins[below], bins[above]
    weight = (clipped - low) / torch.where(high > low, high - low, torch.ones_like(low))
    return below, above, weight


def twohot(target: Tensor, bins: Tensor) -> Tensor:
    """Return the dense two-hot encoding (…, bins) of the targets (…); the weights sum to one."""
    below, above, weight = twohot_neighbours(target, bins)
    count = bins.shape[0]
    low, high = onehot(below, count, weight.dtype), onehot(above, count, weight.dtype)
    return torch.lerp(low, high, weight[..., None])


def twohot_loss(logits: Tensor, target: Tensor, bins: Tensor) -> Tensor:
    """Return −Σᵢ twohot(target)ᵢ·log_softmax(logits)ᵢ: (…, bins), (…) → (…)."""
    return twohot_mixed_loss(logits, target[..., None], (1.0,), bins)


def twohot_mixed_loss(
    logits: Tensor, targets: Tensor, weights: tuple[float, ...], bins: Tensor
) -> Tensor:
    """Return Σₘ weightₘ·`twohot_loss`(logits, targetₘ): (…, bins), (…, M) → (…).

    A target has two non-zero weights, so gathered logits and one log-sum-exp serve all of them.
    """
    below, above, share = twohot_neighbours(targets.contiguous(), bins)
    picked = logits.gather(-1, torch.cat([below, above], -1))
    low, high = picked.chunk(2, -1)
    loss = sum(weights) * torch.logsumexp(logits, -1)
    for weight, expected in zip(weights, torch.lerp(low, high, share).unbind(-1), strict=True):
        loss = loss - weight * expected
    return loss


def twohot_mean(logits: Tensor, bins: Tensor) -> Tensor:
    """Return Σᵢ softmax(logits)ᵢ·binsᵢ: (…, bins) → (…), for bins that mirror around zero.

    Bin i is paired with its mirror image before summing: bins reach 4.85e8, so a plain float32
    sum of a uniform distribution would not cancel. Zero logits predict exactly 0. A product and a
    sum, because autocast would turn a matrix product into bfloat16.
    """
    probs = F.softmax(logits.float(), -1)
    half = bins.shape[0] // 2
    pairs = probs[..., half + 1 :] - probs[..., :half].flip(-1)
    return (pairs * bins[half + 1 :]).sum(-1) + probs[..., half] * bins[half]


def lambda_return_current(
    reward: Tensor, value: Tensor, discount: Tensor, lambda_: float
) -> Tensor:
    """Return λ-returns that include the current state's reward: (N, H) each → (N, H−1).

    Rₜ = rₜ + dₜ[(1−λ)vₜ₊₁ + λRₜ₊₁],  R_last = v_last
    (DreamerV1, arXiv:1912.01603v3, Eq. 6; DreamerV2, arXiv:2010.02193v4, Eq. 4.)
    """
    assert reward.shape == value.shape == discount.shape and reward.dim() == 2, reward.shape
    ret, returns = value[:, -1], []
    one_step = reward[:, :-1] + discount[:, :-1] * (1.0 - lambda_) * value[:, 1:]
    carry = discount[:, :-1] * lambda_
    for t in reversed(range(one_step.shape[1])):
        ret = one_step[:, t] + carry[:, t] * ret
        returns.append(ret)
    return torch.stack(returns[::-1], 1)


def lambda_return_next(
    reward: Tensor, value: Tensor, live: Tensor, lambda_: float | Tensor
) -> Tensor:
    """Return λ-returns that start with the next state's reward: (N, H) each → (N, H−1).

    Rₜ = rₜ₊₁ + lₜ₊₁[(1−λₜ₊₁)vₜ₊₁ + λₜ₊₁Rₜ₊₁],  R_last = v_last
    with ``live`` lₜ the discounted probability that the episode goes on at t, and ``lambda_`` a
    number or, where the trace is cut at episode ends, a tensor (N, H).
    (DreamerV3, arXiv:2301.04104v2, Eq. 5.)
    """
    assert reward.shape == value.shape == live.shape and reward.dim() == 2, reward.shape
    trace = lambda_[:, 1:] if isinstance(lambda_, Tensor) else lambda_
    one_step = reward[:, 1:] + live[:, 1:] * (1.0 - trace) * value[:, 1:]
    carry = live[:, 1:] * trace
    ret, returns = value[:, -1], []
    for t in reversed(range(one_step.shape[1])):
        ret = one_step[:, t] + carry[:, t] * ret
        returns.append(ret)
    return torch.stack(returns[::-1], 1)


def sinkhorn(scores: Tensor, eps: float, iterations: int = 3) -> Tensor:
    """Return soft assignments of samples to prototypes, equally many to each: (N, K) → (N, K).

    Starts from the joint softmax of scores/eps, then alternates between equal mass per prototype
    and per sample; every row sums to one at the end (SwAV; DreamerPro, arXiv:2110.14565, §3).
    """
    samples, prototypes = scores.shape
    log_q = (scores / eps).float()
    log_q = log_q - torch.logsumexp(log_q.flatten(), 0)
    for _ in range(iterations):
        log_q = log_q - torch.logsumexp(log_q, 0, keepdim=True) - math.log(prototypes)
        log_q = log_q - torch.logsumexp(log_q, 1, keepdim=True) - math.log(samples)
    return torch.exp(log_q + math.log(samples))


def random_shift(images: Tensor, shift: Tensor) -> Tensor:
    """Move every image by its own (dy, dx) pixels: (n, h, w, c) float, (n, 2) → (n, h, w, c).

    Bilinear between pixels; the edge is repeated. A positive dx moves the picture to the right.
    """
    n, height, width, _ = images.shape
    rows = torch.arange(height, device=images.device) - shift[:, :1]
    columns = torch.arange(width, device=images.device) - shift[:, 1:]
    y = rows[:, :, None].expand(n, height, width) * (2.0 / (height - 1)) - 1.0
    x = columns[:, None, :].expand(n, height, width) * (2.0 / (width - 1)) - 1.0
    grid = torch.stack([x, y], -1)
    moved = F.grid_sample(
        images.permute(0, 3, 1, 2), grid, padding_mode="border", align_corners=True
    )
    return moved.permute(0, 2, 3, 1)


def weight_from_one(live: Tensor) -> Tensor:
    """Return [1, d₀, d₀d₁, …], the weights of DreamerV1 and V2: (N, H) discounts → (N, H)."""
    return torch.cumprod(torch.cat([torch.ones_like(live[:, :1]), live[:, :-1]], 1), 1)


def squash(reward: Tensor, kind: str) -> Tensor:
    """Return the reward that is learned: itself ("identity"), its "tanh" or its "sign"."""
    if kind == "identity":
        return reward
    return torch.tanh(reward) if kind == "tanh" else torch.sign(reward)


def cumulative_weight(live: Tensor, start: float) -> Tensor:
    """Return the running product of ``live`` over time divided by ``start``: (N, H) → (N, H)."""
    return torch.cumprod(live, 1) / start


def percentiles(x: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Return two linearly interpolated percentiles of all elements, as 0-d tensors.

    The positions are known beforehand, so nothing synchronises with the host.
    """
    ordered = x.detach().flatten().float().sort().values

    def at(share: float) -> Tensor:
        position = share * (ordered.shape[0] - 1)
        index = math.floor(position)
        after = min(index + 1, ordered.shape[0] - 1)
        return torch.lerp(ordered[index], ordered[after], position - index)

    return at(low), at(high)


def bernoulli_loss(logit: Tensor, target: Tensor) -> Tensor:
    """Return −t·log p − (1−t)·log(1−p) with p = sigmoid(logit); ``target`` may be soft."""
    return F.binary_cross_entropy_with_logits(logit, target, reduction="none")


def unit_normal_loss(mean: Tensor, target: Tensor) -> Tensor:
    """Return −log N(target; mean, 1) element-wise (DreamerV1, DreamerV2)."""
    return 0.5 * (mean - target) ** 2 + 0.5 * math.log(2 * math.pi)


def normal_log_prob(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return log N(x; mean, std) summed over the last axis."""
    scaled = (x - mean) / std
    return (-0.5 * scaled**2 - torch.log(std) - 0.5 * math.log(2 * math.pi)).sum(-1)


def normal_entropy(std: Tensor) -> Tensor:
    """Return the entropy in nats of N(·, std) summed over the last axis."""
    return (torch.log(std) + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)


def unit_scale(action: Tensor) -> Tensor:
    """Divide element-wise by max(1, |a|), without gradient through the divisor (DreamerV3)."""
    return action / action.detach().abs().clamp_min(1.0)


def barlow_twins(predicted: Tensor, target: Tensor, redundancy: float) -> Tensor:
    """Return Σᵢ (Cᵢᵢ − 1)² + redundancy · Σᵢ≠ⱼ Cᵢⱼ² of the columns' correlation C, as a 0-d tensor.

    As in R2-Dreamer's code: the deviation is the unbiased one and the product is divided by the
    number of rows N, so C of equal columns is (N − 1) / N.

    Args:
        predicted: (N, E), with N ≥ 2.
        target: (N, E).
        redundancy: weight of what is off the diagonal.
    """
    x, y = ((z - z.mean(0)) / (z.std(0) + 1e-8) for z in (predicted, target))
    square = (x.T @ y / x.shape[0]) ** 2
    own = square.diagonal()
    on = own - 2.0 * (x * y).mean(0) + 1.0
    return on.sum() + redundancy * (square.sum() - own.sum())


def pair_logits(predicted: Tensor, target: Tensor) -> Tensor:
    """Return how well every prediction fits every target: (N, E) twice → (N, N) products."""
    return predicted @ target.T


def own_row(logits: Tensor) -> Tensor:
    """Return 0 … N−1: the target of each row of (N, N) is the one in its own place."""
    return torch.arange(logits.shape[0], device=logits.device)


def info_nce(logits: Tensor) -> Tensor:
    """Return the cross-entropy (N,) of naming the own target of each row of (N, N) logits."""
    return F.cross_entropy(logits, own_row(logits), reduction="none")
