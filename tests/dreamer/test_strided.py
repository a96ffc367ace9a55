import pytest
import torch
import torch.nn.functional as F

from dreamer.nets import LAYER_SILU, PLAIN_ELU
from dreamer.strided import same_decoder, same_encoder, valid_decoder, valid_encoder
from tests.dreamer.cases import close, golden


def test_valid_towers_have_the_golden_sides() -> None:
    _, want = golden("conv_shapes")
    encoder = valid_encoder(64, 3, 4, PLAIN_ELU)
    x, sides = torch.rand(1, 64, 64, 3), [64]
    for conv in encoder.convs:
        x = conv(x)
        sides.append(x.shape[1])
    assert sides == want["encoder_valid_k4s2"]
    assert valid_encoder(64, 3, 32, PLAIN_ELU).outputs == want["v1_embed"]
    assert valid_encoder(64, 3, 48, PLAIN_ELU).outputs == want["v2_embed"]
    decoder = valid_decoder(64, 3, 10, 2, PLAIN_ELU)
    x = decoder.stem(torch.rand(1, 10)).unflatten(-1, decoder.shape)
    sides = [x.shape[1]]
    for conv in decoder.convs:
        x = conv(x)
        sides.append(x.shape[1])
    assert sides == want["decoder_k5566s2"]


@pytest.mark.parametrize("size", [16, 64])
def test_same_towers_halve_down_to_four_and_double_back(size: int) -> None:
    encoder = same_encoder(size, 3, 2, LAYER_SILU)
    assert encoder.outputs == 4 * 4 * 2 * 2 ** (len(encoder.convs) - 1)
    assert encoder(torch.rand(2, size, size, 3)).shape == (2, encoder.outputs)
    decoder = same_decoder(size, 3, 10, 2, LAYER_SILU)
    assert decoder(torch.rand(2, 4), torch.rand(2, 6)).shape == (2, size, size, 3)


def test_a_convolution_equals_the_plain_one() -> None:
    torch.manual_seed(0)
    encoder, x = valid_encoder(64, 2, 3, PLAIN_ELU), torch.randn(2, 64, 64, 2)
    conv = encoder.convs[0]
    plain = F.conv2d(x.permute(0, 3, 1, 2), conv.weight, conv.bias, stride=2)
    close(conv(x), plain.permute(0, 2, 3, 1), rtol=1e-5, atol=1e-6)


def test_layers_before_a_norm_have_no_bias_and_the_last_one_has() -> None:
    decoder = same_decoder(16, 3, 10, 2, LAYER_SILU)
    assert decoder.convs[0].bias is None and decoder.convs[-1].bias is not None


@pytest.mark.parametrize("size", [32, 96])
def test_images_that_do_not_fit_valid_towers_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match=rf"fit images of 64×64, got {size}×{size}"):
        valid_encoder(size, 3, 2, PLAIN_ELU)


def test_sides_that_do_not_halve_down_to_four_are_refused() -> None:
    with pytest.raises(ValueError, match="4 times a power of two, got 96"):
        same_encoder(96, 3, 2, LAYER_SILU)
