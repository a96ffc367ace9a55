"""One actor process: it builds what acting needs, acts in a thread, and answers questions."""

from __future__ import annotations

import importlib
import logging
import math
import os
import queue
import socket
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import ray
import torch

from actors.config import ActorConfig
from actors.envs import EnvConfig
from actors.loop import ActingLoop, LoopObserver, LoopStopped, derive_seed
from actors.metrics import ActorMetrics
from actors.weights import Refresher, WeightSource
from actors.worker import make_worker
from dreamer.config import AgentConfig
from dreamer.spaces import ActionSpace, ObsSpace
from dreamer.weights import Version, WeightsError
from replay_service import (
    ChunkWriter,
    MetricsEndpoint,
    ReplayClient,
    ReplayClosed,
    ReplayConfig,
    ReplayError,
    ReplayUnavailable,
    Schema,
    Uploader,
    address_for,
    listed,
    shard_of,
    split_addresses,
)

log = logging.getLogger(__name__)

Phase = Literal[
    "metrics", "replay", "environments", "policy", "weights", "acting", "stopped", "failed"
]

_FIRST_WEIGHTS: Version = (-1, 0)
_RETRY_S = 0.5
_LIST_S = 2.0
_POLICY_STREAM = 2**31


@dataclass(frozen=True, kw_only=True)
class ActorSpec:
    """All that an actor process needs to know; plain values that any process can read."""

    run: str
    """Name of the run; the streams are called <run>-a<slot>-e<environment>."""
    shown_as: str = ""
    """What dashboards call the run, if it is another name: that of its directory."""
    slot: int = 0
    """Which actor of the run this is; a replacement has the same slot."""
    life: int = 0
    """How often this slot has been started before."""
    env_id: str
    """What `actors.envs.make_env` takes."""
    envs: int = 1
    """Environments stepped with one policy call."""
    environment: EnvConfig
    """What the environments show and how they are stepped."""
    actor: ActorConfig
    """How actors run and recover."""
    agent: AgentConfig
    """Handed to the policy."""
    obs_space: ObsSpace
    """What the environments emit."""
    action_space: ActionSpace
    """What they take."""
    schema: dict[str, Any]
    """`Schema.to_dict` of the replay's columns."""
    replay: ReplayConfig
    """Chunk size and limits of the writers."""
    replay_url: str
    """Address of the replay server, or of several."""
    seed: int = 0
    """Seed of the run; every environment and policy draws its own from it."""
    policy: str = "dreamer.policy:Policy"
    """module:factory, called as factory(agent, obs_space, action_space, seed=…)."""
    mode: Literal["sample", "explore", "greedy"] = "explore"
    """How actions are chosen."""
    lockstep: bool = False
    """Step only when `collect` asks for it."""
    split: Literal["train", "eval"] = "train"
    """Whether experience goes into replay, or episodes are played for their scores alone."""
    episodes: int = 1
    """Episodes of one round of evaluation."""
    rest_s: float = 0.0
    """Least seconds between the beginnings of two rounds of evaluation."""


def home_of(spec: ActorSpec) -> str:
    """Return the address of the replay server that an actor writes to.

    The streams of an actor share a server: its environments step together, so that one of them that
    had to wait would hold up the others.
    """
    return shard_of(f"{spec.run}-a{spec.slot}", split_addresses(spec.replay_url))


class ActorProcess:
    """An actor; started as a Ray actor by the fleet, and just as usable without Ray.

    Guarantees:
        1. The constructor returns at once; acting, and whatever it needs first, happens in a
           thread. What went wrong there is found in `stats`, and the process stays to be asked.
        2. `ping`, `stats` and `stop` answer whatever the thread is doing.
        3. While inserts have to wait, stepping waits, and `stats` says why and for how long.
        4. Without the learner or the hub it goes on with the weights that it has.

    Args:
        spec: what to do.
        source: where weights come from.
    """

    def __init__(self, spec: ActorSpec, source: WeightSource) -> None:
        torch.set_num_threads(1)
        self._spec, self._source = spec, source
        self._phase: Phase = "metrics"
        self._failed_in = self._error = self._trace = self._server = ""
        self._stale = False
        self._stop, self._drain_s = threading.Event(), 10.0
        self._orders: queue.SimpleQueue[_Order | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._uploader: Uploader | None = None
        self._refresher: Refresher | None = None
        self._loop: ActingLoop | None = None
        self._rates = [Rate() for _ in range(spec.envs)]
        self._metrics = ActorMetrics(
            slot=spec.slot, env=spec.env_id, split=spec.split, read=self._exported
        )
        self._metrics_port = 0
        self._thread = threading.Thread(target=self._run, name="acting", daemon=True)
        self._thread.start()

    def ping(self) -> str:
        """Answer with the phase."""
        return self._phase

    def stats(self) -> dict[str, Any]:
        """Return what the actor has done and is doing, as plain values.

        Steps/s are means over about the last ten seconds of asking. `server` is the replay server
        that it writes to. `blocked` says why stepping waits, and is empty while it does not.
        `error` and `trace` belong to the phase `failed_in`.
        """
        loop, uploader, refresher = self._loop, self._uploader, self._refresher
        steps = list(loop.stats.env_steps) if loop else [0] * self._spec.envs
        now = time.monotonic()
        rates = [rate.at(now, count) for rate, count in zip(self._rates, steps, strict=True)]
        age_s = refresher.age_s if refresher else 0.0
        waited = uploader.waited() if uploader else (0.0, 0.0)
        self._warn_if_stale(age_s)
        return {
            "slot": self._spec.slot,
            "split": self._spec.split,
            "life": self._spec.life,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "metrics_port": self._metrics_port,
            "server": self._server,
            "phase": self._phase,
            "failed_in": self._failed_in,
            "error": self._error,
            "trace": self._trace,
            "env_steps": sum(steps),
            "env_frames": sum(steps) * (loop.action_repeat if loop else 1),
            "env_steps_per_s": sum(rates),
            "steps_of_envs": steps,
            "steps_per_s_of_envs": rates,
            "last_step_age_s": now - loop.stats.last_step_at if loop else 0.0,
            "episodes": sum(loop.stats.ends.values()) if loop else 0,
            "env_restarts": dict(loop.stats.restarts) if loop else {},
            "obs_rejected": dict(loop.stats.rejected) if loop else {},
            "env_late": loop.stats.late if loop else 0,
            "policy_s": loop.stats.policy_s if loop else 0.0,
            "env_s": loop.stats.env_s if loop else 0.0,
            "write_s": loop.stats.write_s if loop else 0.0,
            "blocked": uploader.blocked_reason if uploader else "",
            "blocked_s": waited[0],
            "limited_s": waited[1],
            "pending_chunks": uploader.stats.pending_chunks if uploader else 0,
            "inserted_steps": uploader.stats.steps if uploader else 0,
            "version": list(refresher.version) if refresher else [-1, -1],
            "weights_age_s": age_s,
            "weights_stale": self._stale,
            "weights_rejected": refresher.stats.rejected if refresher else 0,
        }

    def _warn_if_stale(self, age_s: float) -> None:
        limit = self._spec.actor.max_policy_age_s
        if age_s > limit and not self._stale:
            log.warning(
                "weights_stale slot=%d age_s=%.0f limit_s=%.0f", self._spec.slot, age_s, limit
            )
        self._stale = age_s > limit

    def collect(self, n_steps: int, version: Version, timeout_s: float = 600.0) -> int:
        """Take steps with one version of the policy and have them all acknowledged (lockstep).

        Args:
            n_steps: steps to take in every environment.
            version: wait for these weights first.
            timeout_s: deadline of the whole call.

        Returns:
            Records written, all of them in the replay by then.

        Raises:
            TimeoutError: if the weights or the acknowledgements do not come in time.
            RuntimeError: if the actor has failed or was not started in lockstep.
        """
        order = _Order(n_steps, (version[0], version[1]), time.monotonic() + timeout_s)
        with self._lock:
            if not self._spec.lockstep or self._phase in ("failed", "stopped"):
                raise RuntimeError(
                    f"actor {self._spec.slot} cannot collect: lockstep={self._spec.lockstep}, "
                    f"phase={self._phase} {self._error}"
                )
            self._orders.put(order)
        return order.answer.result(timeout_s + 5.0)

    def stop(self, drain: bool = True, timeout_s: float = 10.0) -> dict[str, Any]:
        """Stop acting, deliver what has been written, and return the last `stats`.

        Args:
            drain: False gives up what has not been delivered.
            timeout_s: for all of it. Records that cannot be delivered because inserts have to wait
                are given up as soon as that is known.
        """
        deadline = time.monotonic() + timeout_s
        self._drain_s = timeout_s if drain else 0.0
        self._stop.set()
        self._orders.put(None)
        while self._thread.is_alive() and time.monotonic() < deadline:
            self._thread.join(min(0.5, timeout_s))
            uploader = self._uploader
            if self._thread.is_alive() and uploader and (uploader.blocked_reason or not drain):
                uploader.interrupt()
        return self.stats()

    def _run(self) -> None:
        try:
            with ExitStack() as stack:
                self._build(stack)
                if self._spec.lockstep:
                    self._obey()
                else:
                    self._act()
        except (LoopStopped, ReplayClosed):
            self._end("stopped")
        except Exception as error:
            # Whatever it was: the fleet reads it from `stats` and decides what becomes of the slot.
            self._failed_in, self._error = self._phase, f"{type(error).__name__}: {error}"
            self._trace = traceback.format_exc()
            log.error("actor_failed slot=%d in=%s", self._spec.slot, self._phase, exc_info=True)
            self._end("failed")
        else:
            self._end("stopped")

    def _end(self, phase: Phase) -> None:
        with self._lock:
            self._phase = phase
        while not self._orders.empty():
            order = self._orders.get()
            if order is not None:
                order.answer.set_exception(RuntimeError(f"the actor has {phase}: {self._error}"))

    def _build(self, stack: ExitStack) -> None:
        spec = self._spec
        self._show_metrics(stack)
        self._phase = "replay"
        writers = self._open_streams(stack)
        self._phase = "policy"
        life = writers[0].incarnation
        self._policy = load_factory(spec.policy)(
            spec.agent,
            spec.obs_space,
            spec.action_space,
            seed=derive_seed(spec.seed, spec.slot, _POLICY_STREAM, life),
        )
        workers = [make_worker(spec.env_id, spec.environment, spec.actor) for _ in writers]
        for worker in workers:
            stack.callback(worker.retire)
        self._writers = writers
        self._loop = ActingLoop(
            workers,
            self._policy,
            writers,
            [
                derive_seed(spec.seed, spec.slot, index, writer.incarnation)
                for index, writer in enumerate(writers)
            ],
            obs_space=spec.obs_space,
            action_space=spec.action_space,
            mode=spec.mode,
            most_failures=spec.actor.max_failures,
            late_after_s=spec.actor.late_after_s,
            together=spec.lockstep,
            stop=self._stop,
            observer=self._observer(),
        )
        self._phase = "environments"
        self._loop.start()
        self._phase = "weights"
        self._refresher = Refresher(self._source)
        stack.callback(self._refresher.stop)
        self._load_first_weights()
        self._phase = "acting"

    def _show_metrics(self, stack: ExitStack) -> None:
        """Serve metrics until the actor ends, and have them in the list of the replay service."""
        knobs, spec = self._spec.actor, self._spec
        endpoint = MetricsEndpoint(
            self._metrics.registry,
            host=knobs.metrics_listen,
            token_file=knobs.metrics_token_file,
            flag="--actor.metrics-listen",
        )
        stack.callback(endpoint.close)
        self._metrics_port = endpoint.port
        url = address_for(split_addresses(spec.replay_url)[0], spec.replay, "actor")
        # A connection of its own: the list must not wait for chunks, nor chunks for the list.
        client = ReplayClient(url, timeout_s=_LIST_S)
        stack.callback(client.close)
        stack.enter_context(
            listed(
                client,
                endpoint.port,
                listen=knobs.metrics_listen,
                host=knobs.metrics_host,
                node=_node_address(),
                labels={"run": spec.shown_as or spec.run},
            )
        )

    def _observer(self) -> LoopObserver:
        return self._metrics

    def _open_streams(self, stack: ExitStack) -> list[ChunkWriter]:
        """Connect to the replay server, however long that takes, and open one stream each."""
        spec = self._spec
        schema = Schema.from_dict(spec.schema)
        # Chunks that depend on the clock would make runs in lockstep differ.
        config = replace(spec.replay, flush_age_s=math.inf) if spec.lockstep else spec.replay
        self._server = home_of(spec)
        client = ReplayClient(address_for(self._server, spec.replay, "actor"))
        stack.callback(client.close)
        names = [f"{spec.run}-a{spec.slot}-e{index}" for index in range(spec.envs)]
        while True:
            try:
                found = client.schema()
                if found.hash != schema.hash:
                    raise ReplayError(
                        f"the replay at {client.address} holds other columns than this actor "
                        f"writes: {found.difference(schema)}"
                    )
                incarnations = [client.open_stream(name) for name in names]
                break
            except ReplayUnavailable as error:
                log.warning("replay_away slot=%d error=%s", spec.slot, error)
                if self._stop.wait(_RETRY_S):
                    raise LoopStopped from error
        self._uploader = uploader = Uploader(client, schema, config)
        writers = [
            uploader.open_stream(name, incarnation)
            for name, incarnation in zip(names, incarnations, strict=True)
        ]
        stack.callback(self._deliver, uploader, writers)
        return writers

    def _deliver(self, uploader: Uploader, writers: list[ChunkWriter]) -> None:
        """Flush all writers and wait until everything has arrived, if there is time for it."""
        deadline = time.monotonic() + self._drain_s
        try:
            if self._drain_s > 0:
                for writer in writers:
                    writer.close()
            while not uploader.drain(min(0.5, self._drain_s)):
                if uploader.blocked_reason or time.monotonic() > deadline:
                    log.warning("chunks_given_up count=%d", uploader.stats.pending_chunks)
                    break
        except ReplayError as error:
            log.warning("last_records_given_up slot=%d error=%s", self._spec.slot, error)
        finally:
            uploader.interrupt()
            _close_quietly(uploader)

    def _act(self) -> None:
        refresher, loop = self._refresher, self._loop
        assert refresher is not None and loop is not None
        while not self._stop.is_set():
            refresher.refresh(self._policy)
            loop.step()

    def _load_first_weights(self) -> None:
        refresher = self._refresher
        assert refresher is not None
        while not refresher.refresh(self._policy):
            if refresher.stats.rejected:
                raise WeightsError(refresher.last_error)
            refresher.wait(_FIRST_WEIGHTS, 1.0)
            if self._stop.is_set():
                raise LoopStopped

    def _obey(self) -> None:
        refresher, loop = self._refresher, self._loop
        assert refresher is not None and loop is not None
        while (order := self._orders.get()) is not None and not self._stop.is_set():
            try:
                order.answer.set_result(self._fulfil(order, refresher, loop))
            except Exception as error:
                order.answer.set_exception(error)
                raise

    def _fulfil(self, order: _Order, refresher: Refresher, loop: ActingLoop) -> int:
        if not refresher.wait(order.version, max(order.deadline - time.monotonic(), 0.0)):
            raise TimeoutError(f"weights {order.version} did not come in time")
        refresher.refresh(self._policy)
        before = sum(loop.stats.env_steps)
        for _ in range(order.n_steps):
            loop.step()
        assert self._uploader is not None
        for writer in self._writers:
            writer.flush()
        if not self._uploader.drain(max(order.deadline - time.monotonic(), 0.0)):
            raise TimeoutError(f"chunks were not taken in time: {self._uploader.blocked_reason}")
        return sum(loop.stats.env_steps) - before

    def _exported(self) -> dict[str, Any]:
        """Return the values that `ActorMetrics` asks for."""
        now, wall = time.monotonic(), time.time()
        values: dict[str, Any] = {}
        if self._loop is not None:
            stats = self._loop.stats
            values["env_steps"] = sum(stats.env_steps)
            values["env_frames"] = values["env_steps"] * self._loop.action_repeat
            values["last_step_timestamp_seconds"] = wall - (now - stats.last_step_at)
            values["episodes"] = dict(stats.ends)
            values["env_restarts"] = dict(stats.restarts)
            values["obs_rejected"] = dict(stats.rejected)
        if self._uploader is not None:
            upload = self._uploader.stats
            values["insert_wait_seconds"] = self._uploader.waited()[0]
            values["resend_chunks"] = upload.resent_chunks
            values["pending_chunks"] = upload.pending_chunks
            values["resend_memory_share"] = upload.resend_bytes / self._uploader.config.resend_bytes
            values["insert_replies"] = dict(upload.replies)
            values["blocked"] = float(bool(self._uploader.blocked_reason))
        if self._refresher is not None:
            values["weights_fence"], values["weights_update"] = self._refresher.version
            values["weights_received_timestamp_seconds"] = wall - self._refresher.age_s
            values["weights_apply_seconds"] = self._refresher.stats.apply_s
        return values


@dataclass(frozen=True)
class _Order:
    """One call of `collect` on its way to the acting thread."""

    n_steps: int
    version: Version
    deadline: float
    answer: Future[int] = field(default_factory=Future)


class Rate:
    """Mean speed of a counter over about the last `window_s` seconds."""

    def __init__(self, window_s: float = 10.0) -> None:
        self._window_s = window_s
        self._points: deque[tuple[float, int]] = deque()

    def at(self, now: float, count: int) -> float:
        """Note the count and return how fast it has grown, per second."""
        points = self._points
        if points and now - points[-1][0] < 0.2 and len(points) > 1:
            points.pop()
        points.append((now, count))
        while len(points) > 2 and now - points[1][0] >= self._window_s:
            points.popleft()
        elapsed = now - points[0][0]
        return (count - points[0][1]) / elapsed if elapsed > 0 else 0.0


def load_factory(path: str) -> Callable[..., Any]:
    """Import what a path such as ``package.module:name`` names.

    Raises:
        ValueError: if the path has another form or names nothing.
    """
    module, separator, name = path.partition(":")
    if not separator:
        raise ValueError(f"{path!r} must have the form module:name")
    found = getattr(importlib.import_module(module), name, None)
    if not callable(found):
        raise ValueError(f"{path!r}: {module} has nothing callable called {name!r}")
    return found


def _node_address() -> str:
    """Return the address that this node has in Ray, nothing outside of it."""
    return str(ray.util.get_node_ip_address()) if ray.is_initialized() else ""


def _close_quietly(uploader: Uploader) -> None:
    """End the uploader's thread; what it could not deliver has been reported before."""
    try:
        uploader.close(0.0)
    except ReplayError as error:
        log.debug("uploader_closed error=%s", error)
