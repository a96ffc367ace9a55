from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dreamer.optim import Adam, LaProp
from tests.dreamer.cases import close, golden

YES = torch.tensor(True)

DEFAULTS: dict[str, Any] = {
    "lr": 4e-5,
    "warmup": 1000,
    "beta1": 0.9,
    "beta2": 0.999,
    "eps": 1e-20,
    "agc": 0.3,
    "agc_floor": 1e-3,
}


def make(params: list[nn.Parameter], **changes: Any) -> LaProp:
    return LaProp(params, **(DEFAULTS | changes))


def parameters() -> list[nn.Parameter]:
    rng = np.random.default_rng(0)
    shapes = [(4, 3), (5,), (2, 2, 3), ()]
    params = [nn.Parameter(torch.tensor(rng.normal(size=s), dtype=torch.float32)) for s in shapes]
    return [*params, nn.Parameter(torch.zeros(6))]


def test_ten_steps_equal_a_plain_loop_over_tensors() -> None:
    params = parameters()
    optim = make(params, lr=0.01, warmup=4)
    values = [p.detach().double().numpy().copy() for p in params]
    squares, momenta = ([np.zeros_like(v) for v in values] for _ in range(2))
    rng = np.random.default_rng(1)
    for k in range(10):
        grads = [rng.normal(size=v.shape) * 10.0 ** rng.integers(-6, 4) for v in values]
        optim.step([torch.tensor(g, dtype=torch.float32) for g in grads], YES)
        rate = 0.01 * min(1.0, k / 4)
        for i, g in enumerate(grads):
            limit = 0.3 * max(1e-3, np.linalg.norm(values[i]))
            g = g / max(1.0, np.linalg.norm(g) / limit)
            squares[i] = 0.999 * squares[i] + 0.001 * g**2
            scaled = g / (np.sqrt(squares[i] / (1 - 0.999 ** (k + 1))) + 1e-20)
            momenta[i] = 0.9 * momenta[i] + 0.1 * scaled
            values[i] = values[i] - rate * momenta[i] / (1 - 0.9 ** (k + 1))
    for param, value in zip(params, values, strict=True):
        close(param, value, rtol=1e-4, atol=1e-6)


def test_the_rate_ramps_up_linearly_from_zero() -> None:
    given, want = golden("warmup")
    optim = make([nn.Parameter(torch.ones(1))], lr=given["lr"], warmup=given["warmup"])
    rates = []
    for update in (0, 1, 500, 1000, 5000):
        optim.count.fill_(update)
        rates.append(optim.rate().item())
    assert rates == pytest.approx([*want["v3_lr_at_update_0_1_500_1000"], given["lr"]], rel=1e-6)


def test_update_zero_moves_nothing_and_update_one_does() -> None:
    param = nn.Parameter(torch.ones(3))
    optim = make([param])
    assert optim.step([torch.ones(3)], YES)["lr"] == 0.0
    assert torch.equal(param.detach(), torch.ones(3))
    optim.step([torch.ones(3)], YES)
    close(param, torch.full((3,), 1 - 4e-8), rtol=1e-7)


def test_without_warm_up_the_first_update_has_the_full_rate() -> None:
    param = nn.Parameter(torch.ones(3))
    optim = make([param], lr=0.1, warmup=0)
    assert optim.step([torch.tensor([1.0, -1.0, 0.0])], YES)["lr"] == pytest.approx(0.1)
    close(param, [0.9, 1.1, 1.0])


def test_clipping_matches_the_golden_values() -> None:
    given, want = golden("agc")
    param, grad = torch.tensor(given["param"]), torch.tensor(given["grad"])
    optim = make([], agc=given["clip"], agc_floor=given["pmin"])
    (clipped, zero), share, norm = optim._clip([param, torch.zeros_like(param)], [grad, grad])
    close(clipped, want["clipped"])
    close(clipped.norm(), want["clipped_norm"])
    close(zero, want["zero_param_clipped"], rtol=1e-5)
    close(zero.norm(), want["zero_param_upper"], rtol=1e-5)
    close(share, 1.0)
    close(norm, 50**0.5)


def test_small_gradients_are_not_clipped() -> None:
    grad = torch.full((4,), 1e-3)
    (clipped,), share, _ = make([])._clip([torch.ones(4)], [grad])
    assert torch.equal(clipped, grad) and share == 0.0


def test_a_changed_rate_acts_at_once_because_it_multiplies_after_the_momentum() -> None:
    param = nn.Parameter(torch.ones(2))
    optim = make([param], lr=0.1, warmup=0)
    optim.step([torch.ones(2)], YES)
    before, optim.lr = param.detach().clone(), 0.0
    optim.step([torch.ones(2)], YES)
    assert torch.equal(param.detach(), before)


def test_zero_gradients_stay_finite() -> None:
    param = nn.Parameter(torch.zeros(3))
    optim = make([param], lr=0.1, warmup=0)
    metrics = optim.step([torch.zeros(3)], YES)
    assert not param.any()
    assert all(torch.isfinite(value) for value in metrics.values())


def test_metrics_describe_the_step() -> None:
    param = nn.Parameter(torch.tensor([3.0, 4.0]))
    metrics = make([param], lr=0.1, warmup=0).step([torch.tensor([30.0, 40.0])], YES)
    assert metrics["grad_norm"] == pytest.approx(50.0)
    assert metrics["grad_clip_fraction"] == 1.0
    assert metrics["update_rms"] == pytest.approx(0.1, rel=1e-4)
    assert metrics["param_norm"] == pytest.approx((2.9**2 + 3.9**2) ** 0.5, rel=1e-4)


@pytest.mark.parametrize("kind", ["laprop", "adam", "adam with decay"])
def test_every_optimiser_describes_its_step_by_the_same_numbers(kind: str) -> None:
    params = [nn.Parameter(torch.tensor([3.0, 4.0])), nn.Parameter(torch.tensor([0.0]))]
    before = [param.detach().clone() for param in params]
    decay = 0.01 if "decay" in kind else 0.0
    optim = (
        make(params, lr=0.1, warmup=0)
        if kind == "laprop"
        else Adam(params, lr=0.1, eps=1e-8, clip=100.0, decay=decay)
    )
    found = optim.step([torch.tensor([30.0, 40.0]), torch.tensor([1.0])], YES)
    moved = [p - (1 - decay) * old for p, old in zip(params, before, strict=True)]
    want = {
        "lr": 0.1,
        "grad_norm": (30.0**2 + 40.0**2 + 1.0) ** 0.5,
        "grad_clip_fraction": 1.0 if kind == "laprop" else 0.0,
        "param_norm": torch.cat(params).norm().item(),
        "update_rms": torch.cat(moved).square().mean().sqrt().item(),
    }
    assert want["update_rms"] == pytest.approx(0.1, rel=1e-3)
    assert {name: x.item() for name, x in found.items()} == pytest.approx(want, rel=1e-4)
    assert all(x.dim() == 0 and x.dtype == torch.float32 for x in found.values())
    still = optim.step([torch.tensor([30.0, 40.0]), torch.tensor([1.0])], ~YES)
    assert still["update_rms"] == 0.0 and still["lr"] == pytest.approx(0.1)


def test_a_restored_optimiser_goes_on_exactly() -> None:
    torch.manual_seed(0)
    grads = [[torch.randn_like(p) for p in parameters()] for _ in range(6)]
    straight = parameters()
    optim = make(straight, lr=0.01, warmup=3)
    for grad in grads:
        optim.step(grad, YES)
    first, second = parameters(), parameters()
    before, after = (make(params, lr=0.01, warmup=3) for params in (first, second))
    for grad in grads[:3]:
        before.step(grad, YES)
    after.load_state_dict(before.state_dict())
    with torch.no_grad():
        for source, target in zip(first, second, strict=True):
            target.copy_(source)
    for grad in grads[3:]:
        after.step(grad, YES)
    for left, right in zip(straight, second, strict=True):
        assert torch.equal(left, right)


def adam(start: list[float], **changes: Any) -> tuple[nn.Parameter, Adam]:
    param = nn.Parameter(torch.tensor(start, dtype=torch.float64))
    return param, Adam([param], **({"lr": 0.1, "eps": 1e-8, "clip": 100.0} | changes))


def test_adam_matches_the_golden_steps() -> None:
    given, want = golden("adam_3steps")
    param, optimiser = adam([given["p0"]], lr=given["lr"], hat=False)
    found = []
    for grad in given["grads"]:
        optimiser.step([torch.tensor([grad], dtype=torch.float64)], YES)
        found.append(param.item())
    close(torch.tensor(found), want["adam_eps1e-8"])


@pytest.mark.parametrize(
    ("hat", "key"), [(True, "keras_eps_hat_1e-5"), (False, "pytorch_eps_1e-5")]
)
def test_adam_adds_epsilon_where_the_paper_does(hat: bool, key: str) -> None:
    given, want = golden("adam_keras_vs_pytorch_eps")
    param, optimiser = adam([given["p0"]], lr=given["lr"], eps=1e-5, hat=hat)
    found = []
    for grad in given["grads"]:
        optimiser.step([torch.tensor([grad], dtype=torch.float64)], YES)
        found.append(param.item())
    close(torch.tensor(found), want[key])


def test_adam_clips_by_the_norm_over_all_tensors() -> None:
    given, want = golden("global_norm_clip")
    params = [nn.Parameter(torch.zeros(len(grad))) for grad in given["grads"]]
    optimiser = Adam(params, lr=0.1, eps=1e-8, clip=given["clip"])
    metrics = optimiser.step([torch.tensor(grad) for grad in given["grads"]], YES)
    close(metrics["grad_norm"], want["norm"])
    assert metrics["grad_clip_fraction"] == 1.0
    for i, clipped in enumerate(want["clipped"]):
        # The first momentum is a tenth of the clipped gradient.
        close(getattr(optimiser, f"momentum_{i}"), 0.1 * torch.tensor(clipped))


def test_decay_shrinks_every_parameter_whatever_the_rate() -> None:
    param, optimiser = adam([2.0], lr=0.0, decay=0.01)
    optimiser.step([torch.ones(1, dtype=torch.float64)], YES)
    close(param, [1.98])


def test_gradients_inside_the_limit_are_left_as_they_are() -> None:
    param, optimiser = adam([0.0])
    metrics = optimiser.step([torch.tensor([3.0], dtype=torch.float64)], YES)
    assert metrics["grad_clip_fraction"] == 0.0
    close(optimiser.momentum_0, [0.3])
    close(param, [-0.1], rtol=1e-5)


@pytest.mark.parametrize("kind", ["laprop", "adam", "adam with decay"])
def test_a_step_that_does_not_apply_changes_nothing_at_all(kind: str) -> None:
    params = parameters()
    adam = {"lr": 0.1, "eps": 1e-5, "clip": 1.0, "decay": 0.01 if "decay" in kind else 0.0}
    optim = make(params, lr=0.1, warmup=0) if kind == "laprop" else Adam(params, **adam)
    rng = np.random.default_rng(0)

    def state() -> list[torch.Tensor]:
        return [x.detach().clone() for x in (*params, *optim.buffers())]

    for before_any in (True, False):
        if not before_any:
            optim.step([torch.tensor(rng.normal(size=p.shape)).float() for p in params], YES)
        before = state()
        optim.step([torch.full_like(p, float("nan")) for p in params], ~YES)
        for old, new in zip(before, state(), strict=True):
            assert torch.equal(old, new)
    optim.step([torch.ones_like(p) for p in params], YES)
    assert not torch.equal(before[0], params[0])
