import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dreamer.conv import (
    Conv,
    ConvDecoder,
    ConvEncoder,
    check_image_size,
    phase_matrix,
    upsample_conv,
)
from dreamer.presets import SIZES
from tests.dreamer.cases import close, golden


def plain_upsample_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The definition: nearest ×2, then a same-padded convolution of the large image."""
    large = F.interpolate(x.permute(0, 3, 1, 2), scale_factor=2, mode="nearest")
    out = F.conv2d(large, weight, bias, padding=weight.shape[-1] // 2)
    return out.permute(0, 2, 3, 1)


@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (4, 4)])
def test_upsample_conv_equals_upsampling_then_convolving(
    kernel: int, size: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, *size, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 3, kernel, kernel, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
    outs = [rule(x, weight, bias) for rule in (upsample_conv, plain_upsample_conv)]
    close(outs[0], outs[1], rtol=1e-9, atol=1e-12)
    pull = torch.randn_like(outs[0])
    grads = [torch.autograd.grad((out * pull).sum(), (x, weight, bias)) for out in outs]
    for ours, plain in zip(*grads, strict=True):
        close(ours, plain, rtol=1e-9, atol=1e-12)


def test_phase_matrix_of_kernel_five_reads_three_small_pixels_per_parity() -> None:
    even, odd = phase_matrix(5)
    assert even.tolist() == [[1, 1, 0, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]]
    assert odd.tolist() == [[1, 0, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 1, 1]]


def test_conv_is_same_padded_and_channels_last() -> None:
    torch.manual_seed(0)
    conv, x = Conv(3, 6, 5), torch.randn(2, 8, 8, 3)
    want = F.conv2d(x.permute(0, 3, 1, 2), conv.weight, conv.bias, padding=2)
    close(conv(x), want.permute(0, 2, 3, 1), rtol=1e-5, atol=1e-5)


def test_conv_starts_with_kernel_area_times_channels_as_fan_in() -> None:
    torch.manual_seed(0)
    close(Conv(64, 64, 5).weight.var(), 1 / (25 * 64), rtol=0.02)


def test_encoder_resolutions_and_embedding_sizes_match_the_golden_ones() -> None:
    _, want = golden("conv_shapes")
    for name, key in (("12m", "v3_size12m_embed"), ("200m", "v3_200m_embed")):
        depth = SIZES[name][3]
        with torch.device("meta"):
            tower = ConvEncoder(64, 3, tuple(depth * mult for mult in (2, 3, 4, 4)), 5)
        assert tower.outputs == want[key]
    sizes: list[int] = []
    tower = ConvEncoder(64, 3, (2, 3, 4, 4), 5)
    for conv in tower.convs:
        conv.register_forward_hook(lambda module, args, out: sizes.append(args[0].shape[1]))
    assert tower(torch.zeros(2, 64, 64, 3)).shape == (2, 4 * 4 * 4)
    assert [*sizes, 4] == want["v3_2024_encoder_res"]


def test_encoder_stage_is_conv_pool_norm_silu() -> None:
    torch.manual_seed(0)
    tower, x = ConvEncoder(4, 2, (3,), 5), torch.randn(2, 4, 4, 2)
    weight, bias = tower.convs[0].weight, tower.convs[0].bias
    image = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=2)
    pooled = image.reshape(2, 3, 2, 2, 2, 2).amax((3, 5)).permute(0, 2, 3, 1)
    normed = pooled / (pooled.square().mean(-1, keepdim=True) + 1e-4).sqrt()
    close(tower(x), F.silu(normed).reshape(2, -1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [16, 48, 96])
def test_decoder_returns_images_of_the_size_that_it_was_built_for(size: int) -> None:
    tower = ConvDecoder(size, 3, (4, 6, 8, 8), 5, deter=16, stoch=12, units=8, blocks=8)
    assert tower(torch.randn(2, 16), torch.randn(2, 12)).shape == (2, size, size, 3)


def test_decoder_stem_gives_each_block_its_own_channels_at_every_pixel() -> None:
    tower = ConvDecoder(64, 3, (4, 6, 8, 8), 5, deter=16, stoch=12, units=8, blocks=8)
    with torch.no_grad():
        tower.from_stoch.weight.zero_()
    seen: list[Tensor] = []
    tower.stem_norm.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    deter = torch.zeros(1, 16)
    deter[0, 2:4] = torch.tensor([1.0, -1.0])  # only the second of eight blocks
    tower(deter, torch.zeros(1, 12))
    moved = (seen[0] != 0).any(0).flatten(0, 1).any(0)
    assert seen[0].shape == (1, 4, 4, 8)
    assert moved.tolist() == [False, True, False, False, False, False, False, False]


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (84, ["image 'camera' is 84×84", "multiple of 16", "80 or 96"]),
        (10, ["image 'camera' is 10×10", "multiple of 16", "16 or 16"]),
    ],
)
def test_an_image_that_does_not_halve_cleanly_is_refused(size: int, words: list[str]) -> None:
    with pytest.raises(ValueError) as refused:
        check_image_size("camera", size, 4)
    assert all(word in str(refused.value) for word in words), refused.value
