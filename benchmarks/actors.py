"""Actors: environment steps/s bare, with the policy, and as a whole actor that writes to replay."""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from actors.actor import ActorProcess, ActorSpec
from actors.config import ActorConfig
from actors.envs import EnvConfig, env_spaces
from actors.worker import Failure, Observation, Worker, make_worker
from dreamer.agent import make_agent
from dreamer.config import AgentConfig
from dreamer.policy import Policy, record_columns
from dreamer.presets import agent_config, sized
from dreamer.spaces import ActionSpace, ObsSpace, record_column
from dreamer.weights import PackedWeights, Version, pack
from replay_service import Column, EmbeddedServer, Limits, ReplayClient, ReplayConfig, Schema


@dataclass(frozen=True, kw_only=True)
class Case:
    """One environment as an actor would step it."""

    name: str
    env_id: str
    size: str
    envs: int
    isolation: str
    environment: EnvConfig = EnvConfig()


CASES = (
    Case(name="cheap", env_id="CartPole-v1", size="1m", envs=4, isolation="inline"),
    Case(name="cheap, isolated", env_id="CartPole-v1", size="1m", envs=4, isolation="process"),
    Case(
        name="expensive",
        env_id="dmc:walker-walk",
        size="12m",
        envs=2,
        isolation="process",
        environment=EnvConfig(obs="image", action_repeat=2),
    ),
)


def run(*, quick: bool = False) -> dict[str, Any]:
    """Measure every case; blocks for about two minutes, or a few seconds if quick.

    `bare` steps the environments with a fixed action, `policy` chooses every action with the
    policy, `actor` is a whole actor in this process: policy, environments, chunks, uploads to a
    server, weight refresh and metrics. The three take turns, so that whatever else the machine
    does meets all of them, and medians over the rounds are compared.

    Args:
        quick: one short case.

    Returns:
        {"cases": [{name, env, size, envs, isolation, bare, policy, actor, share}]}; the rates in
        steps/s over all environments, `share` = actor / policy.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds, rounds = (0.3, 1) if quick else (2.5, 5)
    try:
        cases = CASES[:1] if quick else CASES
        return {"cases": [measure(case, seconds, rounds) for case in cases]}
    finally:
        torch.set_num_threads(before)


def table(result: dict[str, Any]) -> Table:
    """Return the numbers of `run` as a table."""
    shown = Table(title="actors: environment steps/s")
    for name in ("case", "environment", "size", "envs", "bare", "with policy", "actor", "share"):
        shown.add_column(name, justify="left" if name in ("case", "environment") else "right")
    for case in result["cases"]:
        rates = (f"{case[key]:,.0f}" for key in ("bare", "policy", "actor"))
        words = (case["name"], case["env"], case["size"], str(case["envs"]))
        shown.add_row(*words, *rates, f"{case['share']:.0%}")
    return shown


def measure(case: Case, seconds: float, rounds: int) -> dict[str, Any]:
    """Measure one case in turns and return the medians."""
    obs_space, action_space, _ = env_spaces(case.env_id, case.environment)
    agent = sized(agent_config("v3", case.size), case.size)
    with ExitStack() as stack:
        actor = _Actor(stack, case, agent, obs_space, action_space)
        bench = stepper(stack, case, obs_space, action_space)
        measured: dict[str, list[float]] = {"bare": [], "policy": [], "actor": []}
        takes: dict[str, Callable[[float], float]] = {
            "bare": bench.bare,
            "policy": bench.with_policy,
            "actor": actor.rate,
        }
        for _ in range(rounds):
            for name, take in takes.items():
                measured[name].append(take(seconds))
    rates = {name: statistics.median(values) for name, values in measured.items()}
    return {
        "name": case.name,
        "env": case.env_id,
        "size": case.size,
        "envs": case.envs,
        "isolation": case.isolation,
        **rates,
        "share": rates["actor"] / rates["policy"],
    }


def stepper(
    stack: ExitStack, case: Case, obs_space: ObsSpace, action_space: ActionSpace
) -> Stepper:
    """Start the environments of a case, to be stepped without an actor until the stack closes."""
    agent = sized(agent_config("v3", case.size), case.size)
    workers = [_started(stack, case, seed) for seed in range(case.envs)]
    return Stepper(workers, Policy(agent, obs_space, action_space), obs_space, action_space)


class Stepper:
    """Steps environments as plainly as it can be done."""

    def __init__(
        self,
        workers: list[Worker],
        policy: Policy,
        obs_space: ObsSpace,
        action_space: ActionSpace,
    ) -> None:
        self._workers, self._policy = workers, policy
        count = len(workers)
        self._obs = {
            key: np.zeros((count, *shape), dtype)
            for key, (dtype, shape) in ((k, record_column(v)) for k, v in obs_space.items())
        }
        self._still = {
            key: np.zeros(shape, dtype)
            for key, (dtype, shape) in ((k, record_column(v)) for k, v in action_space.items())
        }
        self._over = np.ones(count, np.bool_)
        self._first = np.ones(count, np.bool_)

    def bare(self, seconds: float) -> float:
        """Return steps/s with a fixed action."""
        return self._rate(seconds, lambda: [self._still] * len(self._workers))

    def with_policy(self, seconds: float) -> float:
        """Return steps/s with the policy's actions."""

        def choose() -> list[dict[str, Any]]:
            actions, _ = self._policy.step(self._obs, self._first)
            return [{k: a[i] for k, a in actions.items()} for i in range(len(self._workers))]

        return self._rate(seconds, choose)

    def _rate(self, seconds: float, choose: Callable[[], list[dict[str, Any]]]) -> float:
        begin, steps = time.perf_counter(), 0
        while time.perf_counter() - begin < seconds:
            chosen = choose()
            for worker, action, over in zip(self._workers, chosen, self._over, strict=True):
                if over:
                    worker.reset(None)
                else:
                    worker.step(action)
            for index, worker in enumerate(self._workers):
                seen = _answer(worker)
                assert isinstance(seen, Observation), seen
                self._first[index] = self._over[index]
                self._over[index] = seen.terminated or seen.truncated
                for key, array in self._obs.items():
                    array[index] = seen.obs[key]
            steps += len(self._workers)
        return steps / (time.perf_counter() - begin)


class _Actor:
    """A whole actor that only steps while it is measured."""

    def __init__(
        self,
        stack: ExitStack,
        case: Case,
        agent: AgentConfig,
        obs_space: ObsSpace,
        action_space: ActionSpace,
    ) -> None:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-"))
        server = stack.enter_context(EmbeddedServer(Path(folder), max_memory_bytes=2**29))
        self._client = ReplayClient(server.url)
        stack.callback(self._client.close)
        columns = record_columns(agent, obs_space, action_space)
        schema = Schema(tuple(Column(*column) for column in columns))
        # Nothing is admitted until it is measured, so that the actor rests in between.
        limits = Limits(capacity_steps=100_000, capacity_bytes=2**28, budget_steps=1)
        self._client.create(schema, limits)
        self._fence = self._client.acquire_fence()
        self._source = _Newest(agent, obs_space, action_space)
        self._actor = ActorProcess(
            ActorSpec(
                run="bench",
                env_id=case.env_id,
                envs=case.envs,
                environment=case.environment,
                actor=ActorConfig(isolation=case.isolation),  # type: ignore[arg-type]
                agent=agent,
                obs_space=obs_space,
                action_space=action_space,
                schema=schema.to_dict(),
                replay=ReplayConfig(),
                replay_url=server.url,
            ),
            self._source,
        )
        stack.callback(self._actor.stop, drain=False)
        stack.callback(self._source.closed.set)
        self._pause = threading.Event()

    def rate(self, seconds: float) -> float:
        """Return records/s while inserts are admitted."""
        self._client.settle(self._fence, 0, 2**50)
        self._until(lambda: self._actor.stats()["phase"] == "acting")
        start = self._steps()
        self._until(lambda: self._steps() > start)
        begin, before = time.perf_counter(), self._steps()
        self._pause.wait(seconds)
        rate = (self._steps() - before) / (time.perf_counter() - begin)
        self._client.settle(self._fence, 0, 1)
        self._until(lambda: bool(self._actor.stats()["blocked"]))
        return rate

    def _steps(self) -> int:
        return int(self._actor.stats()["env_steps"])

    def _until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120.0
        while not condition():
            stats = self._actor.stats()
            if stats["error"] or time.monotonic() > deadline:
                raise RuntimeError(f"the actor does not act: {stats}")
            self._pause.wait(0.001)


class _Newest:
    """Fresh weights every two seconds, as a learner would publish them."""

    def __init__(self, agent: AgentConfig, obs_space: ObsSpace, action_space: ActionSpace) -> None:
        self._tensors = make_agent(agent, obs_space, action_space).policy_tensors()
        self._weights = pack(self._tensors, (1, 0))
        self._update = 0
        self.closed = threading.Event()
        """Set when nobody wants weights any more."""

    def fetch(self, newer_than: Version, timeout_s: float) -> PackedWeights | None:
        """Return the first weights at once, and newer ones every two seconds."""
        if newer_than >= (1, 0) and self.closed.wait(min(timeout_s, 2.0)):
            return None
        self._update += 1
        manifest = {**self._weights.manifest, "version": [1, self._update]}
        return PackedWeights(buffer=self._weights.buffer, manifest=manifest)


def _started(stack: ExitStack, case: Case, seed: int) -> Worker:
    config = ActorConfig(isolation=case.isolation)  # type: ignore[arg-type]
    worker = make_worker(case.env_id, case.environment, config)
    stack.callback(worker.retire)
    worker.start()
    ready = _answer(worker)
    if isinstance(ready, Failure):
        raise RuntimeError(f"{case.env_id} cannot be made: {ready.message}")
    return worker


def _answer(worker: Worker) -> Any:
    while (answer := worker.receive(1.0)) is None:
        continue
    return answer
