"""How far the replay goes: writers side by side, processor time, and cost as the log grows."""

from __future__ import annotations

import os
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.table import Table

from benchmarks.frames import CONTENT, columns
from benchmarks.load import CHUNK, IMAGES, ROOT, bare_set, cpu_s, rate, together
from benchmarks.replay import VECTORS
from replay_service import (
    Chunk,
    EmbeddedServer,
    Limits,
    Mirror,
    ReplayClient,
    Schema,
    encode_chunk,
)

WRITERS = (1, 4, 16, 64)
PROCESSES = 4
"""Most processes that the writers are spread over: an actor process has many environments."""
KEPT = 512
"""Chunks that the server keeps: 400 MB of noise."""
GIB = 2**30
MILLION = 1e6


def run(*, quick: bool = False) -> dict[str, Any]:
    """Measure; takes three to five minutes, or half of one if quick.

    Args:
        quick: small sizes, to see that everything runs.

    Returns:
        Plain numbers, ready for JSON; `table` shows them.
    """
    steps = 4_096 if quick else 40_000
    sizes = (10**4,) if quick else (10**4, 10**5, 10**6)
    return {
        "load": os.getloadavg()[0],
        "raw": [_raw(kind, 10 if quick else 100) for kind in CONTENT],
        "writers": [
            _written(kind, count, steps)
            for kind in CONTENT
            for count in (WRITERS[:2] if quick else WRITERS)
        ],
        "follow": [_followed(kind, 64 if quick else KEPT) for kind in CONTENT],
        "growth": _growth(sizes, 20 if quick else 1000),
    }


def table(result: dict[str, Any]) -> Table:
    """Return the results as a table for a terminal."""
    shown = Table("measure", "value", "costs", title=f"replay, load {result['load']:.1f}")
    for row in result["raw"]:
        shown.add_row(
            f"{row['content']}: one chunk of {row['chunk_bytes']:,} bytes",
            f"socket {row['socket_us']:.0f} us, SET {row['set_us']:.0f} us, "
            f"insert {row['insert_us']:.0f} us",
            f"memcpy of its 64 frames {row['memcpy_us']:.0f} us",
        )
    for row in result["writers"]:
        shown.add_row(
            f"{row['content']}: {row['writers']} writers in {row['processes']} processes",
            f"{row['steps_s']:,.0f} steps/s, {row['wire_mb_s']:.0f} MB/s to the server",
            f"CPU s per 1e6 steps: writers {row['writer_cpu_s']:.1f}, "
            f"server {row['server_cpu_s']:.1f}",
        )
    for row in result["follow"]:
        shown.add_row(
            f"{row['content']}: mirror follows",
            f"{row['steps_s']:,.0f} steps/s",
            f"CPU s per 1e6 steps: learner {row['learner_cpu_s']:.1f}, "
            f"server {row['server_cpu_s']:.1f}",
        )
    for row in result["growth"]:
        shown.add_row(
            f"a log of {row['steps']:,} steps of vectors",
            f"insert {row['insert_us']:.0f} us, into a short log {row['short_us']:.0f} us",
            f"a mirror starts from it in {row['start_s']:.2f} s, a server in "
            f"{row['server_start_s']:.2f} s",
        )
    return shown


@contextmanager
def _server(schema: Schema, steps: int) -> Iterator[tuple[EmbeddedServer, ReplayClient]]:
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as directory,
        EmbeddedServer(Path(directory), max_memory_bytes=2 * GIB) as server,
    ):
        client = ReplayClient(server.url, timeout_s=30.0)
        client.create(schema, Limits(capacity_steps=steps, capacity_bytes=GIB))
        try:
            yield server, client
        finally:
            client.close()


def _cpu_of(server: EmbeddedServer) -> float:
    used = psutil.Process(server.process_id).cpu_times()
    return float(used.user + used.system)


def _raw(kind: str, count: int) -> dict[str, Any]:
    """Time one chunk through a bare socket, as a SET and as an insert, and its frames' memcpy."""
    made = columns(kind, CHUNK)
    blob = encode_chunk(Chunk("raw", 1, 1, 0, made), IMAGES)
    source, target = made["image"], np.empty_like(made["image"])
    taken: dict[str, list[float]] = {"socket": [], "set": [], "insert": [], "memcpy": []}
    with (
        _server(IMAGES, KEPT * CHUNK) as (server, client),
        bare_set(server.url) as plain_set,
        _echo(len(blob)) as connection,
    ):
        for seq in range(1, count + 1):
            marks = [time.perf_counter()]
            connection.sendall(blob)
            connection.recv(1)
            marks.append(time.perf_counter())
            plain_set(f"raw:{seq % KEPT}", blob)
            marks.append(time.perf_counter())
            reply = client.insert(IMAGES, "raw@1", seq, CHUNK, blob)
            marks.append(time.perf_counter())
            np.copyto(target, source)
            marks.append(time.perf_counter())
            assert reply.code == "OK", reply
            for name, seconds in zip(taken, np.diff(marks), strict=True):
                taken[name].append(float(seconds))
    times = {f"{name}_us": statistics.median(values) * 1e6 for name, values in taken.items()}
    return {"content": kind, "chunk_bytes": len(blob), **times}


@contextmanager
def _echo(size: int) -> Iterator[socket.socket]:
    """Yield a unix socket whose other end answers one byte to every `size` bytes."""
    near, far = socket.socketpair(socket.AF_UNIX)

    def answer() -> None:
        buffer, got = bytearray(1 << 20), 0
        while count := far.recv_into(buffer):
            got += count
            if got >= size:
                got -= size
                far.sendall(b"+")

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    try:
        yield near
    finally:
        near.close()
        thread.join(5)
        far.close()


def _written(kind: str, writers: int, steps: int) -> dict[str, Any]:
    """Let writers write side by side, each a stream, in up to four processes."""
    processes = min(writers, PROCESSES)
    each = writers // processes
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "benchmarks.load"]
    share = str(steps // processes)
    with _server(IMAGES, KEPT * CHUNK) as (server, client):
        commands = [
            [*words, server.url, kind, share, str(at * each), str(each)] for at in range(processes)
        ]
        before = _cpu_of(server)
        found = together(commands, env)
        used, stats = _cpu_of(server) - before, client.stats()
    total, speed = sum(float(row["steps"]) for row in found), rate(found)
    assert stats.inserted_steps == total, (stats, total)
    return {
        "content": kind,
        "writers": writers,
        "processes": processes,
        "steps_s": speed,
        "wire_mb_s": stats.inserted_bytes / total * speed / 1e6,
        "writer_cpu_s": sum(float(row["cpu_s"]) for row in found) / total * MILLION,
        "server_cpu_s": used / total * MILLION,
    }


def _followed(kind: str, chunks: int) -> dict[str, Any]:
    """Rebuild a mirror from a log of frames."""
    steps = chunks * CHUNK
    with _server(IMAGES, steps) as (server, client):
        _insert((client,), IMAGES, columns(kind, CHUNK), 1, chunks)
        before, used = _cpu_of(server), cpu_s()
        seconds = _start(client, IMAGES, steps)
        own = cpu_s() - used
        served = _cpu_of(server) - before
    return {
        "content": kind,
        "steps_s": steps / seconds,
        "learner_cpu_s": own / steps * MILLION,
        "server_cpu_s": served / steps * MILLION,
    }


def _insert(
    clients: tuple[ReplayClient, ...],
    schema: Schema,
    made: dict[str, np.ndarray],
    first: int,
    last: int,
) -> list[list[float]]:
    """Insert chunks of one stream into each of these replays in turns.

    Returns by replay the seconds of each insert, encoding left out.
    """
    taken: list[list[float]] = [[] for _ in clients]
    for seq in range(first, last + 1):
        chunk = Chunk("log", 1, seq, (seq - 1) * CHUNK, made)
        blob = encode_chunk(chunk, schema)
        # Whoever comes first after the encoding finds the cold caches.
        turns = list(zip(clients, taken, strict=True))[:: 1 if seq % 2 else -1]
        for client, seconds in turns:
            began = time.perf_counter()
            reply = client.insert(schema, chunk.sid, seq, CHUNK, blob)
            seconds.append(time.perf_counter() - began)
            assert reply.code == "OK", reply
    return taken


def _start(client: ReplayClient, schema: Schema, steps: int) -> float:
    """Rebuild a mirror from the log, as a learner that starts does; return the seconds."""
    began = time.perf_counter()
    mirror = Mirror(client, schema, capacity_steps=steps, window_steps=CHUNK, placement="ram")
    mirror.start()
    for _ in mirror.rebuild():
        pass
    seconds = time.perf_counter() - began
    assert mirror.size_steps == steps, (mirror.size_steps, steps)
    mirror.stop()
    return seconds


def _growth(sizes: tuple[int, ...], repeats: int) -> list[dict[str, Any]]:
    """Time inserts into, and starts from, one log as it grows; nothing is evicted.

    What an insert takes is the median of the last ones that led there, and beside it that of the
    same chunks, in turns, into another replay that keeps no more than the first size: in a run of
    minutes the machine changes more than the log does.
    """
    made = {c.name: np.zeros((CHUNK, *c.shape), c.dtype) for c in VECTORS.columns}
    made["is_first"][0] = True
    made["vector"] = np.random.default_rng(0).random((CHUNK, 16), np.float32)
    found, there = [], 0
    with _server(VECTORS, sizes[-1]) as (server, client), _server(VECTORS, sizes[0]) as (_, short):
        for steps in sizes:
            taken = _insert((client, short), VECTORS, made, there + 1, steps // CHUNK)
            insert_s, short_s = (statistics.median(each[-repeats:]) for each in taken)
            there = steps // CHUNK
            start_s = _start(client, VECTORS, there * CHUNK)
            server.stop()
            began = time.perf_counter()
            server.start()
            found.append(
                {
                    "steps": steps,
                    "insert_us": insert_s * 1e6,
                    "short_us": short_s * 1e6,
                    "start_s": start_s,
                    "server_start_s": time.perf_counter() - began,
                }
            )
    return found
