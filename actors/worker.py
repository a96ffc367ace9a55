"""An environment that may crash or hang without harming whoever steps it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from actors.config import ActorConfig
from actors.envs import EnvConfig, EnvError, make_env
from actors.envs.base import Env
from actors.spaces import Arrays, BadOutput
from actors.wire import (
    CLOSE,
    FAILURE,
    HELLO,
    RESET,
    STEP,
    TRANSITION,
    Channel,
    ChannelClosed,
    Layout,
    action_layout,
    transition_layout,
)
from dreamer.spaces import ActionSpace, ObsSpace, space_from_dict

log = logging.getLogger(__name__)

FRAME_S = 5.0
"""Time for the rest of a message that has begun to arrive."""
_LOOK_S = 0.5
"""Between two looks at the deadline while an answer is awaited."""
_MESSAGE_CHARS = 4000


@dataclass(frozen=True)
class Ready:
    """The environment has been made."""

    obs_space: ObsSpace
    action_space: ActionSpace
    action_repeat: int


class Observation(NamedTuple):
    """What a reset or a step answered; all values have been checked."""

    obs: Arrays
    reward: float
    terminated: bool
    truncated: bool
    seconds: float


@dataclass(frozen=True)
class Failure:
    """Why there is no answer.

    ``start``, ``crash`` and ``hang`` leave no environment behind; after ``rejected`` it is still
    there and can be reset. ``label`` is finer than the reason: ``exit`` for a crash without an
    exception, and for ``rejected`` what was wrong. ``fatal``: trying again cannot help.
    """

    reason: Literal["start", "crash", "hang", "rejected"]
    label: str
    message: str
    fatal: bool = False


Outcome = Ready | Observation | Failure


class Worker(Protocol):
    """One environment and at most one request under way."""

    @property
    def busy(self) -> bool:
        """Whether an answer is awaited."""

    def start(self) -> None:
        """Make the environment; answered by `Ready`. Does not wait."""

    def reset(self, seed: int | None) -> None:
        """Begin an episode; answered by an `Observation`. Does not wait."""

    def step(self, actions: Arrays) -> None:
        """Take a step; answered by an `Observation`. Does not wait."""

    def receive(self, timeout_s: float) -> Outcome | None:
        """Return the answer, or None if it has not come within the timeout."""

    def close(self) -> object:
        """Give the environment up, whatever it is doing."""

    def retire(self) -> None:
        """Let the environment close itself if it is idle, then give it up."""


class ProcessWorker:
    """An environment in a process of its own.

    Guarantees:
        1. Whatever the environment does (exception, exit, segmentation fault, endless loop), the
           answer is a `Failure` after at most the timeout, and its whole process group is gone.
        2. Its process ends with the thread that called `start`, however that ends.
        3. Only checked values of fixed types come back.

    Args:
        env_id, config: what to make, see `make_env`.
        hang_timeout_s: longest time for a reset or a step.
        start_timeout_s: longest time for making it.
    """

    def __init__(
        self, env_id: str, config: EnvConfig, *, hang_timeout_s: float, start_timeout_s: float
    ) -> None:
        self._order = json.dumps({"env_id": env_id, "config": asdict(config)}).encode()
        self._hang_timeout_s, self._start_timeout_s = hang_timeout_s, start_timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: Channel | None = None
        self._answer: Layout | None = None
        self._actions: Layout | None = None
        self._deadline = 0.0
        self._doing = ""
        self._broken = False

    @property
    def busy(self) -> bool:
        """Whether an answer is awaited."""
        return bool(self._doing)

    @property
    def process_id(self) -> int | None:
        """Process id, or None while there is no process."""
        return self._process.pid if self._process is not None else None

    def start(self) -> None:
        """Start the process; answered by `Ready`."""
        self.close()
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "actors.child", str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
                env=_environment(),
            )
        self._channel = Channel(ours)
        self._request("start", HELLO, self._order, self._start_timeout_s)

    def reset(self, seed: int | None) -> None:
        """Begin an episode; answered by an `Observation`."""
        payload = struct.pack("<q", -1 if seed is None else seed)
        self._request("reset", RESET, payload, self._hang_timeout_s)

    def step(self, actions: Arrays) -> None:
        """Take a step; answered by an `Observation`."""
        assert self._actions is not None, "the environment has not been made"
        self._request("step", STEP, self._actions.pack(actions), self._hang_timeout_s)

    def receive(self, timeout_s: float) -> Outcome | None:
        """Return the answer, or None if it has not begun within the timeout."""
        assert self._doing and self._channel is not None, "nothing was asked"
        try:
            message = None if self._broken else self._channel.receive(timeout_s, FRAME_S)
        except ChannelClosed:
            return self._gone()
        except TimeoutError:
            return self._hung()
        if self._broken:
            return self._gone()
        if message is None:
            return self._hung() if time.monotonic() > self._deadline else None
        return self._understand(*message)

    def close(self) -> int:
        """End the process and everything it has started; return its exit code."""
        self._doing, self._broken, code = "", False, 0
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            code = self._process.wait()
            self._process = None
        return code

    def retire(self, timeout_s: float = 1.0) -> None:
        """Let an idle environment close itself, then end the process."""
        if self._channel is not None and self._process is not None and not self._doing:
            with contextlib.suppress(ChannelClosed, TimeoutError):
                self._channel.send(CLOSE, timeout_s=timeout_s)
                self._ends_within(timeout_s)
        self.close()

    def _request(self, doing: str, kind: int, payload: bytes, timeout_s: float) -> None:
        assert self._channel is not None and not self._doing, self._doing
        self._doing, self._deadline = doing, time.monotonic() + timeout_s
        try:
            self._channel.send(kind, payload, FRAME_S)
        except (ChannelClosed, TimeoutError):
            # Asking has failed; whoever waits for the answer learns why.
            self._broken = True

    def _understand(self, kind: int, payload: bytes) -> Outcome:
        if kind == FAILURE:
            failure = Failure(**json.loads(payload))
            if failure.reason == "rejected":
                self._doing = ""
            else:
                self.close()
            return failure
        self._doing = ""
        if kind == HELLO:
            hello = json.loads(payload)
            obs_space = space_from_dict(hello["obs_space"])
            action_space = space_from_dict(hello["action_space"])
            self._answer = transition_layout(obs_space)
            self._actions = action_layout(action_space)
            return Ready(obs_space, action_space, hello["action_repeat"])
        assert kind == TRANSITION and self._answer is not None, kind
        values = self._answer.views(payload)
        return Observation(
            obs={key[4:]: value for key, value in values.items() if key.startswith("obs.")},
            reward=float(values["reward"]),
            terminated=bool(values["terminated"]),
            truncated=bool(values["truncated"]),
            seconds=float(values["seconds"]),
        )

    def _gone(self) -> Failure:
        assert self._process is not None
        doing = self._doing
        if not self._ends_within(FRAME_S):
            return self._hung()
        code = self.close()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
        message = f"the environment's process {how} during {doing}"
        return Failure("start" if doing == "start" else "crash", "exit", message)

    def _ends_within(self, timeout_s: float) -> bool:
        """Block until the process has ended; it stays a zombie, so that its group keeps its id."""
        assert self._process is not None
        handle = os.pidfd_open(self._process.pid)
        try:
            poller = select.poll()
            poller.register(handle, select.POLLIN)
            return bool(poller.poll(timeout_s * 1e3))
        finally:
            os.close(handle)

    def _hung(self) -> Failure:
        doing = self._doing
        limit = self._start_timeout_s if doing == "start" else self._hang_timeout_s
        self.close()
        return Failure("hang", "hang", f"no answer to {doing} within {limit:g} s: killed")


class InlineWorker:
    """An environment in this process: faster, but what crashes or hangs it takes all with it."""

    def __init__(self, env_id: str, config: EnvConfig) -> None:
        self._env_id, self._config = env_id, config
        self._env: Env | None = None
        self._outcome: Outcome | None = None

    @property
    def busy(self) -> bool:
        """Whether an answer waits to be taken."""
        return self._outcome is not None

    def start(self) -> None:
        """Make the environment now."""
        self.close()
        try:
            env = make_env(self._env_id, self._config)
        except ValueError as error:
            self._outcome = Failure("start", "start", str(error), fatal=True)
        except Exception:
            # What an environment raises cannot be known; it is reported, not swallowed.
            self._outcome = Failure("start", "start", _last_lines())
        else:
            self._env = env
            self._outcome = Ready(env.obs_space, env.action_space, env.action_repeat)

    def reset(self, seed: int | None) -> None:
        """Begin an episode now."""
        assert self._env is not None
        env = self._env
        self._run(lambda: (env.reset(seed), 0.0, False, False))

    def step(self, actions: Arrays) -> None:
        """Take a step now."""
        assert self._env is not None
        env = self._env
        self._run(lambda: env.step(actions))

    def receive(self, timeout_s: float) -> Outcome | None:
        """Return the answer."""
        outcome, self._outcome = self._outcome, None
        return outcome

    def close(self) -> None:
        """Close the environment."""
        env, self._env, self._outcome = self._env, None, None
        if env is not None:
            try:
                env.close()
            except Exception:
                # A crashed environment often cannot close either, and must not stop its successor.
                log.warning("env_close_failed env=%s error=%s", self._env_id, _last_lines())

    def retire(self) -> None:
        """Close the environment."""
        self.close()

    def _run(self, act: Callable[[], tuple[Any, float, bool, bool]]) -> None:
        begin = time.perf_counter()
        try:
            obs, reward, terminated, truncated = act()
        except BadOutput as error:
            self._outcome = Failure("rejected", error.reason, str(error))
        except Exception:
            # As above: any exception of the environment is an answer to whoever steps it.
            text = _last_lines()
            self.close()
            self._outcome = Failure("crash", "crash", text)
        else:
            seconds = time.perf_counter() - begin
            self._outcome = Observation(obs, reward, terminated, truncated, seconds)


class EnvFailure(Exception):
    """An environment has not answered with a valid observation.

    Args:
        reason: ``crash``, ``hang``, ``start`` or ``rejected``.
        message: what happened.
        label: finer than the reason: ``exit`` for a crash without an exception, and for
            ``rejected`` what was wrong, see `actors.spaces.BadOutput`.
    """

    def __init__(self, reason: str, message: str, label: str = "") -> None:
        super().__init__(message)
        self.reason = reason
        self.label = label or reason


class EnvSlot:
    """An environment in its place: whenever it is lost, another one is made there.

    Guarantees:
        1. `receive` answers, or raises `EnvFailure`, after at most the configured timeouts (in
           process isolation), whatever the environment does.
        2. After an `EnvFailure` the next request must be a reset. It goes to the same environment
           if only its answer was rejected, else to a new one, which has then been started already.
        3. Every environment made here gets a seed of its own, a function of the slot's seed and of
           how many were made before.

    Entering starts making the environment without waiting, so that several can start side by side.

    Args:
        env_id, environment: what to make, see `actors.envs.make_env`.
        actor: isolation and timeouts.
        seed: of everything random in it.
    """

    obs_space: ObsSpace
    action_space: ActionSpace
    action_repeat: int

    def __init__(
        self, env_id: str, environment: EnvConfig, actor: ActorConfig, seed: int = 0
    ) -> None:
        self._env_id = env_id
        self._worker: Worker = make_worker(env_id, environment, actor)
        self._seeds = np.random.default_rng(seed)
        self._reset_wanted = False
        self._started = False

    def __enter__(self) -> EnvSlot:
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self._started = False
        self._worker.retire()

    def open(self) -> None:
        """Block until the environment has been made and its spaces are known.

        Raises:
            EnvError: it cannot be made, and trying again would not help.
            EnvFailure: it crashed or hung.
        """
        if not self._started:
            self._start()
        outcome = self._wait()
        if isinstance(outcome, Failure):
            if outcome.fatal:
                raise EnvError(outcome.message)
            raise EnvFailure(outcome.reason, f"{self._env_id}: {outcome.message}", outcome.label)
        assert isinstance(outcome, Ready), outcome
        self.obs_space, self.action_space = outcome.obs_space, outcome.action_space
        self.action_repeat = outcome.action_repeat

    def send(self, actions: Arrays | None) -> None:
        """Ask for one step, or with None for a reset. Does not wait for the answer."""
        if actions is not None:
            self._worker.step(actions)
        elif self._worker.busy:
            self._reset_wanted = True
        else:
            self._reset()

    def receive(self) -> Observation:
        """Block for the answer.

        Raises:
            EnvFailure: there is none; see the guarantees.
        """
        while True:
            outcome = self._wait()
            if isinstance(outcome, Observation):
                return outcome
            if isinstance(outcome, Failure):
                if outcome.reason != "rejected":
                    self._start()
                raise EnvFailure(outcome.reason, outcome.message, outcome.label)
            self._require_same(outcome)
            assert self._reset_wanted, "a new environment must be reset first"
            self._reset()

    def _start(self) -> None:
        self._started, self._reset_wanted = True, False
        # Its first reset gets a seed, later ones let the random numbers run on.
        self._seed: int | None = int(self._seeds.integers(2**31))
        self._worker.start()

    def _reset(self) -> None:
        self._reset_wanted = False
        self._worker.reset(self._seed)
        self._seed = None

    def _wait(self) -> Outcome:
        while (outcome := self._worker.receive(_LOOK_S)) is None:
            continue
        return outcome

    def _require_same(self, ready: Ready) -> None:
        if (ready.obs_space, ready.action_space) != (self.obs_space, self.action_space):
            raise EnvError(
                f"{self._env_id} came back with other spaces than before: {ready.obs_space} and "
                f"{ready.action_space} instead of {self.obs_space} and {self.action_space}"
            )


def make_worker(env_id: str, environment: EnvConfig, actor: ActorConfig) -> Worker:
    """Return a worker of the configured isolation; nothing is started yet."""
    if actor.isolation == "inline":
        return InlineWorker(env_id, environment)
    return ProcessWorker(
        env_id,
        environment,
        hang_timeout_s=actor.hang_timeout_s,
        start_timeout_s=actor.start_timeout_s,
    )


def _environment() -> dict[str, str]:
    """Return the environment of the child: the same modules, and one thread for each library."""
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}


def _last_lines() -> str:
    return traceback.format_exc()[-_MESSAGE_CHARS:]
