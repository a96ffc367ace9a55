import pytest
import torch

from dreamer import ops
from dreamer.backbone import pooled_encoder
from dreamer.config import EncoderConfig
from dreamer.encoder import image_groups, vector_keys
from dreamer.spaces import DiscreteSpec, ImageSpec, ObsSpace, VectorSpec
from tests.dreamer.cases import close, golden, random_obs

CONFIG = EncoderConfig(depth=2, units=8)
SPACE: ObsSpace = {
    "wrist": ImageSpec(shape=(16, 16, 1)),
    "front": ImageSpec(shape=(16, 16, 3)),
    "map": ImageSpec(shape=(32, 32, 1)),
    "speed": VectorSpec(shape=(2,)),
    "gear": DiscreteSpec(classes=5),
}


def tensors(space: ObsSpace, seed: int = 0) -> dict[str, torch.Tensor]:
    return {key: torch.from_numpy(x) for key, x in random_obs(space, (2, 3), seed).items()}


def test_images_of_one_size_share_a_tower_and_keys_are_sorted() -> None:
    assert image_groups(SPACE) == {16: ["front", "wrist"], 32: ["map"]}
    assert vector_keys(SPACE) == ["gear", "speed"]


def test_any_mix_of_keys_becomes_one_embedding_of_the_announced_size() -> None:
    encoder = pooled_encoder(SPACE, CONFIG)
    assert encoder.outputs == 8 + 1 * 8 + 4 * 8
    assert encoder(tensors(SPACE)).shape == (2, 3, encoder.outputs)


@pytest.mark.parametrize("key", SPACE)
def test_every_key_moves_the_embedding(key: str) -> None:
    torch.manual_seed(0)
    encoder = pooled_encoder(SPACE, CONFIG)
    obs, other = tensors(SPACE), tensors(SPACE, seed=1)
    assert not torch.equal(encoder(obs), encoder(obs | {key: other[key]}))


def test_the_order_of_the_keys_does_not_matter() -> None:
    torch.manual_seed(0)
    encoder, obs = pooled_encoder(SPACE, CONFIG), tensors(SPACE)
    assert torch.equal(encoder(obs), encoder(dict(reversed(obs.items()))))


def test_vectors_enter_as_symlog_and_discrete_keys_as_one_hot() -> None:
    torch.manual_seed(0)
    encoder = pooled_encoder({"gear": SPACE["gear"], "speed": SPACE["speed"]}, CONFIG)
    obs = {"gear": torch.tensor([[3]]), "speed": torch.tensor([[[1e4, -2.0]]])}
    flat = torch.cat([torch.eye(5)[3], ops.symlog(torch.tensor([1e4, -2.0]))])
    close(encoder(obs)[0, 0], encoder.mlp(flat), rtol=1e-5, atol=1e-6)


def test_images_enter_the_tower_between_minus_a_half_and_a_half() -> None:
    given, want = golden("image_scaling")
    encoder = pooled_encoder({"image": ImageSpec(shape=(16, 16, 3))}, CONFIG)
    seen: list[torch.Tensor] = []
    encoder.towers["16"].register_forward_hook(lambda module, args, out: seen.append(args[0]))
    image = torch.zeros(1, 1, 16, 16, 3, dtype=torch.uint8)
    image[0, 0, 0, 0] = torch.tensor(given["u8"])
    encoder({"image": image})
    close(seen[0][0, 0, 0], want["v3_encoder_input"], atol=1e-7)


def test_an_empty_space_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one key"):
        pooled_encoder({}, CONFIG)


def test_a_reserved_key_is_refused() -> None:
    with pytest.raises(ValueError, match="'reward' is a column name"):
        pooled_encoder({"reward": VectorSpec(shape=(1,))}, CONFIG)


def test_an_image_that_does_not_fit_is_refused_by_its_name() -> None:
    with pytest.raises(ValueError, match="image 'front' is 84×84"):
        pooled_encoder({"front": ImageSpec(shape=(84, 84, 3))}, CONFIG)
