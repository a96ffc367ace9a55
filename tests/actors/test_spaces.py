import re
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from zoo import Everything

from actors.spaces import ActionWriter, BadOutput, ObsReader, random_actions, resize
from dreamer.spaces import (
    BoxAction,
    DiscreteAction,
    DiscreteSpec,
    ImageSpec,
    MultiBinaryAction,
    MultiDiscreteAction,
    VectorSpec,
)


def box(low: Any, high: Any, shape: tuple[int, ...], dtype: Any = np.float32) -> spaces.Box:
    return spaces.Box(low, high, shape, dtype)


@pytest.mark.parametrize(
    ("space", "want"),
    [
        (box(0, 255, (8, 8, 3), np.uint8), {"image": ImageSpec(shape=(8, 8, 3))}),
        (box(0, 255, (8, 8), np.uint8), {"image": ImageSpec(shape=(8, 8, 1))}),
        (box(-1, 1, (5,)), {"vector": VectorSpec(shape=(5,))}),
        (box(-1, 1, ()), {"vector": VectorSpec(shape=(1,))}),
        (box(0, 255, (128,), np.uint8), {"vector": VectorSpec(shape=(128,))}),
        (spaces.Discrete(7), {"discrete": DiscreteSpec(classes=7)}),
        (spaces.Dict({"x": spaces.Discrete(2)}), {"x": DiscreteSpec(classes=2)}),
    ],
)
def test_observation_space_becomes_specs(space: spaces.Space, want: dict[str, Any]) -> None:
    assert ObsReader(space).spec == want


@pytest.mark.parametrize(
    ("space", "words"),
    [
        (box(0, 1, (8, 8, 3)), "must be uint8, got float32; emit uint8 from 0 to 255"),
        (box(0, 1, (3, 3)), "FlattenObservation"),
        (spaces.Text(5), "cannot be observed"),
        (spaces.Tuple([spaces.Discrete(2)]), "cannot be observed"),
        (spaces.MultiBinary(3), "cannot be observed"),
        (spaces.Dict({"a": spaces.Dict({"b": spaces.Discrete(2)})}), "cannot be observed"),
        (spaces.Dict({}), "empty Dict"),
        (spaces.Dict({"reward": spaces.Discrete(2)}), "reward"),
        (spaces.Dict({"action.x": spaces.Discrete(2)}), "column name"),
        (box(0, 255, (3, 84, 84), np.uint8), "channels first"),
        (box(0, 255, (10, 20, 3), np.uint8), "or with --environment.image-size"),
        (spaces.Discrete(1), "at least 2 classes"),
    ],
)
def test_observation_space_that_does_not_fit_is_refused_in_one_sentence(
    space: spaces.Space, words: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        ObsReader(space)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("space", "words"),
    [
        (box(-np.inf, np.inf, (2,)), "finite bounds"),
        (box(0, 5, (2,), np.int32), "cannot be acted in"),
        (spaces.Tuple([spaces.Discrete(2)]), "cannot be acted in"),
        (spaces.Discrete(1), "at least 2 choices"),
        (spaces.Dict({}), "empty Dict"),
        (spaces.Dict({"a": spaces.Dict({"b": spaces.Discrete(2)})}), "cannot be acted in"),
    ],
)
def test_action_space_that_does_not_fit_is_refused(space: spaces.Space, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ActionWriter(space)


def test_observations_take_record_types() -> None:
    env = Everything()
    read = ObsReader(env.observation_space)
    obs = read.read(env.reset()[0])
    want = {"camera": "uint8", "speed": "float32", "joints": "float32", "mode": "int32"}
    assert {key: str(value.dtype) for key, value in obs.items()} == want
    assert obs["speed"].shape == (1,) and obs["mode"].shape == ()
    assert obs["mode"] == 0  # classes count from 0, whatever the space's start


def test_discrete_actions_keep_the_start_of_their_space() -> None:
    write = ActionWriter(spaces.Discrete(3, start=5))
    assert write.spec == {"action": DiscreteAction(classes=3)}
    assert write.native({"action": np.array(2, np.int32)}) == 7


def test_box_actions_are_clipped_and_mapped_to_the_bounds() -> None:
    low, high = np.array([-2, 0], np.float32), np.array([2, 10], np.float32)
    write = ActionWriter(spaces.Box(low, high))
    assert write.spec == {"action": BoxAction(low=(-2.0, 0.0), high=(2.0, 10.0))}
    for given, want in [
        ([-1, -1], [-2, 0]),
        ([0, 0], [0, 5]),
        ([3, -9], [2, 0]),
        ([1, 1], [2, 10]),
    ]:
        np.testing.assert_allclose(
            write.native({"action": np.array(given, np.float32)}), np.array(want, np.float32)
        )


def test_box_bounds_are_never_left_by_rounding() -> None:
    space = spaces.Box(np.float32(-0.1), np.float32(0.7), (1,), np.float32)
    write, rng = ActionWriter(space), np.random.default_rng(0)
    for _ in range(200):
        assert space.contains(write.native({"action": rng.normal(0, 2, 1).astype(np.float32)}))


def test_every_kind_of_action_reaches_the_environment_in_its_own_form() -> None:
    space = Everything().action_space
    write, rng = ActionWriter(space), np.random.default_rng(0)
    assert write.spec == {
        "action.gear": DiscreteAction(classes=3),
        "action.lights": MultiBinaryAction(size=2),
        "action.radio": MultiDiscreteAction(classes=(2, 5)),
        "action.wheel": BoxAction(low=(-2.0, 0.0), high=(2.0, 10.0)),
    }
    for _ in range(50):
        assert space.contains(write.native(random_actions(write.spec, rng)))


@pytest.mark.parametrize(
    ("space", "value", "reason"),
    [
        (box(-1, 1, (2,)), np.array([np.nan, 0.0]), "not_finite"),
        (box(-np.inf, np.inf, (2,)), np.array([np.inf, 0.0]), "not_finite"),
        (box(-1, 1, (2,)), np.array([1.5, 0.0]), "bounds"),
        (box(-1, 1, (2,)), np.zeros(3), "shape"),
        (box(-1, 1, (2,)), [[0.0], [0.0, 1.0]], "shape"),
        (box(-1, 1, (2,)), "words", "dtype"),
        (box(-1, 1, (2,)), None, "dtype"),
        (box(0, 9, (2,), np.int64), np.array([0.5, 1.0]), "dtype"),
        (box(0, 255, (8, 8, 3), np.uint8), np.zeros((8, 8, 3)), "dtype"),
        (box(0, 255, (8, 8, 3), np.uint8), np.zeros((8, 8, 1), np.uint8), "shape"),
        (spaces.Discrete(3), 3, "bounds"),
        (spaces.Discrete(3), -1, "bounds"),
        (spaces.Discrete(3), 1.0, "dtype"),
        (spaces.Dict({"a": spaces.Discrete(3)}), {"b": 1}, "keys"),
        (spaces.Dict({"a": spaces.Discrete(3)}), 1, "keys"),
    ],
)
def test_value_outside_of_its_space_is_rejected_with_its_reason(
    space: spaces.Space, value: Any, reason: str
) -> None:
    with pytest.raises(BadOutput) as caught:
        ObsReader(space).read(value)
    assert caught.value.reason == reason


def test_bounds_leave_room_for_the_rounding_of_float32() -> None:
    reader = ObsReader(box(-8.0, 8.0, (1,), np.float64))
    assert reader.read(np.array([8.0000001]))["vector"] == np.float32(8.0)


def test_images_are_resized_by_the_mean_of_what_each_pixel_covers() -> None:
    image = np.zeros((4, 8, 3), np.uint8)
    image[:2, :4] = 200
    small = ObsReader(box(0, 255, (4, 8, 3), np.uint8), image_size=2).read(image)["image"]
    assert small.shape == (2, 2, 3)
    np.testing.assert_array_equal(small[..., 0], [[200, 0], [0, 0]])
    np.testing.assert_array_equal(resize(np.full((5, 5, 4), 9, np.uint8), 3), np.full((3, 3, 4), 9))
