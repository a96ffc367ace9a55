import numpy as np
import torch

from dreamer.normalize import PercentileScale
from tests.dreamer.cases import close


def make_scale() -> PercentileScale:
    return PercentileScale(rate=0.01, low=0.05, high=0.95, limit=1.0)


def test_small_returns_are_never_blown_up() -> None:
    assert make_scale().update(torch.linspace(-0.4, 0.4, 100)) == 1.0


def test_the_scale_is_the_running_range_between_the_percentiles() -> None:
    scale, rng, low, high = make_scale(), np.random.default_rng(0), 0.0, 0.0
    for _ in range(30):
        returns = rng.normal(scale=100.0, size=(8, 15))
        low = 0.99 * low + 0.01 * np.percentile(returns, 5)
        high = 0.99 * high + 0.01 * np.percentile(returns, 95)
        got = scale.update(torch.tensor(returns))
        close(got, max(1.0, high - low), rtol=1e-4)
    assert high - low > 50


def test_metrics_are_the_running_percentiles_as_they_were_then() -> None:
    scale = PercentileScale(rate=0.5, low=0.1, high=0.9, limit=1.0)
    scale.update(torch.linspace(0, 10, 11))
    found = scale.metrics()
    scale.update(torch.linspace(0, 1000, 11))
    assert {name: round(x.item(), 5) for name, x in found.items()} == {
        "return_percentile/10": 0.5,
        "return_percentile/90": 4.5,
        "return_scale": 4.0,
    }


def test_the_averages_start_at_zero_and_are_updated_before_they_are_used() -> None:
    returns = torch.tensor([-1000.0, 1000.0])
    close(make_scale().update(returns), 0.01 * 1800.0, rtol=1e-5)


def test_the_averages_are_part_of_the_checkpoint() -> None:
    scale, other = make_scale(), make_scale()
    scale.update(torch.tensor([-1000.0, 1000.0]))
    other.load_state_dict(scale.state_dict())
    assert torch.equal(other.update(torch.zeros(2)), scale.update(torch.zeros(2)))
