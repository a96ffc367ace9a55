import torch

from dreamer import ops
from dreamer.heads import Bernoulli, BernoulliHead, TwoHot, TwoHotHead
from tests.dreamer.cases import close, golden


def test_a_two_hot_head_with_outscale_zero_predicts_exactly_zero() -> None:
    head = TwoHotHead(6, 1, 8, outscale=0.0, bins=255)
    assert not head(torch.randn(3, 4, 6)).mean().any()


def test_a_two_hot_head_with_outscale_zero_still_has_a_gradient() -> None:
    head = TwoHotHead(6, 1, 8, outscale=0.0, bins=255)
    head(torch.randn(3, 6)).loss(torch.ones(3)).sum().backward()
    assert head.out.weight.grad is not None and head.out.weight.grad.any()


def test_two_hot_loss_is_the_cross_entropy_with_the_encoded_target() -> None:
    bins = ops.symexp_bins()
    dist = TwoHot(torch.randn(5, 255), bins)
    target = torch.tensor([0.0, 1.0, -3.7, 250.0, 1e5])
    dense = -(ops.twohot(target, bins) * dist.logits.log_softmax(-1)).sum(-1)
    close(dist.loss(target), dense, rtol=1e-5)
    twice = dist.mixed_loss(torch.stack([target, -target], -1), (1.0, 0.5))
    close(twice, dist.loss(target) + 0.5 * dist.loss(-target), rtol=1e-5)


def test_two_hot_loss_is_smallest_at_the_encoded_target() -> None:
    bins = ops.symexp_bins()
    target = torch.tensor([7.5])
    best = TwoHot((ops.twohot(target, bins) + 1e-12).log(), bins)
    close(best.mean(), target, rtol=1e-4)
    assert best.loss(target) < best.loss(target + 1) and best.loss(target) < best.loss(target - 1)


def test_without_last_drops_the_last_step() -> None:
    dist = TwoHot(torch.randn(3, 5, 255), ops.symexp_bins())
    assert torch.equal(dist.without_last().mean(), dist.mean()[:, :-1])


def test_the_bins_are_no_part_of_the_checkpoint() -> None:
    assert not any("bins" in name for name in TwoHotHead(6, 1, 8, 1.0, 255).state_dict())


def test_bernoulli_takes_soft_targets_and_predicts_its_probability() -> None:
    given, want = golden("bernoulli_soft_target")
    dist = Bernoulli(torch.full((3,), given["logit"]))
    losses = [want["v2_target_0.99"], want["v3_loss"], want["terminal_loss"]]
    close(dist.loss(torch.tensor(given["targets"])), losses)
    close(dist.mean(), torch.sigmoid(torch.full((3,), 2.0)))


def test_bernoulli_loss_of_a_soft_target_is_smallest_at_that_probability() -> None:
    target = torch.tensor(1 - 1 / 333)
    logit = torch.logit(target).requires_grad_()
    (grad,) = torch.autograd.grad(Bernoulli(logit).loss(target), logit)
    close(grad, 0.0, atol=1e-6)


def test_a_bernoulli_head_returns_one_number_per_state() -> None:
    assert BernoulliHead(6, 1, 8, 1.0)(torch.randn(3, 4, 6)).mean().shape == (3, 4)


def test_heads_return_float32_under_autocast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert TwoHotHead(6, 1, 8, 1.0, 255)(torch.randn(3, 6)).logits.dtype == torch.float32
        assert BernoulliHead(6, 1, 8, 1.0)(torch.randn(3, 6)).logits.dtype == torch.float32
