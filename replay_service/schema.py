"""What one step of experience consists of, and which moment each column belongs to.

Record ``t`` of a stream holds everything that the environment emitted at ``t`` and the action that
was chosen *after* seeing it::

    record          t              t+1            t+2
                ┌─────────┐    ┌─────────┐    ┌─────────┐
    emitted     │ obs     │    │ obs     │    │ obs     │
    at t        │ reward ◀─┐   │ reward ◀─┐   │ reward  │   reward of arriving here (0 at is_first)
                │ is_first│ │  │ is_first│ │  │ is_first│
                │ is_last │ │  │ is_last │ │  │ is_last │
                │ is_term.│ │  │ is_term.│ │  │ is_term.│
    latent      │ deter   │ │  │ deter   │ │  │ deter   │   optional: the state inferred from obs t
                │ stoch   │ │  │ stoch   │ │  │ stoch   │
    chosen      │ action ─┼─┘  │ action ─┼─┘  │ action  │   all zero where is_last
    after t     └─────────┘    └─────────┘    └─────────┘

A world model wants the action that *led* to the observation. That shift is made when a batch is
built, in one place, and never here.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from replay_service.errors import ReplaySchemaError

DTYPES = ("bool", "uint8", "int32", "int64", "float16", "float32")
REQUIRED = (
    ("reward", "float32", ()),
    ("is_first", "bool", ()),
    ("is_last", "bool", ()),
    ("is_terminal", "bool", ()),
)
MAX_COLUMNS = 64
MAX_NAME_CHARS = 80


@dataclass(frozen=True)
class Column:
    """One named array per step.

    Args:
        name: key of the record, at most 80 characters.
        dtype: one of ``bool uint8 int32 int64 float16 float32``.
        shape: shape of one step, without the time axis.
    """

    name: str
    dtype: str
    shape: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(size) for size in self.shape))
        if not self.name or len(self.name) > MAX_NAME_CHARS:
            raise ReplaySchemaError(
                f"a column name needs 1 to {MAX_NAME_CHARS} characters, got {self.name!r}"
            )
        if self.dtype not in DTYPES:
            raise ReplaySchemaError(
                f"column {self.name!r} has dtype {self.dtype!r}; use one of {', '.join(DTYPES)}"
            )
        if len(self.shape) > 4 or any(size < 1 for size in self.shape):
            raise ReplaySchemaError(
                f"column {self.name!r} has shape {self.shape}; use up to four sizes, each >= 1"
            )

    @property
    def step_bytes(self) -> int:
        """Bytes of one step."""
        return np.dtype(self.dtype).itemsize * math.prod(self.shape)

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}{list(self.shape)}"


@dataclass(frozen=True)
class Schema:
    """The columns of a replay, in a fixed order.

    Raises:
        ReplaySchemaError: for no, too many, repeated or missing columns.
    """

    columns: tuple[Column, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", tuple(self.columns))
        names = [column.name for column in self.columns]
        if len(names) > MAX_COLUMNS:
            raise ReplaySchemaError(f"at most {MAX_COLUMNS} columns, got {len(names)}")
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ReplaySchemaError(f"columns are named twice: {', '.join(repeated)}")
        for required in REQUIRED:
            if Column(*required) not in self.columns:
                raise ReplaySchemaError(
                    f"the schema needs the column {Column(*required)}, got "
                    f"{', '.join(map(str, self.columns)) or 'no columns'}"
                )

    @cached_property
    def by_name(self) -> dict[str, Column]:
        """Columns by their name."""
        return {column.name: column for column in self.columns}

    @cached_property
    def step_bytes(self) -> int:
        """Uncompressed bytes of one step, all columns together."""
        return sum(column.step_bytes for column in self.columns)

    @cached_property
    def hash(self) -> bytes:
        """Eight bytes that depend on names, dtypes and shapes, not on their order."""
        text = repr(sorted((c.name, c.dtype, c.shape) for c in self.columns))
        return hashlib.sha256(text.encode()).digest()[:8]

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists and strings that `from_dict` takes back."""
        return {"columns": [[c.name, c.dtype, list(c.shape)] for c in self.columns]}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Schema:
        """Build a schema from the result of `to_dict`.

        Raises:
            ReplaySchemaError: if the data is not of that form.
        """
        try:
            rows = [(str(name), str(dtype), tuple(shape)) for name, dtype, shape in data["columns"]]
        except (KeyError, TypeError, ValueError) as error:
            raise ReplaySchemaError(f"not the description of a schema: {data!r:.200}") from error
        return cls(tuple(Column(*row) for row in rows))

    def difference(self, other: Schema) -> str:
        """Say in one line what this schema has that `other` lacks, and the reverse.

        Returns:
            The empty string if both hold the same columns.
        """
        notes = []
        for name in sorted(self.by_name.keys() | other.by_name.keys()):
            mine, theirs = self.by_name.get(name), other.by_name.get(name)
            if mine is None:
                notes.append(f"{theirs} is extra")
            elif theirs is None:
                notes.append(f"{mine} is missing")
            elif mine != theirs:
                notes.append(f"{mine} became {theirs.dtype}{list(theirs.shape)}")
        return "; ".join(notes)

    def allocate(self, steps: int) -> dict[str, np.ndarray]:
        """Return uninitialised columns of `steps` records, each (steps, *shape)."""
        return {c.name: np.empty((steps, *c.shape), c.dtype) for c in self.columns}
