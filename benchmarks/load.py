"""A process that writes frames to a replay server as fast as it can, and says what that cost.

``python -m benchmarks.load URL KIND STEPS FIRST COUNT`` opens the streams ``load-FIRST`` and so on,
prints "ready", begins at the next line of its input, and ends with one line of JSON.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import redis
from redis.connection import PythonRespSerializer

from benchmarks.frames import columns
from replay_service import Column, ReplayClient, ReplayConfig, Schema, Uploader
from replay_service.schema import REQUIRED

CHUNK = 64
IMAGES = Schema(
    (
        Column("image", "uint8", (64, 64, 3)),
        *(Column(*row) for row in REQUIRED),
        Column("action", "int32"),
    )
)
ROOT = Path(__file__).parents[1]
_PATIENCE_S = 300.0


@contextmanager
def bare_set(url: str) -> Iterator[Callable[[str, bytes], None]]:
    """Yield a SET over a connection of its own that copies nothing: the most that Python can ask.

    The client library packs a value into one string with its command and lends a connection for
    each call; with large values the packing takes most of the time.
    """
    with redis.Redis.from_url(url) as client:
        connection = client.connection_pool.get_connection()
        pack: Any = PythonRespSerializer(0, connection.encoder.encode).pack

        def command(key: str, value: bytes) -> None:
            connection.send_packed_command(pack("SET", key, value))
            connection.read_response()

        yield command


def cpu_s() -> float:
    """Return the processor seconds of this process so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Write until everything is acknowledged."""
    url, kind, steps, first, count = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6])
    made = columns(kind, CHUNK)
    rows = [{name: value[at] for name, value in made.items()} for at in range(CHUNK)]
    client = ReplayClient(url, timeout_s=30.0)
    with Uploader(client, IMAGES, ReplayConfig(pending_chunks=4)) as uploader:
        writers = [uploader.open_stream(f"load-{first + at}") for at in range(count)]
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        sys.stdin.readline()
        began, used = time.perf_counter(), cpu_s()
        done = 0
        while done < steps:
            # As an actor does: a step of every environment, then the next.
            for row in rows:
                for writer in writers:
                    writer.append(row)
            done += CHUNK * count
        assert uploader.drain(_PATIENCE_S)
        result = {"steps": done, "seconds": time.perf_counter() - began, "cpu_s": cpu_s() - used}
    client.close()
    sys.stdout.write(json.dumps(result) + "\n")


def together(commands: Sequence[Sequence[str]], env: dict[str, str]) -> list[dict[str, Any]]:
    """Start processes that speak as this one does, let them begin at once; return what they say."""
    started = [
        subprocess.Popen(
            list(words),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
            env=env,
        )
        for words in commands
    ]
    try:
        for process in started:
            assert process.stdout is not None
            line = process.stdout.readline().strip()
            assert line == "ready", f"{process.args!r} said {line!r}; run it to see why"
        for process in started:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        outs = [process.communicate(timeout=_PATIENCE_S)[0] for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    return [json.loads(out.splitlines()[-1]) for out in outs]


def rate(results: Sequence[dict[str, Any]]) -> float:
    """Return the steps/s of processes that worked side by side."""
    total = sum(float(result["steps"]) for result in results)
    return total / max(float(result["seconds"]) for result in results)


if __name__ == "__main__":
    main()
