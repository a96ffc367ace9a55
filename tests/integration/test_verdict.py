"""Runs that are made slow in one way each, and what the verdict says of them."""

from __future__ import annotations

import dataclasses
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

from actors.actor import ActorProcess, ActorSpec
from actors.config import ActorConfig
from actors.envs import EnvConfig, env_spaces
from dreamer.agent import make_agent, record_columns
from dreamer.policy import Policy
from dreamer.presets import agent_config
from dreamer.weights import PackedWeights, Version
from learner.config import LearnerConfig
from learner.learner import Learner, RunFacts
from learner.pace import FreePace
from learner.publish import Publisher
from learner.record import Recorder
from learner.step import UpdateStep
from learner.verdict import CAUSES
from replay_service import (
    Column,
    EmbeddedServer,
    Mirror,
    ReplayClient,
    ReplayConfig,
    Schema,
    plan_limits,
)

pytestmark = [pytest.mark.integration, pytest.mark.slow]

AGENT = agent_config("v3", "debug")
LEARNER = LearnerConfig(batch_size=2, batch_length=8, publish_every_s=0.5, log_every_s=0.2)
REPLAY = ReplayConfig(
    capacity_steps=4000,
    chunk_steps=8,
    min_size_steps=64,
    pending_chunks=1,
    redis_memory_bytes=2**27,
)
LOOK_S, JUDGED_S, START_S = 0.1, 3.0, 60.0


class Quick(gymnasium.Env):
    """Answers at once; episodes have twenty steps."""

    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)
    nap_s, count = 0.0, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode."""
        self.count = 0
        return np.zeros(2, np.float32), {}

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Take a step, and the time that it takes."""
        time.sleep(self.nap_s)
        self.count += 1
        return np.zeros(2, np.float32), 1.0, self.count >= 20, False, {}


class Sleepy(Quick):
    """Takes 30 ms for a step."""

    nap_s = 0.03


class SlowPolicy(Policy):
    """Takes 30 ms longer for a call."""

    def step(self, *args: Any, **options: Any) -> Any:
        """Choose actions, later."""
        time.sleep(0.03)
        return super().step(*args, **options)


class SlowMirror(Mirror):
    """Takes a fifth of a second to absorb what has arrived."""

    def absorb(self) -> Any:
        """Absorb, later."""
        time.sleep(0.2)
        return super().absorb()


class SlowStep(UpdateStep):
    """Takes a fifth of a second longer for an update."""

    def __call__(self, *args: Any) -> None:
        """Update, later."""
        time.sleep(0.2)
        super().__call__(*args)


class SlowLink:
    """Forwards a unix socket and holds back everything that passes for a while."""

    def __init__(self, stack: ExitStack, directory: Path, url: str, delay_s: float) -> None:
        self.url = f"unix://{directory / 'slow.sock'}"
        self._target, self._delay_s = url.removeprefix("unix://"), delay_s
        self._closed = threading.Event()
        self._listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        self._listener.bind(self.url.removeprefix("unix://"))
        self._listener.listen()
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()
        stack.callback(self._close)

    def _close(self) -> None:
        self._closed.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(5.0)

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.socket(socket.AF_UNIX)
            far.connect(self._target)
            for source, sink in ((near, far), (far, near)):
                thread = threading.Thread(target=self._pump, args=(source, sink), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with sink:
            try:
                while data := source.recv(65536):
                    self._closed.wait(self._delay_s)
                    sink.sendall(data)
                sink.shutdown(socket.SHUT_RDWR)
            except OSError:
                return


class Shelf:
    """Weights that a publisher has put here, for actors of this process."""

    def __init__(self) -> None:
        self._weights: PackedWeights | None = None
        self._changed = threading.Condition()

    def send(self, weights: PackedWeights) -> bool:
        """Take weights, as a hub does."""
        with self._changed:
            self._weights = weights
            self._changed.notify_all()
        return True

    def fetch(self, newer_than: Version, timeout_s: float) -> PackedWeights | None:
        """Wait for newer weights, as a hub lets one wait, but never for long."""
        with self._changed:
            self._changed.wait_for(lambda: self._newer(newer_than), min(timeout_s, 0.2))
            return self._weights if self._newer(newer_than) else None

    def _newer(self, version: Version) -> bool:
        return self._weights is not None and self._weights.version > version


@dataclasses.dataclass(kw_only=True)
class Slow:
    """Where a run is slow."""

    env: str = "Quick"
    policy: str = "dreamer.policy:Policy"
    mirror: type[Mirror] = Mirror
    ratio: float = 1.0
    tolerance: int | None = None
    step: type[UpdateStep] = UpdateStep
    publish_s: float = 0.0
    actor_link_s: float = 0.0
    mirror_link_s: float = 0.0


def delayed(function: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    """Return a function that does the same, later."""

    def later(*args: Any) -> Any:
        time.sleep(seconds)
        return function(*args)

    return later


@contextmanager
def running(slow: Slow, directory: Path) -> Iterator[tuple[Learner, ActorProcess]]:
    """Start a learner and an actor on a server of their own, all in this process."""
    env_id = f"{__name__}:{slow.env}"
    obs_space, action_space, _ = env_spaces(env_id, EnvConfig())
    schema = Schema(tuple(Column(*c) for c in record_columns(AGENT, obs_space, action_space)))
    replay = dataclasses.replace(REPLAY, tolerance_steps=slow.tolerance)
    window = LEARNER.batch_length + AGENT.context
    limits, limiter = plan_limits(
        replay,
        schema,
        train_ratio=slow.ratio,
        batch_size=LEARNER.batch_size,
        batch_length=LEARNER.batch_length,
        window_steps=window,
        streams=1,
    )
    with ExitStack() as stack:
        server = stack.enter_context(EmbeddedServer(directory / "r", max_memory_bytes=2**28))
        urls = []
        for number, delay_s in enumerate((slow.actor_link_s, slow.mirror_link_s)):
            (directory / str(number)).mkdir()
            link = (stack, directory / str(number), server.url, delay_s)
            urls.append(SlowLink(*link).url if delay_s else server.url)
        client, tail = ReplayClient(server.url), ReplayClient(urls[1])
        for made in (client, tail):
            stack.callback(made.close)
        client.create(schema, limits)
        mirror = slow.mirror(tail, schema, capacity_steps=4000, window_steps=window)
        mirror.start()
        stack.callback(mirror.stop)
        torch.manual_seed(0)
        agent, shelf = make_agent(AGENT, obs_space, action_space), Shelf()
        if slow.publish_s:
            agent.policy_tensors = delayed(agent.policy_tensors, slow.publish_s)  # type: ignore[method-assign]
        fence, recorder = client.acquire_fence(), Recorder(directory)
        stack.callback(recorder.close)
        publisher = Publisher(agent, shelf.send, fence=fence, config_hash="", dtype=torch.float32)
        every = 1 if slow.publish_s else LEARNER.publish_every_updates
        learner = Learner(
            dataclasses.replace(LEARNER, publish_every_updates=every),
            RunFacts(directory=directory, seed=1, target_steps=10**9, config_hash=""),
            agent=agent,
            step=slow.step(agent, mirror, batch_size=2, batch_length=8),
            mirror=mirror,
            client=client,
            limiter=limiter,
            pace=FreePace(mirror, limiter),
            publisher=publisher,
            recorder=recorder,
            fence=fence,
        )
        actor = ActorProcess(
            ActorSpec(
                run="slow",
                env_id=env_id,
                environment=EnvConfig(),
                actor=ActorConfig(isolation="inline"),
                agent=AGENT,
                obs_space=obs_space,
                action_space=action_space,
                schema=schema.to_dict(),
                replay=replay,
                replay_url=urls[0],
                policy=slow.policy,
            ),
            shelf,
        )
        stack.callback(actor.stop, drain=False)
        yield learner, actor


@pytest.mark.parametrize(
    "cause, slow",
    [
        ("environments", Slow(env="Sleepy")),
        ("policy", Slow(policy=f"{__name__}:SlowPolicy")),
        ("replay", Slow(actor_link_s=0.15)),
        ("limiter", Slow(mirror_link_s=0.15, tolerance=12)),
        ("data_wait", Slow(mirror=SlowMirror, ratio=16)),
        ("learner", Slow(step=SlowStep, ratio=4)),
        ("publish", Slow(publish_s=0.2, ratio=16)),
    ],
)
def test_verdict_names_what_was_made_slow(cause: str, slow: Slow, tmp_path: Path) -> None:
    with running(slow, tmp_path) as (learner, actor):
        recorder = learner.recorder
        thread = threading.Thread(target=learner.run)
        thread.start()
        try:
            deadline, begun = time.monotonic() + START_S, 0.0
            while not begun or time.monotonic() - begun < JUDGED_S:
                assert time.monotonic() < deadline and thread.is_alive(), actor.stats()
                recorder.note_actors([actor.stats()])
                begun = begun or (time.monotonic() if learner.updates else 0.0)
                learner.stop.wait(LOOK_S)
            found = recorder.whole()
        finally:
            learner.stop.set()
            thread.join(30.0)
        assert found.cause == cause, (
            found,
            recorder.actor_times.overall(),
            recorder.clock.totals(),
        )
        assert found.share > 0.3 and found.advice
        assert bool(found.actors_wanted) == (cause in ("environments", "policy"))
        # Once it is over, the snapshot is about the whole run.
        ended = learner.snapshot()
        assert ended.phase == "stopped" and ended.bound_by.startswith(CAUSES[cause])
        registry = recorder.exporter.registry
        shares = {
            name: registry.get_sample_value("dreamer_bound_share", {"cause": name})
            for name in CAUSES
        }
        assert sum(share or 0.0 for share in shares.values()) == pytest.approx(1.0)
