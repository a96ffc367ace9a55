from __future__ import annotations

import pytest

import replay_service
from replay_service import Column, ReplaySchemaError, Schema
from replay_service.schema import REQUIRED
from tests.replay_service.records import SCHEMA

BASE = tuple(Column(*row) for row in REQUIRED)


def test_every_public_name_resolves() -> None:
    assert all(getattr(replay_service, name) is not None for name in replay_service.__all__)
    assert set(dir(replay_service)) >= set(replay_service.__all__)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = replay_service.nonsense


def test_hash_ignores_the_order_of_columns_and_nothing_else() -> None:
    turned = Schema(tuple(reversed(SCHEMA.columns)))
    assert turned.hash == SCHEMA.hash and len(SCHEMA.hash) == 8
    wider = Schema((*SCHEMA.columns[1:], Column("image", "uint8", (2, 3, 2))))
    assert wider.hash != SCHEMA.hash


def test_dictionary_form_round_trips() -> None:
    assert Schema.from_dict(SCHEMA.to_dict()) == SCHEMA
    with pytest.raises(ReplaySchemaError, match="not the description"):
        Schema.from_dict({"columns": [1]})


def test_step_bytes_add_up() -> None:
    assert SCHEMA.step_bytes == 12 + 12 + 4 + 3 + 4 + 8 + 4 + 8


def test_difference_names_each_column_that_differs() -> None:
    mine = Schema((*BASE, Column("action", "int32"), Column("vector", "float32", (3,))))
    other = Schema((*BASE, Column("vector", "float32", (4,)), Column("image", "uint8", (2,))))
    assert mine.difference(other) == (
        "action: int32[] is missing; image: uint8[2] is extra; vector: float32[3] became float32[4]"
    )
    assert mine.difference(mine) == ""


@pytest.mark.parametrize(
    ("columns", "want"),
    [
        ((), "needs the column reward"),
        (BASE[:3], "needs the column is_terminal"),
        ((*BASE, Column("a", "int32"), Column("a", "int32")), "named twice: a"),
        (tuple(Column(f"c{i}", "bool") for i in range(65)), "at most 64 columns"),
    ],
)
def test_schema_refuses(columns: tuple[Column, ...], want: str) -> None:
    with pytest.raises(ReplaySchemaError, match=want):
        Schema(columns)


@pytest.mark.parametrize(
    ("arguments", "want"),
    [
        (("", "int32", ()), "1 to 80 characters"),
        (("a", "object", ()), "use one of"),
        (("a", "int32", (0,)), "each >= 1"),
        (("a", "int32", (1, 1, 1, 1, 1)), "up to four sizes"),
    ],
)
def test_column_refuses(arguments: tuple[str, str, tuple[int, ...]], want: str) -> None:
    with pytest.raises(ReplaySchemaError, match=want):
        Column(*arguments)
