"""The replay service process: prepares the server, and says how it is and who else has metrics."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from replay_service.client import ReplayClient
from replay_service.counters import ReplayStats
from replay_service.discovery import Target, live_targets
from replay_service.endpoint import Answer
from replay_service.errors import ReplayConfigError, ReplayError, ReplayUnavailable
from replay_service.memory import require_no_eviction

log = logging.getLogger(__name__)

PREFIX = "dreamer_replay_log_"
JSON, TEXT = "application/json", "text/plain; charset=utf-8"
COUNTERS = {
    "inserted_steps": "Environment steps committed.",
    "inserted_bytes": "Bytes of the chunks committed, as they are stored.",
    "committed_chunks": "Chunks committed.",
    "evicted_steps": "Steps dropped to make room.",
    "duplicates": "Inserts of chunks that were there already; they change nothing.",
    "gaps": "Inserts refused because an earlier chunk of the stream was missing.",
    "waits": "Inserts put off because the train ratio admitted no more.",
}
"""Counters of the server by the name of the field of `ReplayStats`."""
GAUGES = {
    "size_steps": "Steps held.",
    "size_bytes": "Bytes of the chunks held.",
    "chunks": "Chunks held.",
    "capacity_steps": "Steps at which the oldest are dropped.",
    "capacity_bytes": "Bytes at which the oldest are dropped.",
    "min_size_steps": "Steps held from which on inserts need credit.",
    "replayed_steps": "Steps replayed that the server was told of; a resumed run goes back.",
    "budget_steps": "Inserted steps up to which inserts are admitted.",
    "fence": "Fence of the newest learner; grows whenever one starts.",
    "epoch": "Life of the server, in ms of Unix time; grows whenever it is started or promoted.",
}
"""Gauges by the name of the field of `ReplayStats`."""
FACTS = {
    "streams": "Streams that the server remembers: open ones, and those with chunks held.",
    "memory_used_bytes": "Memory that the server uses for everything.",
    "memory_limit_bytes": "Memory above which the server refuses inserts; 0 is no limit.",
}
"""Gauges by the name of the field of `ServerFacts`."""


@dataclass(frozen=True, kw_only=True)
class ServerFacts:
    """What a server says of itself beside the replay."""

    memory_used_bytes: int
    memory_limit_bytes: int
    memory_policy: str
    durable: bool
    """Whether it writes inserts to a disk."""
    streams: int
    quarantined_chunks: int
    """Chunks quarantined since the replay was made."""


class ReplayWatch(ReplayClient):
    """A client that looks at a server and changes nothing; the role exporter may do all of it."""

    def facts(self) -> ServerFacts:
        """Read what the server says of itself. Raises ReplayError."""
        info = self._info("memory") | self._info("persistence")
        return ServerFacts(
            memory_used_bytes=int(info["used_memory"]),
            memory_limit_bytes=int(info["maxmemory"]),
            memory_policy=str(info["maxmemory_policy"]),
            durable=bool(int(info["aof_enabled"])),
            streams=int(self._command("HLEN", self._seq)),
            quarantined_chunks=self._quarantined(),
        )

    def admits(self) -> None:
        """Return if the server would commit an insert that has credit.

        Raises:
            ReplayFull, ReplayUnavailable: why it would not.
            ReplayConfigError: it has no function library, or one of another version.
        """
        try:
            reply = self._fcall("replay_admits", [self._meta])
        except ReplayUnavailable as error:
            if "no replay has been created" not in str(error):
                raise
            raise ReplayConfigError(
                f"the server at {self.address} lacks the function library of this version: it is "
                "loaded by a learner, or by this service as admin (admin.password in --secrets)"
            ) from error
        assert reply == [b"OK"], reply

    def _info(self, section: str) -> dict[str, Any]:
        return dict(self._command("INFO", section))

    def _quarantined(self) -> int:
        try:
            flat = self._command("XINFO", "STREAM", self._dead)
        except ReplayUnavailable as error:
            if "no such key" in str(error).lower():
                return 0
            raise
        return int(dict(zip(flat[::2], flat[1::2], strict=True))[b"entries-added"])


class ReplayMetrics(Collector):
    """What a replay server holds and admits, read at each scrape.

    While the server does not answer, ``up`` is 0 and nothing else is exported: no old numbers.
    Before a replay is created on it, only what concerns the server is.

    Args:
        watch: whose server is asked; a scrape takes at most about five times its `timeout_s`.
    """

    def __init__(self, watch: ReplayWatch) -> None:
        self._watch = watch

    def collect(self) -> Iterable[Metric]:
        """Yield all metrics as they are now."""
        facts, stats = self._read()
        yield _gauge("up", "1 if the replay server answered, else 0.", facts is not None)
        if facts is None:
            return
        yield _gauge("writable", "1 if the server would commit an insert.", self._writable())
        for name, text in FACTS.items():
            yield _gauge(name, text, getattr(facts, name))
        yield CounterMetricFamily(
            PREFIX + "quarantined_chunks",
            "Chunks and entries of the log that learners found damaged and left out.",
            value=facts.quarantined_chunks,
        )
        if stats is None:
            return
        for name, text in COUNTERS.items():
            yield CounterMetricFamily(PREFIX + name, text, value=getattr(stats, name))
        for name, text in GAUGES.items():
            yield _gauge(name, text, getattr(stats, name))
        # No bound holds below the minimum size, which is not the same as no credit.
        if stats.insert_credit_steps is not None:
            text = "Steps that may still be inserted; absent below the minimum size."
            yield _gauge("insert_credit_steps", text, stats.insert_credit_steps)

    def _read(self) -> tuple[ServerFacts | None, ReplayStats | None]:
        try:
            facts = self._watch.facts()
        except ReplayError as error:
            log.debug("replay_scrape_failed error=%s", error)
            return None, None
        try:
            return facts, self._watch.stats()
        except ReplayError as error:
            log.debug("replay_not_there error=%s", error)
            return facts, None

    def _writable(self) -> bool:
        try:
            self._watch.admits()
        except ReplayError as error:
            log.debug("replay_not_writable error=%s", error)
            return False
        return True


class ReplayService:
    """Prepares a server for learners and actors, and answers for it.

    Args:
        watch: of the server, as exporter or more.
        keeper: of the same server as a role that may load functions (admin, learner); None where
            there is none, and a learner has to.
        own: where this process serves its metrics, for the list of targets.
    """

    def __init__(
        self, watch: ReplayWatch, keeper: ReplayClient | None = None, own: Target | None = None
    ) -> None:
        self._watch, self._keeper = watch, keeper
        self.own = own

    def prepare(self) -> None:
        """Check the server's version and configuration, and load the function library.

        Also done by every health check, so a server that has lost its functions gets them back.

        Raises:
            ReplayConfigError: the server is too old, drops keys by itself, or has no functions.
            ReplayError: it cannot be used, or refuses these credentials.
        """
        self._watch.check()
        facts = self._watch.facts()
        require_no_eviction(self._watch.address, facts.memory_limit_bytes, facts.memory_policy)
        if self._keeper is not None:
            self._keeper.load_library()
        self._watch.admits()

    def warnings(self) -> list[str]:
        """Return what works and is not wise in the server's configuration. Raises ReplayError."""
        facts, found = self._watch.facts(), []
        if not facts.memory_limit_bytes:
            found.append("the server has no maxmemory: it may take all memory of its machine")
        if not facts.durable:
            found.append("the server has appendonly off: its end is the end of the replay")
        return found

    def healthz(self) -> Answer:
        """Return 200 if inserts with credit would be committed now, else 503 and why not."""
        try:
            self.prepare()
        except ReplayError as error:
            return 503, TEXT, " ".join(str(error).split()) + "\n"
        return 200, TEXT, "ok\n"

    def targets(self) -> Answer:
        """Return all processes with metrics, as Prometheus's HTTP service discovery wants it.

        503 while the server does not answer: Prometheus then keeps the targets it has.
        """
        try:
            found = live_targets(self._watch)
        except ReplayError as error:
            return 503, TEXT, " ".join(str(error).split()) + "\n"
        own = [self.own] if self.own else []
        return 200, JSON, json.dumps([target.to_json() for target in (*own, *found)])

    def pages(self) -> Mapping[str, Any]:
        """Return the pages for a `MetricsEndpoint`."""
        return {"/healthz": self.healthz, "/sd": self.targets}


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(PREFIX + name, text, value=float(value))
