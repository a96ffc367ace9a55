"""Replay: inserts against a raw SET of the same bytes, gathering against memcpy in the same run."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import redis
import torch
from rich.table import Table

from benchmarks.frames import CONTENT, textured
from benchmarks.load import CHUNK, IMAGES, bare_set
from replay_service import (
    Chunk,
    Column,
    EmbeddedServer,
    Limits,
    Mirror,
    ReplayClient,
    ReplayConfig,
    SamplingConfig,
    Schema,
    Uploader,
    encode_chunk,
)
from replay_service.pages import PageIndex, page_count
from replay_service.sampler import Sampler
from replay_service.schema import REQUIRED
from replay_service.server import Durability
from replay_service.storage import DeviceStorage, gather, window_rows

VECTORS = Schema(
    (
        Column("vector", "float32", (16,)),
        *(Column(*row) for row in REQUIRED),
        Column("action", "int32"),
    )
)
PAGE, BATCH, WINDOW = 64, 16, 65
SAMPLINGS = {
    "any": SamplingConfig(),
    "recency": SamplingConfig(recency=1.0),
    "episodes": SamplingConfig(windows="episodes"),
    "prioritised": SamplingConfig(prioritised=1.0),
}
DURABILITY: tuple[Durability, ...] = ("none", "everysec", "strict")
GIB = 2**30


def run(*, threads: int = 2, quick: bool = False) -> dict[str, Any]:
    """Measure inserting, following and sampling; takes about a minute, or a few seconds if quick.

    Args:
        threads: of the gathering and of the memcpy that it is compared with.
        quick: small sizes, to see that everything runs.

    Returns:
        Plain numbers, ready for JSON; `table` shows them.
    """
    before = torch.get_num_threads()
    sizes = (10**4, 10**5) if quick else (10**4, 10**5, 10**6)
    torch.set_num_threads(threads)
    try:
        return {
            "threads": threads,
            "insert": [_insert(kind, 20 if quick else 300) for kind in CONTENT],
            "durability": [_durable(mode, 20 if quick else 300) for mode in DURABILITY],
            "follow": _follow(2_000 if quick else 20_000),
            "gather": _gather(4_096 if quick else 100_000, 5 if quick else 200),
            "scaling": [_sampling_at(steps, 5 if quick else 300) for steps in sizes],
            "drawing": [_drawing_at(steps, 5 if quick else 300) for steps in sizes],
        }
    finally:
        torch.set_num_threads(before)


def table(result: dict[str, Any]) -> Table:
    """Return the results as a table for a terminal."""
    shown = Table("measure", "value", "compared with", "share", title="replay")
    for row in result["insert"]:
        shown.add_row(
            f"insert, {row['content']} frames ({row['compression']:.1f}x)",
            f"{row['insert_mb_s']:.0f} MB/s",
            f"SET of the same bytes {row['set_mb_s']:.0f} MB/s",
            f"{row['share_of_set']:.2f}; {row['share_of_bare_set']:.2f} of a SET without copies",
        )
        shown.add_row(
            "  append, encode, insert",
            f"{row['end_to_end_steps_s']:.0f} steps/s",
            f"{row['end_to_end_raw_mb_s']:.0f} MB/s before compression",
            "",
        )
    for row in result["durability"]:
        shown.add_row(
            f"insert textured frames, durability {row['durability']}",
            f"{row['steps_s']:.0f} steps/s",
            f"median {row['insert_ms']:.1f} ms, worst {row['worst_ms']:.1f} ms",
            "",
        )
    follow = result["follow"]
    shown.add_row("mirror follows the log", f"{follow['steps_s']:.0f} steps/s", "", "")
    found = result["gather"]
    shown.add_row(
        f"gather {BATCH}x{WINDOW} windows, {found['resident_mb']:.0f} MB resident",
        f"{found['gather_gb_s']:.1f} GB/s, {found['windows_s']:.0f} windows/s",
        f"memcpy {found['memcpy_gb_s']:.1f} GB/s",
        f"{found['share_of_memcpy']:.2f}",
    )
    for row in result["scaling"]:
        shown.add_row(
            f"choose and gather vectors from {row['steps']} steps",
            f"{row['sample_us']:.0f} us",
            f"absorb a chunk {row['absorb_us']:.0f} us",
            "",
        )
    for row in result["drawing"]:
        others = ", ".join(f"{kind} {row[kind + '_us']:.0f}" for kind in SAMPLINGS if kind != "any")
        shown.add_row(
            f"draw {BATCH} starts of {row['steps']} steps",
            f"any {row['any_us']:.0f} us",
            f"{others} us",
            "",
        )
    return shown


def _columns(schema: Schema, steps: int, content: np.ndarray | None = None) -> dict[str, Any]:
    columns = {c.name: np.zeros((steps, *c.shape), c.dtype) for c in schema.columns}
    columns["is_first"][0] = True
    if content is not None:
        columns["image"] = content
    return columns


@contextmanager
def _server(
    durability: Durability = "everysec",
) -> Iterator[tuple[EmbeddedServer, ReplayClient]]:
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as directory,
        EmbeddedServer(Path(directory), max_memory_bytes=2 * GIB, durability=durability) as server,
    ):
        client = ReplayClient(server.url)
        try:
            yield server, client
        finally:
            client.close()


def _insert(kind: str, count: int) -> dict[str, Any]:
    """Alternate inserts with SETs of the same bytes, each keeping 32 of them on the server."""
    content = CONTENT[kind](np.random.default_rng(0), CHUNK)
    columns = _columns(IMAGES, CHUNK, content)
    blob = encode_chunk(Chunk("bench", 1, 1, 0, columns), IMAGES)
    taken: dict[str, list[float]] = {"insert": [], "set": [], "bare": []}
    with (
        _server() as (server, client),
        redis.Redis.from_url(server.url) as plain,
        bare_set(server.url) as bare,
    ):
        client.create(IMAGES, Limits(capacity_steps=32 * CHUNK, capacity_bytes=GIB))
        for seq in range(1, count + 1):
            marks = [time.perf_counter()]
            reply = client.insert(IMAGES, "bench@1", seq, CHUNK, blob)
            marks.append(time.perf_counter())
            plain.set(f"plain:{seq % 32}", blob)
            marks.append(time.perf_counter())
            bare(f"bare:{seq % 32}", blob)
            marks.append(time.perf_counter())
            assert reply.code == "OK", reply
            for name, seconds in zip(taken, np.diff(marks), strict=True):
                taken[name].append(float(seconds))
        steps_s = _end_to_end(client, columns, count)
    insert_one, set_one, bare_one = (statistics.median(values) for values in taken.values())
    return {
        "content": kind,
        "chunk_bytes": len(blob),
        "compression": CHUNK * IMAGES.step_bytes / len(blob),
        "insert_mb_s": len(blob) / insert_one / 1e6,
        "set_mb_s": len(blob) / set_one / 1e6,
        "share_of_set": set_one / insert_one,
        "share_of_bare_set": bare_one / insert_one,
        "insert_steps_s": CHUNK / insert_one,
        "end_to_end_steps_s": steps_s,
        "end_to_end_raw_mb_s": steps_s * IMAGES.step_bytes / 1e6,
    }


def _durable(durability: Durability, count: int) -> dict[str, Any]:
    """Insert one chunk after the other from one writer; the disk is that of temporary files."""
    columns = _columns(IMAGES, CHUNK, textured(np.random.default_rng(0), CHUNK))
    blob = encode_chunk(Chunk("bench", 1, 1, 0, columns), IMAGES)
    taken_s = list[float]()
    with _server(durability) as (_, client):
        client.create(IMAGES, Limits(capacity_steps=32 * CHUNK, capacity_bytes=GIB))
        for seq in range(1, count + 1):
            started = time.perf_counter()
            reply = client.insert(IMAGES, "bench@1", seq, CHUNK, blob)
            taken_s.append(time.perf_counter() - started)
            assert reply.code == "OK", reply
    return {
        "durability": durability,
        "chunk_bytes": len(blob),
        "insert_ms": statistics.median(taken_s) * 1e3,
        "worst_ms": max(taken_s) * 1e3,
        "steps_s": count * CHUNK / sum(taken_s),
    }


def _end_to_end(client: ReplayClient, columns: dict[str, Any], chunks: int) -> float:
    """Append records one by one through an uploader until all are acknowledged: steps/s."""
    rows = [{name: value[i] for name, value in columns.items()} for i in range(CHUNK)]
    with Uploader(client, IMAGES, ReplayConfig(pending_chunks=4)) as uploader:
        writer = uploader.open_stream("writer")
        started = time.perf_counter()
        for _ in range(chunks):
            for row in rows:
                writer.append(row)
        assert uploader.drain(120)
        return chunks * CHUNK / (time.perf_counter() - started)


def _follow(steps: int) -> dict[str, Any]:
    """Rebuild a mirror from a log of textured frames."""
    content = textured(np.random.default_rng(0), CHUNK)
    with _server() as (_, client):
        client.create(IMAGES, Limits(capacity_steps=steps, capacity_bytes=GIB))
        for seq in range(1, steps // CHUNK + 1):
            chunk = Chunk("a", 1, seq, (seq - 1) * CHUNK, _columns(IMAGES, CHUNK, content))
            client.insert(IMAGES, chunk.sid, seq, CHUNK, encode_chunk(chunk, IMAGES))
        mirror = Mirror(client, IMAGES, capacity_steps=steps, window_steps=WINDOW, placement="ram")
        started = time.perf_counter()
        mirror.start()
        for _ in mirror.rebuild():
            pass
        seconds = time.perf_counter() - started
        mirror.stop()
    return {
        "steps": mirror.size_steps,
        "steps_s": mirror.size_steps / seconds,
        "raw_mb_s": mirror.size_steps * IMAGES.step_bytes / seconds / 1e6,
    }


def _filled(schema: Schema, steps: int) -> tuple[DeviceStorage, PageIndex]:
    """Return storage with `steps` steps of eight interleaved streams."""
    pages = page_count(steps, PAGE)
    storage = DeviceStorage(
        schema, rows=pages * PAGE, pages=pages, placement="ram", device="cpu", directory=None
    )
    index = PageIndex(
        pages=pages,
        page_steps=PAGE,
        window_steps=WINDOW,
        capacity_steps=steps,
        next_page=storage.host_next_page,
        valid_cumsum=storage.host_cumsum,
    )
    for column in storage.columns.values():
        column.view(torch.uint8).fill_(1)
    for number in range(steps // CHUNK):
        index.place(f"s{number % 8}", number // 8 + 1, number // 8 * CHUNK, CHUNK)
    index.refresh()
    return storage, index


def _gather(steps: int, repeats: int) -> dict[str, Any]:
    """Alternate gathering random windows with copying one stretch of the same size."""
    storage, _ = _filled(IMAGES, steps)
    out = {
        name: torch.empty((BATCH, WINDOW, *column.shape[1:]), dtype=column.dtype)
        for name, column in storage.columns.items()
    }
    image, target = storage.columns["image"], out["image"].view(BATCH * WINDOW, 64, 64, 3)
    rng, nothing = np.random.default_rng(0), torch.full((BATCH,), -1)
    gather_s, copy_s = list[float](), list[float]()
    for _ in range(repeats + 2):
        uniforms = torch.from_numpy(rng.random(BATCH))
        first = int(rng.integers(0, len(image) - len(target)))
        started = time.perf_counter()
        rows = window_rows(uniforms, nothing, storage.valid_cumsum, storage.next_page, PAGE, WINDOW)
        gather(storage.columns, rows, out)
        middle = time.perf_counter()
        target.copy_(image[first : first + len(target)])
        copy_s.append(time.perf_counter() - middle)
        gather_s.append(middle - started)
    moved = sum(value.nbytes for value in out.values())
    gather_one, copy_one = statistics.median(gather_s[2:]), statistics.median(copy_s[2:])
    gather_rate, copy_rate = moved / gather_one / 1e9, target.nbytes / copy_one / 1e9
    return {
        "resident_mb": len(image) * IMAGES.step_bytes / 1e6,
        "gather_gb_s": gather_rate,
        "memcpy_gb_s": copy_rate,
        "share_of_memcpy": gather_rate / copy_rate,
        "windows_s": BATCH / gather_one,
        "steps_s": BATCH * WINDOW / gather_one,
    }


def _drawing_at(steps: int, repeats: int) -> dict[str, Any]:
    """Time how long each kind of sampling takes to choose a batch, between absorbed chunks."""
    row: dict[str, Any] = {"steps": steps}
    for kind, sampling in SAMPLINGS.items():
        index = _filled(VECTORS, steps)[1]
        sampler, rng = Sampler(index, sampling), np.random.default_rng(0)
        first, last = np.zeros(CHUNK, bool), np.zeros(CHUNK, bool)
        last[-1] = True
        nothing, taken_s = np.full(BATCH, -1), list[float]()
        number = 0
        while number * CHUNK < steps + repeats * CHUNK:
            index.place("new", number + 1, number * CHUNK, CHUNK)
            ends = last if number % 8 == 7 else first  # episodes of 512 steps
            sampler.follow(index.segment("new"), first, ends)
            number += 1
            if number * CHUNK <= steps:
                continue
            index.refresh()
            started = time.perf_counter()
            sampler.draw(rng, rng.random(BATCH), nothing)
            taken_s.append(time.perf_counter() - started)
            if sampling.prioritised:
                rows = index.rows(index.segment("new"))[-BATCH * WINDOW :]
                sampler.write_priorities(rows, rng.random(len(rows)), index.generation)
        row[f"{kind}_us"] = statistics.median(taken_s[1:]) * 1e6
    return row


def _sampling_at(steps: int, repeats: int) -> dict[str, Any]:
    """Time choosing and gathering small records, and absorbing one chunk, at one replay size."""
    storage, index = _filled(VECTORS, steps)
    rng, nothing = np.random.default_rng(0), torch.full((BATCH,), -1)
    chunk = _columns(VECTORS, CHUNK)
    sample_s, absorb_s = list[float](), list[float]()
    for number in range(repeats):
        uniforms = torch.from_numpy(rng.random(BATCH))
        started = time.perf_counter()
        rows = window_rows(uniforms, nothing, storage.valid_cumsum, storage.next_page, PAGE, WINDOW)
        gather(storage.columns, rows)
        middle = time.perf_counter()
        for row, count in index.place("new", number + 1, number * CHUNK, CHUNK):
            storage.write(row, {name: value[:count] for name, value in chunk.items()})
        index.refresh()
        storage.publish_index()
        absorb_s.append(time.perf_counter() - middle)
        sample_s.append(middle - started)
    return {
        "steps": steps,
        "sample_us": statistics.median(sample_s) * 1e6,
        "absorb_us": statistics.median(absorb_s) * 1e6,
    }
