"""The acting loop: K environments, one batched policy call per step, whole records into replay."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from actors.worker import Failure, Observation, Ready, Worker
from dreamer.spaces import ActionSpace, ObsSpace, record_column
from dreamer.weights import Version

log = logging.getLogger(__name__)

Arrays = dict[str, NDArray[Any]]

_PATIENCE_S = 0.5
"""Longest wait for an environment before the loop looks whether it should stop."""


class ActingPolicy(Protocol):
    """What the loop needs of a policy; `dreamer.policy.Policy` is one."""

    version: Version

    def step(
        self,
        obs: Arrays,
        is_first: NDArray[np.bool_],
        mode: str,
        held: NDArray[np.bool_] | None = None,
    ) -> tuple[Arrays, Arrays]:
        """Choose actions for K environments; returns actions and latents, both {key: (K, …)}.

        Where `held` (K,) is True nothing is wanted, and the recurrent state must stay as it is.
        """
        ...


class Writer(Protocol):
    """Takes the records of one stream; `replay_service.ChunkWriter` is one."""

    def append(self, record: dict[str, Any], version: Version) -> None:
        """Take one record; may block."""
        ...


class LoopObserver(Protocol):
    """Is told what happens; `actors.metrics.ActorMetrics` is one."""

    def step(self, *, policy_s: float, env_s: float, write_s: float) -> None:
        """One step of all environments is done."""
        ...

    def episode(self, ret: float, length: int) -> None:
        """An episode has ended."""
        ...


class EnvironmentLost(RuntimeError):
    """An environment cannot be kept alive; the message holds its last failure."""


class LoopStopped(Exception):
    """The loop was told to stop while it waited for an environment."""


@dataclass
class LoopStats:
    """Counters of one loop since it started."""

    env_steps: list[int]
    """Records written, per environment."""
    ends: Counter[str] = field(default_factory=Counter)
    """Episodes by how they ended: terminated or truncated."""
    restarts: Counter[str] = field(default_factory=Counter)
    """Environments that were made again, by reason: start, crash, exit or hang."""
    rejected: Counter[str] = field(default_factory=Counter)
    """Answers that broke the environment's contract, by what was wrong with them. Like a restart,
    each one during an episode cut it off as truncated."""
    late: int = 0
    """How often the others went on without an environment that was slow to answer."""
    policy_s: float = 0.0
    """Seconds in the policy."""
    env_s: float = 0.0
    """Seconds spent waiting for environments."""
    write_s: float = 0.0
    """Seconds spent handing over records, waiting for room included."""
    last_step_at: float = field(default_factory=time.monotonic)
    """Monotonic time of the last completed step."""


@dataclass(frozen=True)
class _Request:
    """What an environment was asked for, and what the record that waits for its answer needs."""

    reset: bool
    action: Arrays
    latents: Arrays
    version: Version


@dataclass
class _Place:
    """One environment and what is known about it."""

    worker: Worker
    seed: int
    live: bool = False
    """Whether it has shown an observation that the policy may answer."""
    asked: _Request | None = None
    """The request that it has not answered yet."""
    starts: int = 0
    failures: int = 0
    """Failures since its last good step."""
    ret: float = 0.0
    length: int = 0

    @property
    def ready(self) -> bool:
        """Whether the policy may choose its next action."""
        return self.live and self.asked is None


class ActingLoop:
    """Step K environments with one policy and write what happens.

    Guarantees:
        1. Record t holds what environment i emitted at t and the action chosen after seeing it; a
           record with is_last has a zero action, and the one after it is a reset (is_first, reward
           0).
        2. A record is written only when the answer to its action is known to be good. If the
           environment fails instead (crash, hang, invalid observation), the record becomes the end
           of its episode: is_last without is_terminal, zero action. So no episode is left open
           inside a stream, and nothing invalid is written.
        3. While an environment is made again, the others go on. One that is slow to answer holds
           them up for at most `late_after_s`; from then on it is left out of the steps, with its
           recurrent state kept as it is, until it answers or its worker gives it up.
        4. Every record carries the version of the policy that chose its action.

    Args:
        workers: the environments, not started.
        policy: chooses actions, keeps K recurrent states.
        writers: one per environment.
        seeds: one per environment.
        obs_space, action_space: of every environment.
        mode: "sample", "explore" or "greedy".
        most_failures: failures of one environment without a good step in between, at which it is
            given up.
        late_after_s: seconds for which the others wait for an environment that does not answer.
            Environments in this process answer before they are asked for it, however long it takes.
        together: let no environment go on while another one is late or made again, so that what
            happens does not depend on how long that takes.
        stop: makes the loop leave with LoopStopped where it waits for an environment.
        observer: is told about steps and episodes.
    """

    def __init__(
        self,
        workers: Sequence[Worker],
        policy: ActingPolicy,
        writers: Sequence[Writer],
        seeds: Sequence[int],
        *,
        obs_space: ObsSpace,
        action_space: ActionSpace,
        mode: str = "sample",
        most_failures: int = 10,
        late_after_s: float = math.inf,
        together: bool = False,
        stop: threading.Event | None = None,
        observer: LoopObserver | None = None,
    ) -> None:
        count = len(workers)
        assert len(writers) == len(seeds) == count > 0, (len(writers), len(seeds), count)
        self.stats = LoopStats(env_steps=[0] * count)
        self.action_repeat = 1
        self._places = [_Place(*pair) for pair in zip(workers, seeds, strict=True)]
        self._spaces = (obs_space, action_space)
        self._policy, self._writers, self._mode = policy, writers, mode
        self._most_failures, self._together = most_failures, together
        self._late_after_s = math.inf if together else late_after_s
        self._stop, self._observer = stop or threading.Event(), observer
        self._obs = _zeros(obs_space, count)
        self._zero_action = {key: array[0] for key, array in _zeros(action_space, 1).items()}
        self._reward = np.zeros(count, np.float32)
        self._flags = {
            "is_first": np.ones(count, np.bool_),
            "is_last": np.zeros(count, np.bool_),
            "is_terminal": np.zeros(count, np.bool_),
        }

    def start(self) -> None:
        """Make every environment and begin an episode in it. Blocks until all of them have.

        Raises:
            EnvironmentLost: one of them cannot be made.
            LoopStopped: told to stop.
        """
        for place in self._places:
            self._make(place)
        for index in range(len(self._places)):
            self._await_start(index)

    def step(self) -> None:
        """Take one step in every environment that is ready, and write the records this completes.

        Blocks for the policy, the slowest environment (see `late_after_s`), and while a writer has
        no room.

        Raises:
            EnvironmentLost: an environment fails again and again.
            LoopStopped: told to stop.
            ReplayError: whatever the writers raise.
        """
        begin, written_s = time.monotonic(), self.stats.write_s
        self._catch_up()
        ready = [index for index, place in enumerate(self._places) if place.ready]
        held = np.array([place.asked is not None for place in self._places])
        before = time.monotonic()
        actions, latents = self._policy.step(
            self._obs, self._flags["is_first"], self._mode, held if held.any() else None
        )
        chosen = time.monotonic()
        for index in ready:
            self._ask(index, actions, latents)
        for index in ready:
            if self._flags["is_last"][index]:
                # What a reset answers changes nothing about the record before it.
                self._write(index, self._zero_action)
        for index in ready:
            self._await_answer(index, chosen + self._late_after_s)
        policy_s, write_s = chosen - before, self.stats.write_s - written_s
        self._account(policy_s, write_s, time.monotonic() - begin - policy_s - write_s)

    def _account(self, policy_s: float, write_s: float, env_s: float) -> None:
        self.stats.policy_s += policy_s
        self.stats.env_s += env_s
        self.stats.last_step_at = time.monotonic()
        if self._observer is not None:
            self._observer.step(policy_s=policy_s, env_s=env_s, write_s=write_s)

    def _ask(self, index: int, actions: Arrays, latents: Arrays) -> None:
        """Ask one environment for a step, or for a reset where its episode is over."""
        place, over = self._places[index], bool(self._flags["is_last"][index])
        place.asked = _Request(
            reset=over,
            action={key: array[index] for key, array in actions.items()},
            latents={key: array[index] for key, array in latents.items()},
            version=self._policy.version,
        )
        if over:
            place.worker.reset(None)
        else:
            place.worker.step(place.asked.action)

    def _await_answer(self, index: int, deadline: float) -> None:
        """Take one environment's answer, unless it is late."""
        while not self._take_answer(index, min(_PATIENCE_S, max(deadline - time.monotonic(), 0.0))):
            if time.monotonic() >= deadline:
                self.stats.late += 1
                return

    def _take_answer(self, index: int, timeout_s: float) -> bool:
        """Write the record that waited for an environment's answer, if that has come."""
        place = self._places[index]
        outcome = place.worker.receive(timeout_s)
        if outcome is None:
            self._heed_stop()
            return False
        asked = place.asked
        assert asked is not None
        if isinstance(outcome, Observation):
            if not asked.reset:
                self._write(index, asked.action)
                place.failures = 0
            self._take(index, outcome, first=asked.reset)
            return True
        assert isinstance(outcome, Failure), outcome
        if not asked.reset:
            self._flags["is_last"][index] = True
            self._write(index, self._zero_action)
        self._recover(index, outcome)
        return True

    def _heed_stop(self) -> None:
        if self._stop.is_set():
            raise LoopStopped

    def _catch_up(self) -> None:
        """Take what late or restarting environments have to say; wait if none is ready."""
        if all(place.ready for place in self._places):
            return
        if self._together:
            for index in range(len(self._places)):
                self._await_start(index)
        while True:
            any_ready = any(place.ready for place in self._places)
            timeout_s = 0.0 if any_ready else _PATIENCE_S / len(self._places)
            for index, place in enumerate(self._places):
                if place.live and place.asked is not None:
                    self._take_answer(index, timeout_s)
                elif not place.live:
                    self._proceed(index, timeout_s)
            if any_ready:
                return

    def _await_start(self, index: int) -> None:
        while not self._places[index].live:
            self._proceed(index, _PATIENCE_S)

    def _proceed(self, index: int, timeout_s: float) -> None:
        """Take the next answer on an environment's way to its first observation, if it is there."""
        self._heed_stop()
        place = self._places[index]
        outcome = place.worker.receive(timeout_s)
        if isinstance(outcome, Ready):
            self._require_spaces(outcome)
            place.worker.reset(derive_seed(place.seed, place.starts))
        elif isinstance(outcome, Observation):
            self._take(index, outcome, first=True)
        elif isinstance(outcome, Failure):
            self._recover(index, outcome)

    def _recover(self, index: int, failure: Failure) -> None:
        """Count a failure and begin to replace what failed."""
        place = self._places[index]
        place.live, place.asked, place.failures = False, None, place.failures + 1
        # The policy steps all K states; this one starts over until there is something to see.
        self._flags["is_first"][index] = True
        rejected, reason = failure.reason == "rejected", failure.label
        (self.stats.rejected if rejected else self.stats.restarts)[reason] += 1
        last_line = failure.message.strip().rpartition("\n")[2]
        log.warning("env_failed index=%d reason=%s error=%s", index, reason, last_line)
        if failure.fatal or place.failures >= self._most_failures:
            raise EnvironmentLost(
                f"environment {index} failed {place.failures} times in a row, the last time with "
                f"{reason}: {failure.message}"
                if place.failures > 1
                else failure.message
            )
        if rejected:
            place.worker.reset(None)
        else:
            self._make(place)

    def _make(self, place: _Place) -> None:
        place.starts += 1
        place.worker.start()

    def _require_spaces(self, ready: Ready) -> None:
        self.action_repeat = ready.action_repeat
        if (ready.obs_space, ready.action_space) != self._spaces:
            raise EnvironmentLost(
                f"the environment has observations {ready.obs_space} and actions "
                f"{ready.action_space} here, but the run was started for {self._spaces[0]} and "
                f"{self._spaces[1]}: install the same versions of it everywhere"
            )

    def _take(self, index: int, seen: Observation, *, first: bool) -> None:
        self._places[index].live, self._places[index].asked = True, None
        for key, array in self._obs.items():
            array[index] = seen.obs[key]
        self._reward[index] = 0.0 if first else seen.reward
        self._flags["is_first"][index] = first
        self._flags["is_terminal"][index] = seen.terminated and not first
        self._flags["is_last"][index] = (seen.terminated or seen.truncated) and not first

    def _write(self, index: int, action: Arrays) -> None:
        begin, asked = time.monotonic(), self._places[index].asked
        assert asked is not None
        record: dict[str, Any] = {key: array[index] for key, array in self._obs.items()}
        record["reward"] = self._reward[index]
        for name, flags in self._flags.items():
            record[name] = flags[index]
        self._writers[index].append(record | action | asked.latents, asked.version)
        self.stats.write_s += time.monotonic() - begin
        self.stats.env_steps[index] += 1
        self._track_episode(index)

    def _track_episode(self, index: int) -> None:
        place = self._places[index]
        if self._flags["is_first"][index]:
            place.ret, place.length = 0.0, 0
        else:
            place.ret += float(self._reward[index])
            place.length += 1
        if self._flags["is_last"][index]:
            ended = "terminated" if self._flags["is_terminal"][index] else "truncated"
            self.stats.ends[ended] += 1
            if self._observer is not None:
                self._observer.episode(place.ret, place.length)


def derive_seed(*parts: int) -> int:
    """Return a seed of 31 bits that depends on all parts, such as run, slot and environment."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0] >> 1)


def _zeros(space: ObsSpace | ActionSpace, count: int) -> Arrays:
    columns = {key: record_column(spec) for key, spec in space.items()}
    return {key: np.zeros((count, *shape), dtype) for key, (dtype, shape) in columns.items()}
