import pytest
import torch
import torch.nn.functional as F

from dreamer.backbone import pooled_decoder
from dreamer.config import DecoderConfig
from dreamer.decoder import Decoder
from dreamer.spaces import DiscreteSpec, ImageSpec, ObsSpace, VectorSpec
from tests.dreamer.cases import close, golden, random_obs

CONFIG = DecoderConfig(depth=2, units=8)
SPACE: ObsSpace = {
    "wrist": ImageSpec(shape=(16, 16, 1)),
    "front": ImageSpec(shape=(16, 16, 3)),
    "map": ImageSpec(shape=(32, 32, 1)),
    "speed": VectorSpec(shape=(2,)),
    "gear": DiscreteSpec(classes=5),
}


def decoder_of(space: ObsSpace = SPACE) -> Decoder:
    torch.manual_seed(0)
    return pooled_decoder(space, CONFIG, deter=16, stoch=12)


def test_every_key_is_reconstructed_in_its_own_shape() -> None:
    out = decoder_of()(torch.randn(2, 3, 16), torch.randn(2, 3, 12))
    shapes = {key: tuple(value.shape[2:]) for key, value in out.items()}
    assert shapes == {
        "front": (16, 16, 3),
        "wrist": (16, 16, 1),
        "map": (32, 32, 1),
        "speed": (2,),
        "gear": (5,),
    }


def test_every_loss_is_one_number_per_step() -> None:
    decoder = decoder_of()
    obs = {key: torch.from_numpy(x) for key, x in random_obs(SPACE, (2, 3)).items()}
    losses = decoder.losses(decoder(torch.randn(2, 3, 16), torch.randn(2, 3, 12)), obs)
    assert set(losses) == set(SPACE)
    assert all(loss.shape == (2, 3) for loss in losses.values())


def test_image_loss_is_the_squared_error_of_the_sigmoid_summed_over_pixels_without_a_half() -> None:
    decoder = decoder_of({"image": ImageSpec(shape=(16, 16, 3))})
    logits, image = torch.randn(1, 2, 16, 16, 3), torch.randint(256, (1, 2, 16, 16, 3)).byte()
    want = (torch.sigmoid(logits) - image / 255.0).square().sum((2, 3, 4))
    close(decoder.losses({"image": logits}, {"image": image})["image"], want, rtol=1e-5)


def test_image_targets_match_the_golden_scaling() -> None:
    given, want = golden("image_scaling")
    decoder = decoder_of({"image": ImageSpec(shape=(16, 16, 3))})
    logits = torch.zeros(1, 1, 16, 16, 3)
    image = torch.tensor(given["u8"], dtype=torch.uint8).expand(1, 1, 16, 16, 3)
    expected = 256 * sum((0.5 - target) ** 2 for target in want["v3_2024_decoder_target"])
    close(decoder.losses({"image": logits}, {"image": image})["image"][0, 0], expected, rtol=1e-5)


def test_vector_loss_is_the_squared_error_in_symlog_space_without_a_half() -> None:
    given, want = golden("loss_factors")
    decoder = decoder_of({"speed": VectorSpec(shape=(1,))})
    predicted, target = torch.tensor([[[given["pred"]]]]), torch.tensor([[[given["target"]]]])
    loss = decoder.losses({"speed": predicted}, {"speed": target})["speed"]
    close(loss[0, 0], want["v3_symlog_mse"])
    exact = torch.tensor([[[5.0]]]).log1p()
    close(decoder.losses({"speed": exact}, {"speed": torch.tensor([[[5.0]]])})["speed"], [[0.0]])


def test_discrete_loss_is_the_cross_entropy_of_the_class() -> None:
    decoder = decoder_of({"gear": DiscreteSpec(classes=5)})
    logits, index = torch.randn(2, 3, 5), torch.randint(5, (2, 3), dtype=torch.int32)
    want = -F.log_softmax(logits, -1).gather(-1, index.long()[..., None])[..., 0]
    close(decoder.losses({"gear": logits}, {"gear": index})["gear"], want, rtol=1e-5)


def test_images_are_between_zero_and_one_and_only_images() -> None:
    images = decoder_of().images(100 * torch.randn(1, 2, 16), torch.randn(1, 2, 12))
    assert set(images) == {"front", "wrist", "map"}
    assert all(0 <= image.min() and image.max() <= 1 for image in images.values())


@pytest.mark.parametrize("key", ["robot.arm", "values", "type", "keys"])
def test_any_key_name_works_even_those_of_module_methods(key: str) -> None:
    decoder = decoder_of({key: VectorSpec(shape=(2,))})
    assert set(decoder(torch.randn(1, 1, 16), torch.randn(1, 1, 12))) == {key}
