from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dreamer.weights import PackedWeights, WeightsError, pack, unpack
from tests.dreamer.cases import close


def tensors() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {"b": (3, 2), "a": (4,), "scale": (), "none": (0, 3)}
    return {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}


def changed(weights: PackedWeights, **manifest: Any) -> PackedWeights:
    return replace(weights, manifest=weights.manifest | manifest)


def test_float32_weights_come_back_exactly() -> None:
    packed = pack(tensors(), (1, 2), dtype=torch.float32)
    back = unpack(packed)
    assert set(back) == set(tensors())
    assert all(torch.equal(back[name], value) for name, value in tensors().items())


def test_bfloat16_weights_come_back_rounded_in_float32_and_half_the_size() -> None:
    packed = pack(tensors(), (1, 2))
    assert packed.buffer.nbytes == 2 * (6 + 4 + 1)
    for name, value in tensors().items():
        back = unpack(packed)[name]
        assert back.dtype == torch.float32
        assert torch.equal(back, value.bfloat16().float())


def test_the_manifest_has_plain_types_and_the_version() -> None:
    packed = pack(tensors(), (3, 70), config_hash="abc")
    assert packed.version == (3, 70)
    assert packed.manifest["config_hash"] == "abc"
    assert packed.manifest["tensors"][0] == ["a", [4], 0]
    assert packed.manifest["tensors"][1] == ["b", [3, 2], 4]
    assert {type(offset) for _, _, offset in packed.manifest["tensors"]} == {int}


def test_unpacked_tensors_do_not_share_the_buffer() -> None:
    packed = pack(tensors(), (1, 2), dtype=torch.float32)
    back = unpack(packed)
    packed.buffer[:] = 0
    close(back["a"], tensors()["a"])


def test_a_read_only_buffer_is_accepted() -> None:
    packed = pack(tensors(), (1, 2))
    packed.buffer.flags.writeable = False
    assert set(unpack(packed)) == set(tensors())


@pytest.mark.parametrize("byte", [0, -1])
def test_one_flipped_byte_is_noticed(byte: int) -> None:
    packed = pack(tensors(), (1, 2))
    packed.buffer[byte] ^= 1
    with pytest.raises(WeightsError, match=r"\(1, 2\) are damaged: sha256"):
        unpack(packed)


def test_a_truncated_buffer_is_noticed() -> None:
    packed = pack(tensors(), (1, 2))
    with pytest.raises(WeightsError, match="damaged"):
        unpack(replace(packed, buffer=packed.buffer[:-4]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(bad: float) -> None:
    packed = pack(tensors() | {"a": torch.tensor([0.0, bad])}, (1, 2))
    with pytest.raises(WeightsError, match="not finite; the old weights are kept"):
        unpack(packed)


def test_a_tensor_outside_the_buffer_is_refused_by_name() -> None:
    packed = pack(tensors(), (1, 2))
    for entry in (["a", [4], 10], ["a", [4], -1], ["a", [10_000], 0]):
        with pytest.raises(WeightsError, match="'a' lies outside"):
            unpack(changed(packed, tensors=[entry]))


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(WeightsError, match="'int8', expected bfloat16 or float32"):
        unpack(changed(pack(tensors(), (1, 2)), dtype="int8"))


def test_packing_does_not_change_the_tensors() -> None:
    before = tensors()
    packed = pack(before, (1, 2), dtype=torch.float32)
    packed.buffer[:] = 0
    assert all(torch.equal(before[name], value) for name, value in tensors().items())
    assert packed.buffer.dtype == np.uint8
