"""The fleet: it starts the actors of a run and replaces those that die, hang or fail."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from actors.actor import ActorProcess, ActorSpec, home_of
from actors.evaluator import Evaluator
from actors.roster import Roster
from actors.weights import WeightSource
from dreamer.weights import Version

log = logging.getLogger(__name__)

_DRAIN_S = 20.0
"""Time in which actors that leave may deliver what they hold."""
_ANSWER_THREADS = 8
"""Calls that an actor answers at the same time: `stats`, `ping`, `stop`, `collect`."""


class FleetError(RuntimeError):
    """The actors cannot do their work; the message holds what the first of them said."""


@dataclass(frozen=True, kw_only=True)
class Supervision:
    """When the fleet steps in."""

    check_every_s: float = 1.0
    """Seconds between two rounds of questions."""
    answer_timeout_s: float = 30.0
    """Seconds after which an actor that does not answer is replaced."""
    start_timeout_s: float = 300.0
    """Seconds that a new actor may take until its first answer."""
    progress_timeout_s: float = 60.0
    """Seconds without a step, and without a reason to wait, after which an actor is replaced, on
    top of what an environment may take to hang and start again."""
    most_restarts: int = 5
    """Restarts of one slot within the window that are taken for bad luck."""
    restart_window_s: float = 600.0
    """Length of that window in seconds."""
    restart_delay_s: float = 1.0
    """Wait before a second restart in the window; doubles with each further one."""
    cpus_per_actor: float = 0.25
    """CPU slots of Ray that an actor takes; below 1 because the fleet may oversubscribe."""
    resources_per_actor: Mapping[str, float] = field(default_factory=dict)
    """Further resources of Ray that an actor takes, which only some nodes offer."""


@dataclass
class _Slot:
    """One place in the fleet and whoever fills it now."""

    number: int
    life: int = 0
    handle: Any = None
    question: Any = None
    asked_at: float = 0.0
    started_at: float = 0.0
    start_again_at: float = 0.0
    restarts: deque[float] = field(default_factory=deque)
    last: dict[str, Any] = field(default_factory=dict)
    state: str = "starting"
    acted: bool = False
    moves: int = 0
    trouble: str = ""
    trace: str = ""
    failed_in: str = ""
    steps_before: int = 0
    steps_seen: int = 0
    progress_at: float = 0.0


@dataclass(frozen=True)
class _Farewell:
    """An actor that was asked to leave."""

    slot: _Slot
    answer: Any
    deadline: float


class Fleet:
    """Actors of one run, supervised by a thread.

    Guarantees:
        1. An actor that is dead, does not answer, makes no progress without saying why, or has
           failed is replaced in its slot, under a new incarnation of its streams.
        2. A slot that needs more than a few restarts in ten minutes is given up (quarantined), and
           its last error is kept. If all slots fail before any has taken a step, or more than half
           are quarantined, the fleet has failed, says why (`check`), and restarts nothing more.
        3. After `scale` actors join, or the last ones leave: they stop stepping, deliver what they
           hold and end, while the others go on.
        4. After `redirect` the actors whose streams belong to another replay server now do the
           same, and a successor of each takes its slot, under a new incarnation of its streams.
        5. After `stop` none of its actors runs.
        6. With a roster actors outlive the process that supervises them, and its successor takes
           over those that live.

    Args:
        spec: what every actor does; its slot and life are filled in here.
        source: where actors get weights; must be picklable (`actors.weights.HubSource` is).
        actors: how many.
        supervision: limits and intervals.
        on_failure: called once, from the supervising thread, with the message of the failure.
        roster: names for the actors; without one they end with this process.
    """

    def __init__(
        self,
        spec: ActorSpec,
        source: WeightSource,
        *,
        actors: int,
        supervision: Supervision | None = None,
        on_failure: Callable[[str], None] | None = None,
        roster: Roster | None = None,
    ) -> None:
        self._roster = roster
        self._spec, self._source, self._on_failure = spec, source, on_failure
        self._limits = supervision or Supervision()
        self._slots = [_Slot(number) for number in range(actors)]
        self._leaving: list[_Farewell] = []
        self._redirected = False
        self._failure = ""
        self._restarts: Counter[str] = Counter()
        self._lock = threading.RLock()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def desired(self) -> int:
        """How many actors there should be."""
        return len(self._slots)

    @property
    def failure(self) -> str:
        """Why the fleet has failed; empty as long as it has not."""
        return self._failure

    def start(self) -> None:
        """Start all actors. Returns at once; they report through `stats`.

        With a roster, those that live are taken over, and tell how many there should be.
        """
        assert self._thread is None, "a fleet starts once"
        with self._lock:
            self._adopt()
            for slot in self._slots:
                if slot.handle is None:
                    self._launch(slot)
        self._thread = threading.Thread(target=self._supervise, name="fleet", daemon=True)
        self._thread.start()

    def _adopt(self) -> None:
        living = self._roster.living() if self._roster is not None else {}
        if living:
            self._slots = [_Slot(number) for number in range(max(living) + 1)]
        for number, member in sorted(living.items()):
            slot = self._slots[number]
            slot.life, slot.handle, slot.started_at = member.life, member.handle, time.monotonic()
            slot.progress_at = slot.started_at
            log.warning("actor_adopted slot=%d life=%d", number, member.life)

    def check(self) -> None:
        """Raise FleetError if the fleet has failed."""
        if self._failure:
            raise FleetError(self._failure)

    def stats(self) -> list[dict[str, Any]]:
        """Return the last answer of every actor, with its state, restarts and last trouble.

        The state is starting, acting, blocked, restarting, quarantined, draining or stopped.
        `env_steps` counts the records of all lives of the slot. `trouble` is why it was last
        replaced, `trace` the traceback of that, if there is one.
        """
        with self._lock:
            leaving = [f.slot for f in self._leaving if not self._keeps(f.slot)]
            return [
                {
                    **slot.last,
                    "slot": slot.number,
                    "split": self._spec.split,
                    "life": slot.life,
                    "state": slot.state,
                    "restarts": slot.life - slot.moves,
                    "trouble": slot.trouble,
                    "trace": slot.trace,
                    "env_steps": slot.steps_before + slot.last.get("env_steps", 0),
                }
                for slot in [*self._slots, *leaving]
            ]

    def summary(self) -> dict[str, Any]:
        """Return what `actors.metrics.FleetMetrics` exports."""
        with self._lock:
            states = Counter(slot.state for slot in self._slots)
            if self._leaving:
                states["draining"] = len(self._leaving)
            return {
                "desired": len(self._slots),
                "states": dict(states),
                "restarts": dict(self._restarts),
                "quarantined": states["quarantined"],
            }

    def scale(self, actors: int, drain_s: float = _DRAIN_S) -> None:
        """Let actors join or leave until there are so many. Returns at once; see `stats`.

        Args:
            actors: how many are wanted.
            drain_s: time in which those that leave may deliver what they hold; what the train
                ratio does not admit by then is given up, as when a run ends.

        Raises:
            ValueError: not a number of actors.
            FleetError: the fleet has failed.
        """
        if actors < 1:
            raise ValueError(f"a fleet needs at least 1 actor, got {actors}")
        self.check()
        with self._lock:
            for number in range(len(self._slots), actors):
                self._slots.append(_Slot(number))
                self._launch(self._slots[-1])
            for slot in reversed(self._slots[actors:]):
                if slot.state != "draining":
                    self._dismiss(slot, drain_s)
            del self._slots[actors:]

    def redirect(self, replay_url: str) -> None:
        """Let actors write to these replay servers from now on. Returns at once; see `stats`.

        Args:
            replay_url: addresses of all servers; those that are there already keep their streams,
                apart from what belongs to one that is new.
        """
        with self._lock:
            self._spec = replace(self._spec, replay_url=replay_url)
            self._redirected = True

    def _dismiss(self, slot: _Slot, drain_s: float = _DRAIN_S) -> None:
        slot.state = "draining"
        if slot.handle is not None:
            answer = slot.handle.stop.remote(True, drain_s)
            deadline = time.monotonic() + drain_s + self._limits.answer_timeout_s
            self._leaving.append(_Farewell(slot, answer, deadline))
        log.info("actor_leaves slot=%d life=%d", slot.number, slot.life)

    def _see_off(self) -> None:
        """Remove the actors that have delivered everything, or had their time."""
        now = time.monotonic()
        for farewell in list(self._leaving):
            done, _ = ray.wait([farewell.answer], timeout=0)
            if done:
                self._note_farewell(farewell.slot, farewell.answer)
            if done or now > farewell.deadline:
                self._remove(farewell.slot)
                self._leaving.remove(farewell)
                self._succeed(farewell.slot)

    def _succeed(self, slot: _Slot) -> None:
        """Fill the slot of an actor that has left again, if it is still wanted."""
        if self._keeps(slot):
            slot.steps_before += slot.last.get("env_steps", 0)
            slot.life, slot.moves = slot.life + 1, slot.moves + 1
            self._launch(slot)

    def _keeps(self, slot: _Slot) -> bool:
        return any(one is slot for one in self._slots)

    def _misplaced(self, slot: _Slot, answer: Mapping[str, Any]) -> bool:
        """Whether the streams of an actor belong to another server than the one it writes to."""
        if not self._redirected or not answer.get("server"):
            return False
        return bool(answer["server"] != home_of(replace(self._spec, slot=slot.number)))

    def collect(self, n_steps: int, version: Version, timeout_s: float = 600.0) -> int:
        """Have every actor take `n_steps` in each environment, one actor after the other.

        For runs in lockstep, see `ActorProcess.collect`. Returns the records written.

        Raises:
            FleetError: if an actor is not there or fails; nothing is repeated, because records may
                have been written already.
        """
        written = 0
        for slot in self._slots:
            self.check()
            handle = slot.handle
            if handle is None:
                raise FleetError(f"actor {slot.number} is not there to collect: {slot.trouble}")
            try:
                answer = handle.collect.remote(n_steps, version, timeout_s)
                written += ray.get(answer, timeout=timeout_s + 10.0)
            except (RayError, RuntimeError, TimeoutError) as error:
                raise FleetError(f"actor {slot.number} did not collect: {error}") from error
        return written

    def stop(self, drain_s: float = 10.0) -> list[dict[str, Any]]:
        """Stop all actors and return their last `stats`.

        Blocks for at most about `drain_s` plus a few seconds; what has not been delivered by then
        is given up.
        """
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(self._limits.check_every_s + 30.0)
        with self._lock:
            for farewell in self._leaving:
                self._remove(farewell.slot)
            self._leaving.clear()
            live = {slot.number: slot for slot in self._slots if slot.handle is not None}
            farewells = {
                slot.handle.stop.remote(drain_s > 0, drain_s): slot for slot in live.values()
            }
            if farewells:
                done, _ = ray.wait(
                    list(farewells), num_returns=len(farewells), timeout=drain_s + 2.0
                )
                for answer in done:
                    self._note_farewell(farewells[answer], answer)
            for slot in live.values():
                self._remove(slot)
            for slot in self._slots:
                if slot.number in live or slot.state == "draining":
                    slot.state = "stopped"
        return self.stats()

    def _note_farewell(self, slot: _Slot, answer: Any) -> None:
        try:
            slot.last = ray.get(answer, timeout=1.0)
        except RayError as error:
            log.warning("actor_gone slot=%d error=%s", slot.number, error)

    def _launch(self, slot: _Slot) -> None:
        spec = replace(self._spec, slot=slot.number, life=slot.life)
        kind = Evaluator if spec.split == "eval" else ActorProcess
        slot.handle = (
            ray.remote(kind)
            .options(
                num_cpus=self._limits.cpus_per_actor,
                resources=dict(self._limits.resources_per_actor),
                max_restarts=0,
                max_task_retries=0,
                max_concurrency=_ANSWER_THREADS,
                **(self._roster.options(spec.slot, spec.life) if self._roster else {}),
            )
            .remote(spec, self._source)
        )
        slot.state, slot.question, slot.last = "starting", None, {}
        slot.steps_seen, slot.started_at = 0, time.monotonic()
        log.info("actor_started slot=%d life=%d", slot.number, slot.life)

    def _remove(self, slot: _Slot) -> None:
        if slot.handle is not None:
            ray.kill(slot.handle, no_restart=True)
        slot.handle = slot.question = None

    def _supervise(self) -> None:
        while not self._stopping.is_set():
            begin = time.monotonic()
            try:
                self._round()
            except Exception as error:
                # A thread that ends silently would leave the run without supervision.
                log.exception("fleet_supervision_ended")
                self._fail(f"supervision ended: {error!r}")
                return
            if self._failure:
                return
            self._stopping.wait(max(self._limits.check_every_s - (time.monotonic() - begin), 0.0))

    def _round(self) -> None:
        """Ask every actor how it is and act on the answers."""
        now = time.monotonic()
        with self._lock:
            for slot in self._slots:
                if slot.handle is None and slot.state == "restarting":
                    if now >= slot.start_again_at:
                        self._launch(slot)
                if slot.handle is not None and slot.question is None:
                    slot.question, slot.asked_at = slot.handle.stats.remote(), now
            questions = {
                slot.question: slot
                for slot in self._slots
                if slot.question is not None and slot.state != "draining"
            }
        answered, missing = list[Any](), list[Any]()
        if questions:
            answered, missing = ray.wait(
                list(questions), num_returns=len(questions), timeout=self._limits.check_every_s
            )
        with self._lock:
            for question in answered:
                if questions[question].state != "draining":
                    self._take_answer(questions[question], question)
            for question in missing:
                if questions[question].state != "draining":
                    self._take_silence(questions[question])
            self._see_off()
            self._judge()

    def _take_answer(self, slot: _Slot, question: Any) -> None:
        slot.question = None
        try:
            answer = ray.get(question, timeout=5.0)
        except (RayError, GetTimeoutError) as error:
            self._replace(slot, "died", str(error))
            return
        slot.last = answer
        self._note_progress(slot, answer)
        if answer["phase"] == "failed":
            slot.failed_in = answer["failed_in"]
            self._replace(slot, "failed", answer["error"], answer["trace"])
        elif answer["phase"] != "acting":
            # Whatever an actor waits for before its first step has a deadline there or is visible.
            slot.state = "starting"
        elif answer["blocked"]:
            slot.state = "blocked"
        else:
            slot.state = "acting"
            actor, idle_s = self._spec.actor, time.monotonic() - slot.progress_at
            limit = self._limits.progress_timeout_s + actor.hang_timeout_s + actor.start_timeout_s
            if idle_s > limit and not self._spec.lockstep:
                self._replace(slot, "hung", f"no step for {idle_s:.0f} s")
        if slot.handle is not None and self._misplaced(slot, answer):
            log.info("actor_moves slot=%d from=%s", slot.number, answer["server"])
            self._dismiss(slot)

    def _note_progress(self, slot: _Slot, answer: dict[str, Any]) -> None:
        """Take note of steps, and of good reasons for there being none."""
        steps = answer["env_steps"]
        slot.acted |= steps > 0
        if steps != slot.steps_seen or answer["blocked"] or answer["phase"] != "acting":
            slot.steps_seen, slot.progress_at = steps, time.monotonic()

    def _take_silence(self, slot: _Slot) -> None:
        since = slot.asked_at if slot.last else slot.started_at
        limit = self._limits.answer_timeout_s if slot.last else self._limits.start_timeout_s
        if time.monotonic() - since > limit:
            needs = {"CPU": self._limits.cpus_per_actor, **self._limits.resources_per_actor}
            where = "" if slot.last else f" since it was asked for: is there a node with {needs}?"
            self._replace(slot, "hung", f"no answer for {limit:.0f} s{where}")

    def _replace(self, slot: _Slot, reason: str, trouble: str, trace: str = "") -> None:
        """Remove whoever fills the slot, and plan its successor unless the slot is given up."""
        self._remove(slot)
        slot.trouble, slot.trace = trouble, trace
        slot.steps_before += slot.last.get("env_steps", 0)
        slot.last = {}
        log.warning("actor_lost slot=%d reason=%s trouble=%s", slot.number, reason, trouble)
        now = time.monotonic()
        while slot.restarts and now - slot.restarts[0] > self._limits.restart_window_s:
            slot.restarts.popleft()
        if len(slot.restarts) >= self._limits.most_restarts:
            slot.state = "quarantined"
            log.error("slot_quarantined slot=%d trouble=%s", slot.number, trouble)
            return
        recent = len(slot.restarts)
        slot.start_again_at = now + (
            self._limits.restart_delay_s * 2 ** (recent - 1) if recent else 0.0
        )
        slot.restarts.append(now)
        slot.life += 1
        slot.state = "restarting"
        self._restarts[reason] += 1

    def _judge(self) -> None:
        """Decide whether there is any point in going on."""
        if all(slot.failed_in and not slot.acted for slot in self._slots):
            first = self._slots[0]
            self._fail(
                f"no actor could start to act; actor {first.number} failed in the phase "
                f"{first.failed_in!r}: {first.trouble}"
            )
            return
        given_up = [slot for slot in self._slots if slot.state == "quarantined"]
        if 2 * len(given_up) > len(self._slots):
            self._fail(
                f"{len(given_up)} of {len(self._slots)} actors failed more than "
                f"{self._limits.most_restarts} times in {self._limits.restart_window_s:.0f} s; "
                f"actor {given_up[0].number} last with: "
                f"{given_up[0].trace or given_up[0].trouble}"
            )

    def _fail(self, message: str) -> None:
        self._failure = message
        log.error("fleet_failed %s", message)
        if self._on_failure is not None:
            self._on_failure(message)
