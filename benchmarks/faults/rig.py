"""A replay server, processes that write to it, and what follows its log and believes nothing."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import redis

from benchmarks.faults.proxy import FaultProxy
from benchmarks.faults.records import SCHEMA, is_whole
from replay_service import (
    EmbeddedServer,
    Limits,
    ReplayClient,
    ReplayError,
    ReplayFenced,
    ReplayUnavailable,
    check_server,
)
from replay_service.limiter import CreditLimiter
from replay_service.tail import Arrival, LogTail

ROOT = Path(__file__).parents[2]
MEMORY = 2**27
LEAD = 1_000
"""Steps by which writers may be ahead of the follower, which therefore never misses any."""
BATCH = 8
"""Steps that the follower replays at a time; as many as a chunk of a writer has."""


def until(condition: Callable[[], bool], timeout_s: float = 60.0, what: str = "this") -> float:
    """Wait until a condition holds and return the seconds that took; fails at the deadline."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < timeout_s, f"{what} took more than {timeout_s} s"
        time.sleep(0.01)
    return time.monotonic() - began


class Ledger:
    """Everything that came out of the log, checked record by record as it came."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.seen: dict[tuple[str, int], int] = {}
        self.steps = 0
        self.again = 0
        self._ends: dict[str, tuple[int, int]] = {}

    def enter(self, arrival: Arrival) -> None:
        """Check one chunk against all before it."""
        entry, chunk = arrival.entry, arrival.chunk
        name = f"{entry.sid}:{entry.seq}"
        if chunk is None:
            self.problems.append(f"{name} was gone or damaged when it was read")
            return
        if not is_whole(chunk):
            self.problems.append(f"{name} is torn")
        key = (entry.sid, entry.seq)
        if key in self.seen:
            # A server that lost its end gets it again; what follows the log keeps one of them.
            self.again += 1
            if self.seen[key] != chunk.first_step:
                self.problems.append(f"{name} came again with other steps")
            return
        last_seq, next_step = self._ends.get(entry.sid, (0, chunk.first_step))
        if (entry.seq, chunk.first_step) != (last_seq + 1, next_step):
            self.problems.append(f"{name} follows chunk {last_seq}, step {next_step - 1}")
        self.seen[key] = chunk.first_step
        self._ends[entry.sid] = (entry.seq, chunk.first_step + chunk.steps)
        self.steps += chunk.steps


class Follower:
    """Follows the log in a thread, pays for more inserts as a learner does, and keeps the ledger.

    It counts every step that it reads as replayed once. `account` is for a check of the band.
    """

    def __init__(self, client: ReplayClient, *, lead: int = LEAD) -> None:
        self.ledger = Ledger()
        self.fence = client.acquire_fence()
        self.fenced = 0
        self.unsettled = 0
        self.position = 0
        self.updates = 0
        self.account = CreditLimiter(
            train_ratio=1,
            batch_steps=BATCH,
            chunk_steps=BATCH,
            min_size_steps=BATCH,
            capacity_steps=10 * lead,
            insert_tolerance=lead,
            sample_tolerance=BATCH,
            offset_steps=0,
        )
        self._client = client
        self._tail = LogTail(client, SCHEMA, queue_bytes=2**26)
        self._tail.start()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def trouble(self) -> str:
        """Why the log cannot be read now."""
        return self._tail.trouble

    def stop(self) -> None:
        """Stop following."""
        self._ending.set()
        self._thread.join(10)
        self._tail.stop()

    def _run(self) -> None:
        while not self._ending.is_set():
            self._tail.wait(0.05)
            for arrival in self._tail.take():
                self.ledger.enter(arrival)
                self.position = arrival.entry.position + arrival.entry.steps
            # Whatever was evicted since, it has read: the size that matters is what it has seen.
            while self.account.may_start_update(self.position, self.position, self.updates):
                self.updates += 1
            replayed = self.account.replayed_steps(self.updates)
            try:
                self._client.settle(self.fence, replayed, self.account.budget(self.updates))
            except ReplayFenced:
                self.fenced += 1
                self._renew()
            except ReplayUnavailable:
                self.unsettled += 1
                self._ending.wait(0.02)

    def _renew(self) -> None:
        try:
            self.fence = self._client.acquire_fence()
        except ReplayUnavailable:
            return


class Heard(logging.Handler):
    """Keeps what the replay service says in this process, from warnings on."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []
        logging.getLogger("replay_service").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one line."""
        self.lines.append(record.getMessage())

    def close(self) -> None:
        """Listen no more."""
        logging.getLogger("replay_service").removeHandler(self)
        super().close()


class Writer:
    """A writer process."""

    def __init__(self, journal: Path, url: str, slots: list[int], **options: float) -> None:
        self.slots = slots
        values = {"pause_s": 0.02, "timeout_s": 2.0, "ring": 64} | options
        words = [f"--{key.replace('_', '-')}={value}" for key, value in values.items()]
        command = [sys.executable, "-m", "benchmarks.faults.writer", url, str(journal)]
        self._says = journal.with_suffix(".err")
        self._errors = self._says.open("ab")
        self.process = subprocess.Popen(
            [*command, *map(str, slots), *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )

    @property
    def lines(self) -> list[str]:
        """What it has said."""
        return self._says.read_text(errors="replace").splitlines()

    def ask(self) -> dict[str, Any]:
        """Return the counters of its uploader, and why it waits."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return dict(json.loads(self.process.stdout.readline()))

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self.process.send_signal(number)

    def kill(self) -> None:
        """End it as nothing can prevent."""
        self.process.kill()
        self._close()

    def finish(self, timeout_s: float = 90.0) -> dict[str, Any]:
        """Let it deliver everything and end; returns its last counters."""
        out, _ = self.process.communicate(timeout=timeout_s)
        self._errors.close()
        assert self.process.returncode == 0, (self.process.returncode, self._errors.name)
        return dict(json.loads(out.splitlines()[-1]))

    def _close(self) -> None:
        self.process.wait(20)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()
        self._errors.close()


class Rig:
    """One server in a directory, a proxy per writer and one for the follower.

    Args:
        directory: for data, sockets and journals.
        limits: of the replay; the defaults evict nothing.
    """

    def __init__(
        self, directory: Path, *, seed: int = 0, server: Any = None, **limits: int
    ) -> None:
        self.directory, self.seed = directory, seed
        self._heard = Heard()
        self._killed: list[int] = []
        self.limits = Limits(**{"capacity_steps": 10**6, "capacity_bytes": 2**26, **limits})
        self.server = server or EmbeddedServer(directory / "server", max_memory_bytes=MEMORY)
        self.server.start()
        self.client = ReplayClient(self.server.url, timeout_s=5.0)
        self.client.create(SCHEMA, self.limits)
        self.proxies: list[FaultProxy] = []
        self.writers: list[Writer] = []
        self.follower_proxy = self.proxy("follower")
        self._follower_client = ReplayClient(self.follower_proxy.url, timeout_s=2.0)
        self.follower = Follower(self._follower_client)

    @property
    def log_file(self) -> Path:
        """The append-only file that is being written."""
        (path,) = (self.server.directory / "appendonlydir").glob("*.incr.aof")
        return Path(path)

    def proxy(self, name: str) -> FaultProxy:
        """Return a new proxy to the server."""
        made = FaultProxy(
            self.directory / f"{name}.sock", self.server.url, seed=self.seed + len(self.proxies)
        )
        self.proxies.append(made)
        return made

    def writer(self, *slots: int, proxy: FaultProxy | None = None, **options: float) -> Writer:
        """Start a process that writes the streams of some slots, through a proxy or directly."""
        journal = self.directory / f"journal-{len(self.writers)}"
        url = proxy.url if proxy else self.server.url
        made = Writer(journal, url, list(slots), **options)
        self.writers.append(made)
        return made

    def acknowledged(self) -> set[tuple[str, int]]:
        """Return all chunks of which any writer was told that they are safe."""
        found = set()
        for journal in self.directory.glob("journal-*[0-9]"):
            for line in journal.read_text().splitlines():
                sid, seq = line.rsplit(" ", 1)
                found.add((sid, int(seq)))
        return found

    def wait_chunks(self, more: int = 5, timeout_s: float = 60.0) -> float:
        """Wait until so many more chunks were acknowledged; returns the seconds that took."""
        goal = len(self.acknowledged()) + more
        return until(lambda: len(self.acknowledged()) >= goal, timeout_s, "writing")

    def kill_server(self, *, cut_bytes: int = 0) -> None:
        """SIGKILL the server and wait for its end; cut its log as a power cut would."""
        if cut_bytes:
            self._await_written()
        self._killed.append(self.client.stats().epoch)
        os.kill(self.server.process_id, signal.SIGKILL)
        until(lambda: not self.server.running, 10, "the server's end")
        if cut_bytes:
            size = self.log_file.stat().st_size
            os.truncate(self.log_file, max(size - cut_bytes, 0))

    def _await_written(self) -> None:
        """Wait until the server holds nothing back, as it may while a sync takes long.

        The cut is measured from the end of the file, which must reach beyond the creation.
        """
        with redis.Redis.from_url(self.server.url) as admin:
            until(lambda: not admin.info("persistence")["aof_buffer_length"], 10, "the disk")

    def config(self, name: str, value: int | str) -> None:
        """Change a setting of the server."""
        with redis.Redis.from_url(self.server.url) as admin:
            admin.config_set(name, value)

    def replicate_to(self, replica: EmbeddedServer) -> None:
        """Let another server, which is running, copy this one over a port of this machine."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.config("port", port)
        with redis.Redis.from_url(replica.url) as admin:
            admin.replicaof("127.0.0.1", port)
            until(lambda: admin.info("replication")["master_link_status"] == "up", 30, "a copy")

    def move_to(self, server: EmbeddedServer) -> None:
        """Let everybody find another server at the address that they know."""
        for proxy in self.proxies:
            proxy.target = server.url.removeprefix("unix://")
            proxy.break_all()
        self.client.close()
        self.client = ReplayClient(server.url, timeout_s=5.0)

    @contextmanager
    def stopped(self, process_id: int) -> Iterator[None]:
        """Stop a process (SIGSTOP) for the length of a block."""
        os.kill(process_id, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(process_id, signal.SIGCONT)

    def catch_up(self, timeout_s: float = 60.0) -> None:
        """Wait until the follower has read all that the log holds."""

        def level() -> bool:
            try:
                return self.follower.position == self.client.stats().inserted_steps
            except ReplayError:
                return False

        until(level, timeout_s, f"following the log ({self.follower.trouble})")

    def catch_up_paused(self, writer: Writer) -> None:
        """Let the follower read all that a writer was told is safe, while the writer is stopped."""
        with self.stopped(writer.process.pid):
            self.catch_up()

    def missing(self) -> set[tuple[str, int]]:
        """Return chunks that were acknowledged and never came out of the log."""
        return self.acknowledged() - self.follower.ledger.seen.keys()

    def verify(
        self, *, excused: Collection[str] = (), shown: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """Let every writer deliver what it has, then check everything that is promised.

        Args:
            excused: streams that the server may have lost the end of.
            shown: how the fault must have been visible: words of a log line that name it, of a
                writer or of this process → the counter that must have moved.

        Returns:
            Counters of the writers that were still there, added up.
        """
        total: Counter[str] = Counter()
        for writer in self.writers:
            if writer.process.poll() is None:
                counters = writer.finish()
                total.update(counters.pop("replies"))
                total.update({k: v for k, v in counters.items() if isinstance(v, int | float)})
        total["unsettled"] = self.follower.unsettled
        self.catch_up()
        self._require_visible(shown or {}, total)
        newest = dict[str, int]()
        for sid, seq in self.acknowledged():
            newest[sid] = max(newest.get(sid, 0), seq)
        report = check_server(
            self.client,
            account=self.follower.account,
            acknowledged=newest,
            excused=excused,
        )
        assert report.ok, report.violations
        assert not self.follower.ledger.problems, self.follower.ledger.problems[:5]
        assert not self.missing(), sorted(self.missing())[:5]
        return dict(total)

    def _require_visible(self, shown: Mapping[str, str], counters: Mapping[str, float]) -> None:
        """Fail unless every fault has left a line that names it, and has moved a counter."""
        lines = [*self._heard.lines, *(line for one in self.writers for line in one.lines)]
        for words, counter in shown.items():
            assert any(words in line for line in lines), (words, lines[-20:])
            assert counters.get(counter, 0) > 0, (words, counter, counters)
        ended = sum("server_ended" in line for line in lines)
        assert ended >= len(self._killed), (ended, lines[-20:])
        # A server that was killed has another epoch, as soon as anything is inserted again.
        assert self.client.stats().epoch > max(self._killed, default=0)

    def close(self) -> None:
        """End everything."""
        self._heard.close()
        for writer in self.writers:
            if writer.process.poll() is None:
                writer.kill()
        self.follower.stop()
        for proxy in self.proxies:
            proxy.close()
        self._follower_client.close()
        self.client.close()
        self.server.stop()
