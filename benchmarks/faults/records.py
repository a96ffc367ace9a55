"""Records that say in every column which stream and step they are."""

from __future__ import annotations

import numpy as np

from replay_service import Chunk, Column, Schema
from replay_service.schema import REQUIRED

EPISODE_STEPS = 10
SCHEMA = Schema(
    (
        Column("image", "uint8", (4, 4, 3)),
        Column("vector", "float32", (3,)),
        *(Column(*row) for row in REQUIRED),
        Column("action", "int32"),
        Column("slot", "int32"),
        Column("step", "int64"),
    )
)


def record(slot: int, step: int) -> dict[str, np.ndarray | np.generic]:
    """Return the record of one step of a slot."""
    first, last = step % EPISODE_STEPS == 0, step % EPISODE_STEPS == EPISODE_STEPS - 1
    return {
        "image": np.full((4, 4, 3), step % 256, np.uint8),
        "vector": np.full(3, step % 2**20, np.float32),
        "reward": np.float32(not first),
        "is_first": np.bool_(first),
        "is_last": np.bool_(last),
        "is_terminal": np.bool_(False),
        "action": np.int32(0 if last else step % 5),
        "slot": np.int32(slot),
        "step": np.int64(step),
    }


def is_whole(chunk: Chunk) -> bool:
    """Whether every record of a chunk is the one of its stream and step."""
    slot = int(chunk.stream.removeprefix("s"))
    step = np.arange(chunk.first_step, chunk.first_step + chunk.steps)
    held = chunk.columns
    return bool(
        np.array_equal(held["step"], step)
        and (held["slot"] == slot).all()
        and (held["vector"] == (step % 2**20)[:, None]).all()
        and (held["image"] == (step % 256)[:, None, None, None]).all()
        and np.array_equal(held["is_first"], step % EPISODE_STEPS == 0)
    )
