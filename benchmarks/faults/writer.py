"""A process that writes streams and notes on the disk which chunks it was told are safe.

It answers each line on its input with its counters as JSON, and ends, with everything delivered,
when its input does.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.faults.records import SCHEMA, record
from replay_service import (
    ChunkWriter,
    InsertReply,
    ReplayClient,
    ReplayConfig,
    ReplayUnavailable,
    Schema,
    Uploader,
)

STEPS = 8
"""Records per chunk."""


class Recorder(ReplayClient):
    """A client that notes every acknowledged chunk before anybody else knows of it."""

    def __init__(self, url: str, journal: Path, timeout_s: float) -> None:
        super().__init__(url, timeout_s=timeout_s)
        self._journal = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def insert(
        self, schema: Schema, sid: str, seq: int, steps: int, blob: bytes, **options: Any
    ) -> InsertReply:
        """Insert one chunk and note it if it is safe."""
        reply = super().insert(schema, sid, seq, steps, blob, **options)
        if reply.code in ("OK", "DUP"):
            # One write to a file outlives this process, whatever ends it.
            os.write(self._journal, f"{sid} {seq}\n".encode())
        return reply


def open_patiently(uploader: Uploader, stream: str, patience_s: float = 60.0) -> ChunkWriter:
    """Open a stream, however often the server cannot be reached meanwhile."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return uploader.open_stream(stream)
        except ReplayUnavailable:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def main() -> None:
    """Write until the input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("journal", type=Path)
    parser.add_argument("slots", type=int, nargs="+")
    parser.add_argument("--pause-s", type=float, required=True)
    parser.add_argument("--timeout-s", type=float, required=True)
    parser.add_argument("--ring", type=int, required=True)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    client = Recorder(options.url, options.journal, options.timeout_s)
    uploader = Uploader(client, SCHEMA, ReplayConfig(chunk_steps=STEPS, resend_chunks=options.ring))
    ending = threading.Event()

    def report() -> None:
        counters = {**asdict(uploader.stats), "blocked_reason": uploader.blocked_reason}
        sys.stdout.write(json.dumps(counters) + "\n")
        sys.stdout.flush()

    def listen() -> None:
        for _ in sys.stdin:
            report()
        ending.set()

    threading.Thread(target=listen, daemon=True).start()
    writers = {slot: open_patiently(uploader, f"s{slot}") for slot in options.slots}
    step = 0
    while not ending.wait(options.pause_s):
        for slot, writer in writers.items():
            for at in range(step, step + STEPS):
                writer.append(record(slot, at), (1, at))
        step += STEPS
    for writer in writers.values():
        writer.close()
    uploader.close(60.0)
    report()


if __name__ == "__main__":
    main()
