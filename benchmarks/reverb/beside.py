"""Insert and sample the same frames with dm-reverb and with ours, in turns, in one run.

::

    python -m benchmarks.reverb.beside --venv /tmp/reverb --json reverb.json

makes the environment if it is not there: dm-reverb 0.14 with TensorFlow 2.15, Python 3.11, NumPy 1.
Ours is measured with the default durability, and with none, which is what dm-reverb promises.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.frames import CONTENT, columns
from benchmarks.load import CHUNK, IMAGES, ROOT, rate, together
from replay_service import Chunk, EmbeddedServer, Limits, Mirror, ReplayClient, encode_chunk
from replay_service.server import Durability
from replay_service.storage import gather, window_rows

PACKAGES = ("dm-reverb==0.14.0", "tensorflow==2.15.*", "numpy<2")
ITEMS, BATCH, WARM_UP = 512, 16, 20
"""Items of 64 steps that are kept: 400 MB of frames, far more than a cache holds."""
QUIET = {"TF_CPP_MIN_LOG_LEVEL": "3", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def environment(directory: Path) -> str:
    """Return the Python of an environment that has dm-reverb; installs it if it is not there."""
    python = directory / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(directory)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
    return str(python)


@contextmanager
def reverb_server(python: str) -> Iterator[str]:
    """Serve an empty table in a process of its own; yield its port."""
    words = [python, "-m", "benchmarks.reverb.peer", "serve", str(ITEMS)]
    with subprocess.Popen(
        words,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
        env=os.environ | QUIET,
    ) as process:
        assert process.stdout is not None and process.stdin is not None
        port = process.stdout.readline().strip()
        assert port.isdecimal(), f"dm-reverb did not start; run {words} in {ROOT} to see why"
        try:
            yield port
        finally:
            process.stdin.close()
            process.wait(30)


def theirs(python: str, kind: str, steps: int, samples: int) -> dict[str, float]:
    """Measure dm-reverb: steps/s inserted by 1 and 4 processes, and sampled."""
    peer = [python, "-m", "benchmarks.reverb.peer"]
    env = os.environ | QUIET
    with reverb_server(python) as port:
        one = rate(together([[*peer, "insert", port, kind, str(steps)]], env))
        four = rate(together([[*peer, "insert", port, kind, str(steps // 4)]] * 4, env))
    words = [[*peer, "sample", str(ITEMS), kind, str(samples)]]
    sampled = rate(together(words, env))
    return {"insert_1": one, "insert_4": four, "sample": sampled}


def ours(kind: str, steps: int, samples: int) -> dict[str, float]:
    """Measure ours in the same way; what is sampled comes from a mirror, as in a learner."""
    found = _ours(kind, steps, samples, "everysec")
    volatile = _ours(kind, steps, 0, "none")
    return found | {f"{key}_none": value for key, value in volatile.items()}


def _ours(kind: str, steps: int, samples: int, durability: Durability) -> dict[str, float]:
    load, env = [sys.executable, "-m", "benchmarks.load"], os.environ | QUIET
    limits = Limits(capacity_steps=ITEMS * CHUNK, capacity_bytes=2**30)
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as directory,
        EmbeddedServer(Path(directory), max_memory_bytes=2**31, durability=durability) as server,
    ):
        client = ReplayClient(server.url)
        client.create(IMAGES, limits)
        one = rate(together([[*load, server.url, kind, str(steps), "0", "1"]], env))
        words = [[*load, server.url, kind, str(steps // 4), str(at), "1"] for at in range(4)]
        four = rate(together(words, env))
        sampled = dict[str, float]()
        if samples:
            _fill(client, kind)
            sampled = _sample(client, samples)
        client.close()
    return {"insert_1": one, "insert_4": four, **sampled}


def _fill(client: ReplayClient, kind: str) -> None:
    """Insert as many different chunks as are kept."""
    for seq in range(1, ITEMS + 1):
        chunk = Chunk("fill", 1, seq, (seq - 1) * CHUNK, columns(kind, CHUNK, seed=seq % 16))
        client.insert(IMAGES, chunk.sid, seq, CHUNK, encode_chunk(chunk, IMAGES))


def _sample(client: ReplayClient, samples: int) -> dict[str, float]:
    mirror = Mirror(client, IMAGES, capacity_steps=ITEMS * CHUNK, window_steps=CHUNK)
    mirror.start()
    for _ in mirror.rebuild():
        pass
    out = {
        name: torch.empty((BATCH, CHUNK, *column.shape[1:]), dtype=column.dtype)
        for name, column in mirror.columns.items()
    }
    image, target = mirror.columns["image"], out["image"].view(BATCH * CHUNK, 64, 64, 3)
    rng, taken_s, copied_s = np.random.default_rng(0), list[float](), list[float]()
    for update in range(samples // (BATCH * CHUNK) + WARM_UP):
        began = time.perf_counter()
        uniforms, starts = mirror.draw(0, update, BATCH)
        rows = window_rows(
            torch.from_numpy(uniforms),
            torch.from_numpy(starts),
            mirror.valid_cumsum,
            mirror.next_page,
            mirror.page_steps,
            CHUNK,
        )
        gather(mirror.columns, rows, out)
        taken_s.append(time.perf_counter() - began)
        first = int(rng.integers(0, mirror.size_steps - len(target)))
        began = time.perf_counter()
        target.copy_(image[first : first + len(target)])
        copied_s.append(time.perf_counter() - began)
    mirror.stop()
    each, copy = sum(taken_s[WARM_UP:]), statistics.median(copied_s[WARM_UP:])
    whole = sum(value.nbytes for value in out.values())
    gathered = whole / statistics.median(taken_s[WARM_UP:])
    return {
        "sample": (len(taken_s) - WARM_UP) * BATCH * CHUNK / each,
        "gather_of_memcpy": gathered / (target.nbytes / copy),
    }


def run(python: str, *, rounds: int, steps: int, samples: int) -> dict[str, Any]:
    """Measure every kind of frames, both sides in turns; medians over the rounds."""
    result: dict[str, Any] = {"rounds": rounds, "load": os.getloadavg()[0], "kinds": {}}
    result["threads"] = torch.get_num_threads()
    for kind in CONTENT:
        mine, others = list[dict[str, float]](), list[dict[str, float]]()
        for _ in range(rounds):
            others.append(theirs(python, kind, steps, samples))
            mine.append(ours(kind, steps, samples))
        result["kinds"][kind] = {"ours": _medians(mine), "reverb": _medians(others)}
    return result


def _medians(found: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(row[key] for row in found) for key in found[0]}


def table(result: dict[str, Any]) -> Table:
    """Return the results as a table."""
    shown = Table("frames", "what", "ours", "dm-reverb", "ratio", title="steps/s, 64-step items")
    names = {"insert_1": "insert, 1 writer", "insert_4": "insert, 4 writers"}
    names |= {f"{key}_none": f"{text}, nothing on disk" for key, text in names.items()}
    for kind, row in result["kinds"].items():
        for key, text in (names | {"sample": "sample"}).items():
            mine, other = row["ours"][key], row["reverb"][key.removesuffix("_none")]
            shown.add_row(kind, text, f"{mine:,.0f}", f"{other:,.0f}", f"{mine / other:.2f}")
        share = row["ours"]["gather_of_memcpy"]
        shown.add_row(kind, "draw and gather, of memcpy", f"{share:.2f}", "", "")
    return shown


def main() -> None:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--venv", type=Path, required=True, help="environment with dm-reverb")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    parser.add_argument("--rounds", type=int, default=3, help="of which the median counts")
    parser.add_argument("--steps", type=int, default=60_000, help="inserted per measurement")
    parser.add_argument("--samples", type=int, default=400_000, help="steps sampled")
    options = parser.parse_args()
    python = environment(options.venv)
    result = run(python, rounds=options.rounds, steps=options.steps, samples=options.samples)
    Console(emoji=False).print(table(result))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
