import json
from collections.abc import Callable
from typing import Any

import pytest

from dreamer.spaces import (
    BoxAction,
    DiscreteAction,
    DiscreteSpec,
    ImageSpec,
    MultiBinaryAction,
    MultiDiscreteAction,
    VectorSpec,
    check_observation_names,
    record_column,
    space_from_dict,
    space_to_dict,
)
from tests.dreamer.cases import ACTIONS, OBS


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: ImageSpec(shape=(64, 48, 3)), "square (h, w, c) with h == w, got (64, 48, 3)"),
        (lambda: ImageSpec(shape=(0, 0, 3)), "got (0, 0, 3)"),
        (lambda: VectorSpec(shape=(0,)), "shape (d,) with d >= 1, got (0,)"),
        (lambda: VectorSpec(shape=(2, 3)), "got (2, 3)"),  # type: ignore[arg-type]
        (lambda: DiscreteSpec(classes=1), "at least 2 classes, got 1"),
        (lambda: DiscreteAction(classes=1), "at least 2 choices, got 1"),
        (lambda: BoxAction(low=(0.0,), high=(1.0, 2.0)), "matching bounds"),
        (lambda: BoxAction(low=(), high=()), "matching bounds"),
        (lambda: BoxAction(low=(1.0,), high=(1.0,)), "low < high, got [1.0, 1.0]"),
        (lambda: BoxAction(low=(-float("inf"),), high=(1.0,)), "finite bounds"),
        (lambda: BoxAction(low=(float("nan"),), high=(1.0,)), "finite bounds"),
        (lambda: MultiDiscreteAction(classes=()), ">= 2 choices, got ()"),
        (lambda: MultiDiscreteAction(classes=(3, 1)), ">= 2 choices, got (3, 1)"),
        (lambda: MultiBinaryAction(size=0), "at least one bit, got 0"),
    ],
)
def test_a_space_that_nobody_can_act_in_is_refused(build: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError) as refused:
        build()
    assert words in str(refused.value)


@pytest.mark.parametrize(
    "key", ["reward", "is_first", "is_last", "is_terminal", "deter", "stoch", "action", "action.x"]
)
def test_observation_keys_that_are_columns_of_the_record_are_refused(key: str) -> None:
    with pytest.raises(ValueError, match=f"{key!r} is a column name.*rename it"):
        check_observation_names({key: VectorSpec(shape=(1,))})


def test_ordinary_observation_keys_are_accepted() -> None:
    check_observation_names(OBS | {"actions_left": DiscreteSpec(classes=3)})


@pytest.mark.parametrize("space", [OBS, ACTIONS], ids=["observations", "actions"])
def test_spaces_survive_json(space: dict[str, Any]) -> None:
    assert space_from_dict(json.loads(json.dumps(space_to_dict(space)))) == space


def test_an_unknown_kind_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="space 'x' has kind 'Tuple', expected one of"):
        space_from_dict({"x": {"kind": "Tuple"}})


def test_record_columns_have_the_types_of_the_replay() -> None:
    assert {key: record_column(spec) for key, spec in (OBS | ACTIONS).items()} == {
        "image": ("uint8", (16, 16, 3)),
        "vector": ("float32", (3,)),
        "mode": ("int32", ()),
        "action.turn": ("int32", ()),
        "action.push": ("float32", (2,)),
        "action.keys": ("int32", (2,)),
        "action.bits": ("int32", (2,)),
    }
