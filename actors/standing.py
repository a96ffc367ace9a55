"""A fleet that outlives its learner: the Ray actor that supervises it, and the learner's end.

On a cluster the fleet of a run is a detached Ray actor (`FleetHost`) whose actors are detached too,
all found again by name. If it dies, Ray starts it again and it takes over the actors that live. If
the learner dies, the next one does the same with the fleet.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.actor import ActorSpec
from actors.fleet import Fleet, FleetError, Supervision
from actors.roster import HUB, Roster, end_named, find, hub_source

log = logging.getLogger(__name__)

_CALLS = 16
_START_S = 300.0
"""Time in which a fleet must have answered for the first time."""
_ANSWER_S = 20.0
_EVENTS = 256
_SCORES = 256
_DRAIN_S = 5.0
_NEVER = -1


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that a fleet needs to run without its learner."""

    namespace: str
    """Names of the run lie in it, those of the fleet, its actors and the hub."""
    spec: ActorSpec
    """What every actor does."""
    supervision: Supervision
    """When the fleet steps in."""
    orphan_after_s: float
    """Seconds without a learner after which the fleet ends by itself."""
    actors: int
    """How many actors to start with."""
    code: str = ""
    """Version of the program that the actors run, filled in by `StandingFleet`."""

    @property
    def roster(self) -> Roster:
        """The names of the fleet."""
        return Roster(namespace=self.namespace, split=self.spec.split)


class FleetHost:
    """Supervise a `Fleet` for whichever learner there is. A detached Ray actor.

    Guarantees:
        1. Learners are ordered by their fence: one that was replaced is refused.
        2. Started again, it takes over the actors that live, with their lives and their number.
        3. It ends itself, its actors and (for training actors) the hub when no learner has asked
           for `orphan_after_s`; the log says so.

    Args:
        plan: what to run.
    """

    def __init__(self, plan: Plan) -> None:
        logging.basicConfig(level=logging.INFO)
        self._plan = plan
        self._tail = _Tail()
        logging.getLogger("actors").addHandler(self._tail)
        logging.getLogger("actors").setLevel(logging.INFO)
        self._born = secrets.token_hex(4)
        self._fence = _NEVER
        self._heard_at = time.monotonic()
        self._told: dict[tuple[int, int], int] = {}
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._fleet = Fleet(
            plan.spec,
            hub_source(plan.namespace),
            actors=plan.actors,
            supervision=plan.supervision,
            roster=plan.roster,
        )
        self._fleet.start()
        threading.Thread(target=self._watch, name="orphan", daemon=True).start()

    def plan(self) -> Plan:
        """Return what it was started with, and the replay servers that it was told of since."""
        return self._plan

    def report(
        self, fence: int, actors: int, seen: int, born: str, replay_url: str
    ) -> dict[str, Any]:
        """Answer the learner's question, which also tells that the learner lives.

        Args:
            fence: of the learner; a learner with a lower one than another before it is refused.
            actors: how many it wants.
            replay_url: replay servers that they are to write to.
            seen: number of the last event that it knows of the fleet with the birth mark `born`.

        Returns:
            {newer: fence of the newer learner} for one that was replaced. Otherwise `stats`,
            `summary` and `failure` of the fleet, its `born`, and `events`, [number, level, text]
            of its log. Each evaluation score is told once.
        """
        with self._lock:
            if fence < self._fence:
                return {"newer": self._fence}
            if fence > self._fence:
                log.info("fleet_has_learner fence=%d before=%d", fence, self._fence)
            self._fence, self._heard_at = fence, time.monotonic()
            if actors != self._fleet.desired and not self._fleet.failure:
                self._fleet.scale(actors)
            if replay_url != self._plan.spec.replay_url:
                self._plan = replace(
                    self._plan, spec=replace(self._plan.spec, replay_url=replay_url)
                )
                self._fleet.redirect(replay_url)
            stats = self._fleet.stats()
            for actor in stats:
                actor["scores"] = self._untold(actor)
        return {
            "stats": stats,
            "summary": self._fleet.summary(),
            "failure": self._fleet.failure,
            "born": self._born,
            "events": self._tail.after(seen if born == self._born else _NEVER),
        }

    def look(self) -> dict[str, Any]:
        """Return how the fleet is, for whoever is not its learner."""
        return {
            "stats": self._fleet.stats(),
            "failure": self._fleet.failure,
            "fence": self._fence,
            "learner_away_s": time.monotonic() - self._heard_at,
            "orphan_after_s": self._plan.orphan_after_s,
            "pid": os.getpid(),
        }

    def scale(self, actors: int) -> None:
        """Let actors join or leave while the learner is away; see `Fleet.scale`."""
        with self._lock:
            self._fleet.scale(actors)

    def stop(self, drain_s: float) -> list[dict[str, Any]]:
        """Stop all actors and return their last stats; see `Fleet.stop`."""
        self._ended.set()
        return self._fleet.stop(drain_s)

    def _untold(self, actor: dict[str, Any]) -> list[dict[str, Any]]:
        key = int(actor["slot"]), int(actor["life"])
        fresh = [one for one in actor.get("scores", []) if one["number"] > self._told.get(key, 0)]
        if fresh:
            self._told[key] = fresh[-1]["number"]
        return fresh

    def _watch(self) -> None:
        limit = self._plan.orphan_after_s
        while not self._ended.wait(min(1.0, limit / 4)):
            away_s = time.monotonic() - self._heard_at
            if away_s > limit:
                log.error("fleet_orphaned no learner for %.0f s: the fleet ends", away_s)
                self.stop(_DRAIN_S)
                if self._plan.spec.split == "train":
                    end_named(HUB, self._plan.namespace)
                ray.kill(ray.get_runtime_context().current_actor, no_restart=True)


class StandingFleet:
    """A learner's end of a `FleetHost`; to be used like a `Fleet`.

    Guarantees:
        1. `start` takes over the fleet that lives if it does what is wanted now, its actors
           untouched. One that does something else is stopped and started anew; the log names the
           differences.
        2. A fleet that dies while the learner lives is found or started again; meanwhile `stats`
           are the last ones.
        3. `leave` leaves everything as it is; `stop` ends it.

    Args:
        plan: what the fleet does.
        fence: of this learner.
        on_failure: called once, from a thread, with the message of a failure.
        ask_every_s: seconds between two questions.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        fence: int,
        on_failure: Callable[[str], None] | None = None,
        ask_every_s: float = 1.0,
    ) -> None:
        self._plan = replace(plan, code=_code())
        self._fence, self._on_failure, self._ask_every_s = fence, on_failure, ask_every_s
        self._actors = plan.actors
        self._host: Any = None
        self._last: dict[str, Any] = {}
        self._scores: dict[tuple[int, int], deque[Any]] = {}
        self._born, self._seen = "", _NEVER
        self._failure = ""
        self._lock = threading.Lock()
        self._left = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Take over the fleet, or start it. Blocks until it has answered.

        Raises:
            FleetError: it does not answer, or has a newer learner.
        """
        roster = self._plan.roster
        found = find(roster.host, roster.namespace)
        if found is not None and not self._fits(found):
            end_fleet(found, roster, _DRAIN_S)
            found = None
        self._host = found or self._create()
        try:
            # What happened before this learner is not news.
            self._ask(_START_S, logging.CRITICAL if found else logging.INFO)
        except (RayError, GetTimeoutError) as error:
            raise FleetError(
                f"the fleet does not answer within {_START_S:.0f} s: {error}; `ray list actors` "
                "shows whether it found a node"
            ) from error
        self.check()
        log.info("fleet_%s namespace=%s", "taken_over" if found else "started", roster.namespace)
        self._thread = threading.Thread(target=self._keep_asking, name="fleet", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise FleetError if the fleet has failed or has a newer learner."""
        if self._failure:
            raise FleetError(self._failure)

    def stats(self) -> list[dict[str, Any]]:
        """Return what the fleet last said about each actor; see `Fleet.stats`."""
        with self._lock:
            return [
                {**actor, "scores": list(self._scores.get(_key(actor), ()))}
                for actor in self._last.get("stats", [])
            ]

    def summary(self) -> dict[str, Any]:
        """Return what `actors.metrics.FleetMetrics` exports."""
        empty = {"desired": self._actors, "states": {}, "restarts": {}, "quarantined": 0}
        found: dict[str, Any] = self._last.get("summary", empty)
        return found

    def scale(self, actors: int) -> None:
        """Let actors join or leave with the next question; see `Fleet.scale`."""
        if actors < 1:
            raise ValueError(f"a fleet needs at least 1 actor, got {actors}")
        self.check()
        self._actors = actors

    def redirect(self, replay_url: str) -> None:
        """Let actors write to these servers with the next question; see `Fleet.redirect`."""
        self._plan = replace(self._plan, spec=replace(self._plan.spec, replay_url=replay_url))

    def leave(self) -> None:
        """Ask no more; the fleet goes on without a learner."""
        self._left.set()
        if self._thread is not None:
            self._thread.join(_ANSWER_S + 5.0)

    def stop(self, drain_s: float = 10.0) -> list[dict[str, Any]]:
        """End the fleet; see `Fleet.stop`. One that has a newer learner is left to that."""
        self.leave()
        if self._host is None:
            return self.stats()
        try:
            # A learner that slept may not have asked since it was replaced.
            self._ask(_ANSWER_S)
        except (RayError, GetTimeoutError) as error:
            log.debug("fleet_away error=%s", error)
        if not self.replaced:
            end_fleet(self._host, self._plan.roster, drain_s)
        return self.stats()

    @property
    def replaced(self) -> bool:
        """Whether the fleet has said that it has a newer learner."""
        return "newer" in self._last

    def _fits(self, host: Any) -> bool:
        """Whether a living fleet does what is wanted, and can go on doing it."""
        try:
            there = ray.get(host.plan.remote(), timeout=_START_S)
            look = ray.get(host.look.remote(), timeout=_ANSWER_S)
        except Exception as error:
            # Also what an older program wrote and this one cannot read.
            log.warning("fleet_replaced it does not answer: %s", error)
            return False
        if look["fence"] > self._fence:
            raise FleetError(_replaced(self._fence, look["fence"]))
        if look["failure"]:
            log.warning("fleet_replaced it had failed: %s", look["failure"])
            return False
        found = differences(there, replace(self._plan, actors=there.actors))
        if found:
            log.warning("fleet_replaced it did something else: %s", "; ".join(found))
        return not found

    def _create(self) -> Any:
        roster = self._plan.roster
        here = ray.get_runtime_context().get_node_id()
        return (
            ray.remote(FleetHost)
            .options(
                name=roster.host,
                namespace=roster.namespace,
                lifetime="detached",
                get_if_exists=True,
                num_cpus=0,
                # A byte: Ray places actors that take nothing anywhere, whatever the strategy says.
                memory=1,
                max_restarts=-1,
                max_task_retries=0,
                max_concurrency=_CALLS,
                # Beside the learner, and elsewhere once that node is gone.
                scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=True),
            )
            .remote(self._plan)
        )

    def _keep_asking(self) -> None:
        away = False
        while not self._left.wait(self._ask_every_s):
            try:
                self._ask(_ANSWER_S)
                if away:
                    log.warning("fleet_back")
                away = False
            except (RayError, GetTimeoutError) as error:
                if not away:
                    log.warning("fleet_away error=%s", " ".join(str(error).split())[:300])
                away = True
                if isinstance(error, RayActorError):
                    self._host = self._create()
            if self._failure:
                if self._on_failure is not None:
                    self._on_failure(self._failure)
                return

    def _ask(self, timeout_s: float, least: int = logging.INFO) -> None:
        """Ask once, and log what the fleet has logged since the last time at least so loud."""
        url = self._plan.spec.replay_url
        question = self._host.report.remote(self._fence, self._actors, self._seen, self._born, url)
        answer = ray.get(question, timeout=timeout_s)
        with self._lock:
            if "newer" in answer:
                self._last = {**self._last, "newer": answer["newer"]}
                self._failure = _replaced(self._fence, answer["newer"])
                return
            self._last = answer
            self._failure = answer["failure"]
            for actor in answer["stats"]:
                if fresh := actor.pop("scores"):
                    kept = self._scores.setdefault(_key(actor), deque(maxlen=_SCORES))
                    kept.extend(fresh)
            self._born = answer["born"]
        for number, level, text in answer["events"]:
            self._seen = number
            if level >= least:
                log.log(level, "%s", text)


def differences(there: Plan, wanted: Plan) -> list[str]:
    """Return the fields on which two plans disagree, as ``name: there there, wanted now``."""
    old, new = dict(_leaves(there, "")), dict(_leaves(wanted, ""))
    return [
        f"{name}: {old.get(name)} there, {new.get(name)} now"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]


def _leaves(value: Any, name: str) -> list[tuple[str, str]]:
    if is_dataclass(value):
        prefix = f"{name}." if name else ""
        return [
            leaf
            for item in fields(value)
            for leaf in _leaves(getattr(value, item.name), prefix + item.name)
        ]
    return [(name, repr(value))]


def end_fleet(host: Any, roster: Roster, drain_s: float) -> None:
    """Stop a fleet in order if its host (None if there is none) answers, and in any case."""
    try:
        if host is not None:
            ray.get(host.stop.remote(drain_s), timeout=drain_s + _ANSWER_S)
    except RayError as error:
        log.warning("fleet_killed it did not stop by itself: %s", error)
    roster.end()


def _replaced(fence: int, newer: int) -> str:
    return (
        f"another learner (fence {newer}) has taken over the fleet of this run; this one (fence "
        f"{fence}) must not go on: two learners were started for one run directory"
    )


def _key(actor: dict[str, Any]) -> tuple[int, int]:
    return int(actor["slot"]), int(actor["life"])


def _code() -> str:
    try:
        return version("dreamfleet")
    except PackageNotFoundError:
        return "unknown"


class _Tail(logging.Handler):
    """The last lines of a log, numbered from 0."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._lines: deque[tuple[int, int, str]] = deque(maxlen=_EVENTS)
        self._count = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one line; called with the handler's lock held."""
        self._lines.append((self._count, record.levelno, record.getMessage()))
        self._count += 1

    def after(self, seen: int) -> list[tuple[int, int, str]]:
        """Return the lines with a number above `seen`."""
        self.acquire()
        try:
            return [line for line in self._lines if line[0] > seen]
        finally:
            self.release()
