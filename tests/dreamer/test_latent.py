import pytest
import torch

from dreamer.latent import GaussianLatent, OneHotLatent, sigmoid2_std, softplus_std
from tests.dreamer.cases import close, golden


def test_log_probs_are_normalised_per_group_and_never_below_the_uniform_share() -> None:
    latent = OneHotLatent(3, 5, 0.01)
    log_p = latent.log_probs(30 * torch.randn(7, 15))
    close(log_p.exp().sum(-1), torch.ones(7, 3), rtol=1e-5)
    assert log_p.exp().min() >= 0.01 / 5 * 0.999


def test_sample_is_one_hot_per_group_with_the_gradient_of_its_probabilities() -> None:
    torch.manual_seed(0)
    latent = OneHotLatent(2, 4, 0.01)
    stats = torch.randn(6, 8, requires_grad=True)
    sample = latent.sample(stats)
    assert set(sample.flatten().tolist()) == {0.0, 1.0}
    assert torch.equal(sample.sum(-1), torch.ones(6, 2))
    pull = torch.randn(6, 2, 4)
    (through,) = torch.autograd.grad((sample * pull).sum(), stats)
    (direct,) = torch.autograd.grad((latent.log_probs(stats).exp() * pull).sum(), stats)
    close(through, direct, rtol=1e-5)


def test_sample_follows_the_mixed_probabilities() -> None:
    torch.manual_seed(0)
    latent = OneHotLatent(1, 4, 0.2)
    stats = torch.tensor([[9.0, -9.0, -9.0, -9.0]]).expand(20_000, 4)
    close(latent.sample(stats).mean((0, 1)), [0.85, 0.05, 0.05, 0.05], rtol=0.0, atol=0.015)


def test_kl_and_entropy_match_the_golden_values_after_the_uniform_mix() -> None:
    given, want = golden("kl_categorical")
    latent = OneHotLatent(1, 4, 0.01)
    post, prior = (torch.tensor(given[k]) for k in ("post_logits", "prior_logits"))
    close(latent.kl(post, prior), want["kl_unimix_both"])
    close(latent.entropy(post), want["entropy_post_unimix"])


def test_kl_sums_the_groups() -> None:
    given, want = golden("kl_categorical")
    latent = OneHotLatent(3, 4, 0.01)
    post, prior = (torch.tensor(given[k]).repeat(2, 3) for k in ("post_logits", "prior_logits"))
    close(latent.kl(post, prior), [3 * want["kl_unimix_both"]] * 2)


def test_kl_is_bounded_by_the_uniform_mix_even_for_opposite_certainties() -> None:
    latent = OneHotLatent(1, 4, 0.01)
    post, prior = torch.tensor([1e4, 0.0, 0.0, 0.0]), torch.tensor([0.0, 1e4, 0.0, 0.0])
    assert latent.kl(post, prior) < torch.log(torch.tensor(4 / 0.01))


def test_records_hold_one_byte_per_group_and_come_back_exactly() -> None:
    torch.manual_seed(0)
    latent = OneHotLatent(4, 256, 0.01)
    sample = latent.sample(torch.randn(2, 3, 4 * 256))
    stored = latent.to_record(sample)
    assert latent.record_spec() == ("uint8", (4,))
    assert stored.dtype == torch.uint8 and stored.shape == (2, 3, 4)
    assert torch.equal(latent.from_record(stored), sample)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_probabilities_are_float32_whatever_the_logits_are(dtype: torch.dtype) -> None:
    assert OneHotLatent(2, 4, 0.01).log_probs(torch.randn(3, 8, dtype=dtype)).dtype == torch.float32


def test_gaussian_latents_match_the_golden_kl() -> None:
    given, want = golden("kl_gaussian")
    latent = GaussianLatent(2, lambda raw: raw)
    post = torch.tensor(given["post_mean"] + given["post_std"])
    prior = torch.tensor(given["prior_mean"] + given["prior_std"])
    close(latent.kl(post, prior), want["kl_sum"])


def test_deviations_of_latents_match_the_golden_parametrisations() -> None:
    _, want = golden("std_parametrisations")
    close(softplus_std(torch.zeros(1)), [want["v1_rssm_softplus+0.1@0"]])
    raw = torch.tensor([0.0, 1.5])
    close(
        sigmoid2_std(raw),
        [want["v2_rssm_sigmoid2+0.1@0"], want["v2_rssm_sigmoid2+0.1@1.5"]],
    )


def test_gaussian_samples_have_the_moments_and_carry_their_gradient() -> None:
    torch.manual_seed(0)
    stats = torch.tensor([2.0, -1.0, 0.0, 1.0], requires_grad=True)
    latent = GaussianLatent(2, softplus_std)
    draws = latent.sample(stats.expand(20_000, 4))
    mean, std = latent.moments(stats)
    close(draws.mean(0), mean, rtol=0.0, atol=0.05)
    close(draws.std(0), std, rtol=0.03)
    assert torch.equal(latent.mode(stats), mean)
    (grad,) = torch.autograd.grad(draws.sum(), stats)
    close(grad[:2], [20_000.0, 20_000.0])


def test_gaussian_samples_are_stored_as_they_are() -> None:
    latent = GaussianLatent(3, softplus_std)
    assert latent.record_spec() == ("float32", (3,))
    sample = torch.randn(2, 3)
    assert torch.equal(latent.from_record(latent.to_record(sample)), sample)


def test_the_mode_of_a_categorical_latent_is_its_likeliest_class_without_gradient() -> None:
    stats = torch.tensor([[0.0, 3.0, 1.0, 2.0, 0.0, -1.0]], requires_grad=True)
    mode = OneHotLatent(2, 3, 0.01).mode(stats)
    close(mode, [[[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]], atol=1e-7)
    assert not mode.requires_grad
