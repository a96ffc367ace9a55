"""Thousands of random faults in one run, and a proof that nothing was lost, torn or doubled.

::

    python -m benchmarks.faults.soak --faults 10000 --seconds 1800

Four streams are written by two processes while connections break, replies are lost, requests are
repeated, processes are killed and stopped, the server restarts with and without the end of its log,
runs out of memory, and learners replace each other. Everything is evicted soon after it was read.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.faults.records import SCHEMA
from benchmarks.faults.rig import MEMORY, Rig, Writer, until
from replay_service import ReplayError, check_server

log = logging.getLogger(__name__)

CAPACITY_STEPS = 3_000
MESSAGE_FAULTS = 0.25
RARE_EVERY_S = 2.0
CUT_BYTES = 3_000


class Soak:
    """One run.

    Args:
        directory: empty, for everything that it writes.
        faults: how many to inject.
        seconds: after which it ends, whatever was injected by then.
        seed: of every choice; the order of events still depends on the machine.
        rare_every_s: between faults that hurt a process rather than a message.
    """

    def __init__(
        self,
        directory: Path,
        *,
        faults: int,
        seconds: float,
        seed: int = 0,
        rare_every_s: float = RARE_EVERY_S,
    ) -> None:
        self.goal, self.seconds, self.rare_every_s = faults, seconds, rare_every_s
        self.random = random.Random(seed)
        self.rig = Rig(directory, seed=seed, capacity_steps=CAPACITY_STEPS)
        self.injected: Counter[str] = Counter()
        self.slowest_s = 0.0
        self.replies: Counter[str] = Counter()
        self.resent = self.renewed = self.lost = 0
        self._slots: list[list[int]] = [[0, 1], [2, 3]]
        self._proxies = [self.rig.proxy(f"writer-{number}") for number in range(2)]
        self._writers = [self._start(number) for number in range(2)]
        self._rare: list[Callable[[], None]] = [
            self.kill_server,
            self.restart_server,
            self.cut_power,
            self.stop_server,
            self.exhaust_memory,
            self.kill_writer,
            self.stop_writer,
            self.silence,
            self.replace_learner,
        ]

    @property
    def total(self) -> int:
        """Faults injected so far."""
        messages = sum(sum(proxy.injected.values()) for proxy in self.rig.proxies)
        return messages + sum(self.injected.values())

    def run(self) -> dict[str, object]:
        """Inject everything, let it recover, check it, and return what happened."""
        began = time.monotonic()
        until(lambda: len(self.rig.acknowledged()) > 20, 90, "starting the writers")
        for proxy in self.rig.proxies:
            proxy.rate = MESSAGE_FAULTS
        said = rare = time.monotonic()
        while self.total < self.goal and time.monotonic() - began < self.seconds:
            self.repeat()
            now = time.monotonic()
            if now - rare > self.rare_every_s:
                fault = self.random.choice(self._rare)
                fault()
                self.injected[fault.__name__] += 1
                rare = time.monotonic()
            if now - said > 30:
                said = now
                log.info("soak faults=%d steps=%d", self.total, self.rig.follower.ledger.steps)
            time.sleep(0.02)
        return self._finish(time.monotonic() - began)

    def repeat(self) -> None:
        """Insert a chunk that is long in the log once more: it must change nothing."""
        try:
            # Not a first chunk: of a stream that is forgotten meanwhile it would be a new one.
            entries = [e for e in self.rig.client.read_log("0", 50, 0.001) if e.seq > 1]
            if entries:
                entry = self.random.choice(entries)
                blob = self.rig.client.fetch([entry])[0] or b"evicted"
                reply = self.rig.client.insert(SCHEMA, entry.sid, entry.seq, entry.steps, blob)
                assert reply.code != "OK", (entry, reply)
                self.injected["repeat"] += 1
        except ReplayError as error:
            log.debug("repeat_failed error=%s", error)

    def kill_server(self) -> None:
        """SIGKILL the server and start it again."""
        self._outage(self.rig.kill_server)

    def restart_server(self) -> None:
        """End the server as an operator would."""
        self._outage(self.rig.server.stop)

    def cut_power(self) -> None:
        """Kill the server together with the end of its log."""
        cut = self.random.randint(1, CUT_BYTES)
        self._outage(lambda: self.rig.kill_server(cut_bytes=cut))

    def _outage(self, end: Callable[[], None]) -> None:
        end()
        self.rig.server.start()
        began = time.monotonic()
        # Only then: a writer that dies together with what the server lost takes it along.
        self._progress()
        self.slowest_s = max(self.slowest_s, time.monotonic() - began)

    def stop_server(self) -> None:
        """Stop the server for a moment."""
        with self.rig.stopped(self.rig.server.process_id):
            time.sleep(self.random.uniform(0.1, 0.5))

    def exhaust_memory(self) -> None:
        """Let the server run out of memory for a moment."""
        self.rig.config("maxmemory", 1)
        time.sleep(self.random.uniform(0.1, 0.5))
        self.rig.config("maxmemory", MEMORY)

    def kill_writer(self) -> None:
        """SIGKILL a writer and start its successor."""
        number = self.random.randrange(2)
        self._note(self._writers[number].ask())
        self._writers[number].kill()
        self._writers[number] = self._start(number)
        self._progress()

    def stop_writer(self) -> None:
        """Stop a writer for a moment."""
        with self.rig.stopped(self.random.choice(self._writers).process.pid):
            time.sleep(self.random.uniform(0.1, 0.5))

    def silence(self) -> None:
        """Cut a cable: what is sent disappears, nothing is refused."""
        proxy = self.random.choice(self.rig.proxies)
        proxy.silence()
        time.sleep(self.random.uniform(0.2, 1.0))
        proxy.heal()

    def replace_learner(self) -> None:
        """Take the fence from the learner, which has to notice."""
        before = self.rig.follower.fenced
        self.rig.client.acquire_fence()
        until(lambda: self.rig.follower.fenced > before, 30, "noticing the newer learner")

    def _start(self, number: int) -> Writer:
        return self.rig.writer(
            *self._slots[number], proxy=self._proxies[number], timeout_s=1.0, pause_s=0.01
        )

    def _progress(self) -> None:
        """Wait until every writer was told of a new chunk, so that nothing lost is outstanding."""
        before = [writer.ask()["chunks"] for writer in self._writers]

        def further() -> bool:
            now = [writer.ask()["chunks"] for writer in self._writers]
            return all(one > other + 2 for one, other in zip(now, before, strict=True))

        until(further, 60, "recovering")

    def _note(self, counters: dict[str, Any]) -> None:
        self.replies.update(counters["replies"])
        self.resent += counters["resent_chunks"]
        self.renewed += counters["renewed_streams"]
        self.lost += counters["lost_chunks"]

    def _finish(self, seconds: float) -> dict[str, object]:
        messages: Counter[str] = Counter()
        for proxy in self.rig.proxies:
            proxy.rate = 0.0
            messages.update(proxy.injected)
        total = self.total
        for writer in self._writers:
            self._note(writer.finish())
        self.rig.catch_up()
        ledger = self.rig.follower.ledger
        report = check_server(self.rig.client, account=self.rig.follower.account)
        return {
            "faults": total,
            "seconds": round(seconds, 1),
            "by_kind": dict(sorted((messages + self.injected).items())),
            "acknowledged_chunks": len(self.rig.acknowledged()),
            "followed_chunks": len(ledger.seen),
            "missing": sorted(map(str, self.rig.missing())),
            "problems": ledger.problems,
            "violations": [str(violation) for violation in report.violations],
            "replies": dict(sorted(self.replies.items())),
            "resent_chunks": self.resent,
            "chunks_read_again": ledger.again,
            "renewed_streams": self.renewed,
            "lost_chunks": self.lost,
            "slowest_recovery_s": round(self.slowest_s, 2),
        }


def main() -> int:
    """Run one soak and print its report as JSON. Returns 0 if nothing was lost."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--faults", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=1_800)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    for quiet in ("replay_service.server", "replay_service.tail"):
        logging.getLogger(quiet).setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        soak = Soak(Path(folder), faults=options.faults, seconds=options.seconds, seed=options.seed)
        try:
            report = soak.run()
        finally:
            soak.rig.close()
    sys.stdout.write(json.dumps(report, indent=1) + "\n")
    bad = report["missing"] or report["problems"] or report["violations"] or report["lost_chunks"]
    return 1 if bad else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    sys.exit(main())
