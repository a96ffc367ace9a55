import math

import pytest
import torch
from torch import Tensor, distributions

from dreamer.dists import ActionDist, Categorical, Part, TanhNormal, TruncatedNormal
from tests.dreamer.cases import close, golden, tensor


def raw_std(std: float, least: float = 0.1) -> Tensor:
    """Return what TruncatedNormal turns into this deviation."""
    share = (std - least) / 2.0
    return 2.0 * torch.logit(tensor(share))


def test_truncated_normal_matches_the_golden_density_and_entropy() -> None:
    given, want = golden("trunc_normal_v2_actor")
    mean = torch.atanh(tensor([given["mean"]]))
    dist = TruncatedNormal(mean, raw_std(given["std"]).reshape(1), 0.1)
    close(dist.log_prob(tensor([given["action"]])), want["log_prob_at_0.5"])
    close(dist.entropy(), want["entropy"])


def test_tanh_normal_matches_the_golden_density() -> None:
    given, want = golden("tanh_normal_v1_actor")
    mean = 5.0 * torch.atanh(tensor([given["mean"] / 5.0]))
    std = torch.log(torch.expm1(tensor([given["std"]])))
    dist = TanhNormal(mean, std, 0.0, 0.0)
    # init_std 0 means no shift, which is how DreamerPro has it.
    close(dist.log_prob(tensor([given["action"]])), want["log_prob"])


def test_means_and_deviations_match_the_golden_parametrisations() -> None:
    _, want = golden("std_parametrisations")
    zero, one = torch.zeros(1, dtype=torch.float64), tensor([3.0])
    first = TanhNormal(one, zero, 1e-4, 5.0)
    close(first.std, [want["v1_actor_std@0"]])
    close(first.mean, [want["v1_actor_mean@3"]])
    close(TanhNormal(zero, zero, 0.1, 0.0).std, [want["dreamerpro_tanhnormal_std@0"]])
    second = TruncatedNormal(tensor([0.7]), zero, 0.1)
    close(second.std, [want["v2_truncnormal_std@0"]])
    close(second.mean, [want["v2_truncnormal_mean@0.7"]])


@pytest.mark.parametrize("kind", ["tanh", "truncated"])
def test_samples_stay_inside_and_follow_the_density(kind: str) -> None:
    torch.manual_seed(0)
    mean, std = torch.tensor([0.4]), torch.tensor([0.3])
    dist: Part = (
        TanhNormal(mean, std, 0.1, 0.0) if kind == "tanh" else TruncatedNormal(mean, std, 0.1)
    )
    draws = torch.stack([dist.rsample() for _ in range(4000)])
    assert draws.abs().max() < 1.0
    grid = torch.linspace(-0.99999, 0.99999, 4001)[:, None]
    density = dist.log_prob(grid).exp()
    mass = torch.trapezoid(density, grid[:, 0])
    close(mass, 1.0, rtol=2e-2)
    expected = torch.trapezoid(density * grid[:, 0], grid[:, 0])
    # The mean of 4,000 draws in [-1, 1] is within 0.08, five deviations, of the expectation.
    close(draws.mean(), expected, rtol=0.0, atol=0.08)


@pytest.mark.parametrize("kind", ["tanh", "truncated"])
def test_samples_carry_the_gradient_of_mean_and_deviation(kind: str) -> None:
    torch.manual_seed(0)
    mean = torch.zeros(200, 2, requires_grad=True)
    std = torch.zeros(200, 2, requires_grad=True)
    dist: Part = (
        TanhNormal(mean, std, 0.1, 0.0) if kind == "tanh" else TruncatedNormal(mean, std, 0.1)
    )
    grads = torch.autograd.grad(dist.rsample().sum(), [mean, std])
    assert (grads[0] > 0).all()
    assert torch.isfinite(grads[1]).all() and grads[1].abs().sum() > 0


def test_the_mode_of_a_tanh_normal_is_chosen_for_every_row_by_itself() -> None:
    torch.manual_seed(0)
    mean = torch.tensor([[-2.0], [0.0], [2.0]])
    dist = TanhNormal(mean, torch.full((3, 1), -3.0), 1e-4, 0.0)
    mode = dist.mode()
    assert mode.shape == (3, 1)
    close(mode[0], torch.tanh(5.0 * torch.tanh(torch.tensor(-0.4))).reshape(1), atol=0.03)
    assert mode[0] < -0.8 and abs(mode[1]) < 0.2 and mode[2] > 0.8


def test_the_entropy_of_a_tanh_normal_is_that_of_its_samples() -> None:
    torch.manual_seed(0)
    mean, std = torch.zeros(3000, 1), torch.zeros(3000, 1)
    ours = TanhNormal(mean, std, 0.1, 0.0).entropy().mean()
    base = distributions.Normal(torch.zeros(1), math.log(2.0) + 0.1)
    other = distributions.TransformedDistribution(base, [distributions.TanhTransform(cache_size=1)])
    theirs = -other.log_prob(other.sample((100_000,))).mean()
    close(ours, theirs, rtol=0.02)


def test_discrete_samples_carry_the_gradient_of_their_probabilities() -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 4, requires_grad=True)
    weights = torch.randn(5, 4)
    draw = Categorical(logits, 0.0).rsample()
    close(draw.sum(-1), torch.ones(5))
    ours = torch.autograd.grad((draw * weights).sum(), logits)[0]
    theirs = torch.autograd.grad((logits.softmax(-1) * weights).sum(), logits)[0]
    close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_exploration_disturbs_each_kind_of_action_in_its_way() -> None:
    torch.manual_seed(0)
    discrete = Categorical(torch.tensor([[50.0, 0.0, 0.0, 0.0]]).expand(8000, 4), 0.0)
    box = TruncatedNormal(torch.zeros(8000, 1), torch.zeros(8000, 1), 0.1)
    dist = ActionDist([discrete, box])
    still = torch.cat([discrete.mode(), torch.full((8000, 1), 0.9)], -1)
    assert torch.equal(dist.explore(still, 0.0, 0.0), still)
    moved = dist.explore(still, 0.3, 0.4)
    close(moved[:, :4].sum(-1), torch.ones(8000))
    # A random choice may be the old one: 0.4 · 3/4 change; five deviations are 0.026.
    close((moved[:, 0] == 0).float().mean(), 0.3, rtol=0.0, atol=0.026)
    assert moved[:, 4].max() == 1.0 and moved[:, 4].std() > 0.15
