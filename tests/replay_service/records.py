"""Records whose content says which stream and step they are."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import redis

from replay_service import (
    Chunk,
    ChunkWriter,
    Column,
    Limits,
    Mirror,
    ReplayClient,
    ReplayClosed,
    Schema,
    encode_chunk,
)
from replay_service.schema import REQUIRED

SCHEMA = Schema(
    (
        Column("image", "uint8", (2, 2, 3)),
        Column("vector", "float32", (3,)),
        *(Column(*row) for row in REQUIRED),
        Column("action", "int32"),
        Column("deter", "float16", (4,)),
        Column("slot", "int32"),
        Column("step", "int64"),
    )
)
UNBOUNDED = Limits(capacity_steps=10**6, capacity_bytes=2**27)


def record(slot: int, step: int, episode: int = 10) -> dict[str, np.ndarray | np.generic]:
    """Return the record of one step; every `episode` records a new episode starts."""
    first, last = step % episode == 0, step % episode == episode - 1
    return {
        "image": np.full((2, 2, 3), step % 256, np.uint8),
        "vector": np.full(3, step, np.float32),
        "reward": np.float32(0 if first else 1),
        "is_first": np.bool_(first),
        "is_last": np.bool_(last),
        "is_terminal": np.bool_(last and step % (2 * episode) < episode),
        "action": np.int32(0 if last else step % 5),
        "deter": np.full(4, slot, np.float16),
        "slot": np.int32(slot),
        "step": np.int64(step),
    }


def columns(slot: int, first_step: int, steps: int) -> dict[str, np.ndarray]:
    """Return the columns of consecutive records."""
    rows = [record(slot, step) for step in range(first_step, first_step + steps)]
    return {c.name: np.stack([row[c.name] for row in rows]) for c in SCHEMA.columns}


def chunk(slot: int, seq: int, steps: int = 8, incarnation: int = 1) -> Chunk:
    """Return chunk number `seq` of a stream whose chunks all have `steps` records."""
    first = (seq - 1) * steps
    return Chunk(f"s{slot}", incarnation, seq, first, columns(slot, first, steps))


def insert(client: ReplayClient, made: Chunk, schema: Schema = SCHEMA) -> str:
    """Insert a chunk and return the code of the reply."""
    blob = encode_chunk(made, schema)
    return client.insert(schema, made.sid, made.seq, made.steps, blob).code


def insert_many(
    client: ReplayClient, slot: int, count: int, steps: int = 8, start: int = 1
) -> None:
    """Insert consecutive chunks, all of which must be accepted."""
    for seq in range(start, start + count):
        assert insert(client, chunk(slot, seq, steps)) == "OK"


def write(writer: ChunkWriter, slot: int, start: int, stop: int, episode: int = 10) -> None:
    """Append the records from `start` to before `stop`."""
    for step in range(start, stop):
        writer.append(record(slot, step, episode), (1, step))


def write_until(writer: ChunkWriter, slot: int, stop: threading.Event, episode: int = 10) -> None:
    """Append records until told to stop or interrupted."""
    step = 0
    try:
        while not stop.is_set():
            writer.append(record(slot, step, episode), (1, step))
            step += 1
    except ReplayClosed:
        return


def absorb_until(mirror: Mirror, done: Callable[[], bool], timeout_s: float = 20.0) -> list:
    """Absorb until a condition holds and return the episodes; fails at the deadline."""
    import time

    deadline, events = time.monotonic() + timeout_s, []
    while not done():
        assert time.monotonic() < deadline, (mirror.inserted_steps, mirror.size_steps)
        mirror.wait(0.2)
        events += mirror.absorb()
    return events


def contents(mirror: Mirror) -> dict[tuple[int, int], bytes]:
    """Return everything a mirror holds: (slot, step) → the bytes of the record."""
    held = {}
    for row in live_rows(mirror):
        values = {name: tensor[row].numpy() for name, tensor in mirror.columns.items()}
        key = (int(values["slot"]), int(values["step"]))
        assert key not in held, key
        held[key] = b"".join(values[name].tobytes() for name in sorted(values))
    return held


def live_rows(mirror: Mirror) -> Iterator[int]:
    """Yield every row that holds a record."""
    fills = mirror._index._fill
    for page, fill in enumerate(fills):
        yield from range(page * mirror.page_steps, page * mirror.page_steps + int(fill))


def renamed(made: Chunk, **changes: object) -> Chunk:
    """Return a chunk with some fields replaced."""
    return replace(made, **changes)


def wait_written(url: str, timeout_s: float = 10.0) -> None:
    """Wait until a server has written what it has answered, before it is killed.

    While a sync takes long, it holds writes back for at most two seconds. Killed then, it loses
    them, and live writers send them again (tests/faults).
    """
    deadline = time.monotonic() + timeout_s
    with redis.Redis.from_url(url) as admin:
        while admin.info("persistence")["aof_buffer_length"]:
            assert time.monotonic() < deadline, "the server still holds writes back"
            time.sleep(0.02)
