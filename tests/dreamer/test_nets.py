import math

import pytest
import torch

from dreamer.nets import LAYER_SILU, MLP, BlockLinear, Dense, Linear, RMSNorm, trunc_normal_
from dreamer.strided import StridedConv
from tests.dreamer.cases import close, golden


def test_block_linear_matches_the_golden_product() -> None:
    given, want = golden("block_linear")
    layer = BlockLinear(4, 4, given["blocks"])
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(given["kernel"]))
    close(layer(torch.tensor(given["x"])), want["y"])


def test_block_linear_equals_a_dense_block_diagonal_product() -> None:
    torch.manual_seed(0)
    layer = BlockLinear(12, 8, 4)
    with torch.no_grad():
        layer.bias.normal_()
    dense = torch.block_diag(*layer.weight)
    x = torch.randn(2, 5, 12)
    close(layer(x), x @ dense + layer.bias, rtol=1e-5, atol=1e-6)


def test_block_linear_refuses_widths_that_the_blocks_do_not_divide() -> None:
    with pytest.raises(AssertionError):
        BlockLinear(10, 8, 4)


def test_rms_norm_matches_the_golden_values() -> None:
    given, want = golden("norms")
    norm = RMSNorm(4)
    close(norm(torch.tensor(given["x"])), want["rms_eps1e-4"])
    close(norm(torch.tensor(given["x_tiny"])), want["rms_eps1e-4_tiny"])


def test_rms_norm_computes_in_float32_and_keeps_the_type_of_its_input() -> None:
    norm = RMSNorm(64)
    x = torch.randn(3, 64).bfloat16()
    assert norm(x).dtype == torch.bfloat16
    assert torch.equal(norm(x), norm(x.float()).bfloat16())


def test_initialiser_is_a_normal_cut_at_two_deviations_with_variance_one_over_fan_in() -> None:
    torch.manual_seed(0)
    weight = torch.empty(400, 500)
    trunc_normal_(weight, fan_in=50)
    cut = 2 * 1.1368 / math.sqrt(50)
    assert weight.abs().max() <= cut
    assert weight.abs().max() > 0.99 * cut
    close(weight.mean(), 0.0, atol=2e-3)
    close(weight.var(), 1 / 50, rtol=0.02)


def test_linear_starts_with_full_fan_in_and_zero_bias() -> None:
    torch.manual_seed(0)
    layer = Linear(256, 512)
    close(layer.weight.var(), 1 / 256, rtol=0.02)
    assert not layer.bias.any()


@pytest.mark.parametrize("outscale", [0.0, 0.01])
def test_outscale_multiplies_the_deviation(outscale: float) -> None:
    torch.manual_seed(0)
    close(Linear(256, 512, outscale).weight.std(), outscale / 16, rtol=0.01)


def test_block_linear_counts_the_full_input_width_as_fan_in() -> None:
    _, want = golden("block_linear")
    torch.manual_seed(0)
    layer = BlockLinear(512, 512, 8)
    close(layer.weight.var(), 1 / 512, rtol=0.03)
    assert not layer.bias.any()
    assert want["init_fan_in_used"] == 4  # of two blocks of two inputs


def test_dense_is_linear_then_norm_then_silu() -> None:
    torch.manual_seed(0)
    layer, x = Dense(6, 4), torch.randn(3, 6)
    hidden = x @ layer.linear.weight.T + layer.linear.bias
    hidden = hidden / (hidden.square().mean(-1, keepdim=True) + 1e-4).sqrt()
    close(layer(x), hidden * torch.sigmoid(hidden), rtol=1e-5, atol=1e-6)


def test_mlp_without_layers_passes_its_input_on() -> None:
    x = torch.randn(2, 5)
    assert torch.equal(MLP(5, 0, 8)(x), x)


def test_mlp_keeps_every_leading_axis() -> None:
    assert MLP(5, 2, 8)(torch.randn(2, 3, 5)).shape == (2, 3, 8)


def test_layers_of_2023_start_by_the_mean_of_both_fans() -> None:
    torch.manual_seed(0)
    hidden = Dense(300, 100, LAYER_SILU).linear
    assert hidden.bias is None
    deviation = 200**-0.5
    assert hidden.weight.std().item() == pytest.approx(deviation, rel=0.02)
    # Cut at two deviations of the normal, which are larger than those that are left.
    limit = 2 * deviation / 0.87962566
    assert 0.95 * limit < hidden.weight.abs().max().item() <= limit
    out = LAYER_SILU.out(300, 100)
    limit = (3 / 200) ** 0.5
    assert 0.99 * limit < out.weight.abs().max().item() <= limit
    assert not out.bias.any()


def test_convolutions_of_2023_count_the_kernel_in_both_fans() -> None:
    torch.manual_seed(0)
    conv = StridedConv(16, 48, 4, LAYER_SILU.hidden_init)
    deviation = (16 * 32) ** -0.5
    assert conv.weight.std().item() == pytest.approx(deviation, rel=0.03)
    assert conv.weight.abs().max().item() <= 2 * deviation / 0.87962566 + 1e-6
