"""The acting loop with real environments, good and bad ones."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import shaky
from numpy.typing import NDArray
from shaky import ACTION_SPACE, LENGTH, OBS_SPACE, inline, isolated

from actors.envs import EnvConfig, env_spaces
from actors.loop import ActingLoop, EnvironmentLost, LoopStopped, derive_seed
from actors.worker import InlineWorker, Worker
from dreamer.policy import Policy
from dreamer.presets import agent_config, sized

Record = dict[str, Any]


class Notebook:
    """A writer that keeps what it is given."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.versions: list[tuple[int, int]] = []

    def append(self, record: Record, version: tuple[int, int]) -> None:
        """Keep a copy."""
        self.records.append({key: np.array(value) for key, value in record.items()})
        self.versions.append(version)

    def flags(self, name: str) -> list[int]:
        """Return the numbers of the records for which a flag holds."""
        return [number for number, record in enumerate(self.records) if record[name]]


class Echo:
    """A policy that answers step s of an episode with s % 3 + 1 and counts from each reset."""

    version = (1, 2)

    def __init__(self) -> None:
        self.calls: list[tuple[NDArray[Any], NDArray[np.bool_]]] = []
        self.held: list[Any] = []

    def step(
        self, obs: dict[str, NDArray[Any]], is_first: NDArray[np.bool_], mode: str, held: Any = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Choose actions."""
        self.held.append(held)
        self.calls.append((obs["vector"].copy(), is_first.copy()))
        answer = obs["vector"][:, 1].astype(np.int32) % 3 + 1
        return {"action": answer}, {"deter": obs["vector"].astype(np.float16)}


def make_loop(workers: Sequence[Worker], **options: Any) -> tuple[ActingLoop, list[Notebook], Echo]:
    """Return a started loop, what its writers keep, and its policy."""
    notebooks, policy = [Notebook() for _ in workers], Echo()
    spaces = {"obs_space": OBS_SPACE, "action_space": ACTION_SPACE}
    loop = ActingLoop(workers, policy, notebooks, range(len(workers)), **spaces, **options)
    loop.start()
    return loop, notebooks, policy


@pytest.fixture
def closing() -> Iterator[list[Worker]]:
    """A list of workers that are closed after the test."""
    workers: list[Worker] = []
    yield workers
    for worker in workers:
        worker.close()


def check_episodes(records: list[Record]) -> None:
    """Check what holds for every stream, whatever its environment does."""
    assert records[0]["is_first"]
    for before, after in zip(records, records[1:], strict=False):
        assert bool(after["is_first"]) == bool(before["is_last"])
    for record in records:
        assert np.isfinite(record["vector"]).all() and np.isfinite(record["reward"])
        step = record["vector"][1]
        assert record["is_first"] == (step == 0)
        assert record["reward"] == step
        assert record["action"] == (0 if record["is_last"] else step % 3 + 1)
        # Half precision counts to 2,048; in a second an environment may be past that.
        assert (record["deter"] == record["vector"].astype(np.float16)).all()
        assert record["is_terminal"] <= record["is_last"]


def test_record_holds_what_was_seen_and_then_done() -> None:
    loop, (notebook,), _ = make_loop([inline(shaky.Steady)])
    for _ in range(2 * (LENGTH + 1)):
        loop.step()
    check_episodes(notebook.records)
    assert [record["vector"].tolist() for record in notebook.records] == [
        [episode, step] for episode in range(2) for step in range(LENGTH + 1)
    ]
    assert notebook.flags("is_first") == [0, LENGTH + 1]
    assert notebook.flags("is_terminal") == notebook.flags("is_last") == [LENGTH, 2 * LENGTH + 1]
    assert set(notebook.versions) == {(1, 2)}
    assert loop.stats.env_steps == [2 * (LENGTH + 1)]
    assert loop.stats.ends == {"terminated": 2}


def test_all_environments_are_stepped_with_one_policy_call() -> None:
    loop, notebooks, policy = make_loop([inline(shaky.Steady) for _ in range(3)])
    for _ in range(5):
        loop.step()
    assert len(policy.calls) == 5
    assert policy.calls[0][0].shape == (3, 2) and policy.calls[0][1].all()
    assert [len(notebook.records) for notebook in notebooks] == [5, 5, 5]


@pytest.mark.parametrize("kind", [shaky.Raises, shaky.NotFinite, shaky.BadReward])
def test_failure_makes_the_last_good_record_the_truncated_end_of_its_episode(
    kind: type[shaky.Steady],
) -> None:
    loop, (notebook,), _ = make_loop([inline(kind)])
    for _ in range(3 + LENGTH + 1 + 3):
        loop.step()
    check_episodes(notebook.records)
    cut = notebook.records[2]
    assert cut["is_last"] and not cut["is_terminal"] and cut["vector"].tolist() == [0, 2]
    assert notebook.records[3]["vector"].tolist() == [1, 0]
    assert notebook.flags("is_terminal") == [3 + LENGTH]
    assert loop.stats.ends == {"truncated": 2, "terminated": 1}


def test_failures_are_counted_by_reason() -> None:
    found = {}
    for kind in (shaky.Raises, shaky.NotFinite, shaky.BadReward):
        loop, _, _ = make_loop([inline(kind)])
        for _ in range(3):
            loop.step()
        found[kind.__name__] = (dict(loop.stats.restarts), dict(loop.stats.rejected))
    assert found == {
        "Raises": ({"crash": 1}, {}),
        "NotFinite": ({}, {"not_finite": 1}),
        "BadReward": ({}, {"reward": 1}),
    }


@pytest.mark.integration
@pytest.mark.parametrize(("kind", "reason"), [(shaky.Exits, "exit"), (shaky.Hangs, "hang")])
def test_others_go_on_while_a_dead_or_hung_environment_is_made_again(
    kind: type[shaky.Steady], reason: str, closing: list[Worker]
) -> None:
    closing += [isolated(kind), isolated(shaky.Steady)]
    loop, (bad, good), _ = make_loop(closing)
    deadline = time.monotonic() + 60.0
    while len(bad.flags("is_last")) < 2 and time.monotonic() < deadline:
        loop.step()
    check_episodes(bad.records)
    check_episodes(good.records)
    assert bad.flags("is_last")[:2] == [2, 5] and not bad.flags("is_terminal")
    assert loop.stats.restarts == {reason: 2}
    # The process takes far longer to start than the healthy environment takes for a step.
    assert len(good.records) > 3 * len(bad.records)


@pytest.mark.integration
def test_others_go_on_while_one_environment_hangs(closing: list[Worker]) -> None:
    closing += [isolated(shaky.Hangs, hang_timeout_s=1.5), isolated(shaky.Steady)]
    loop, (bad, good), policy = make_loop(closing, late_after_s=0.05)
    while not loop.stats.late:
        loop.step()
    at, deadline = len(good.records), time.monotonic() + 60.0
    while not loop.stats.restarts and time.monotonic() < deadline:
        loop.step()
    # All of these were written while the other one hung; without the limit there would be none.
    assert len(good.records) - at > 20
    assert policy.held[-2].tolist() == [True, False] and policy.held[-1] is None
    check_episodes(bad.records)
    check_episodes(good.records)
    assert bad.flags("is_last") == [2] and not bad.flags("is_terminal")
    assert loop.stats.restarts == {"hang": 1}


@pytest.mark.integration
def test_slow_environment_loses_nothing_by_being_left_behind(closing: list[Worker]) -> None:
    closing += [isolated(shaky.Slow, hang_timeout_s=30.0), isolated(shaky.Steady)]
    loop, (slow, good), policy = make_loop(closing, late_after_s=0.01)
    deadline = time.monotonic() + 60.0
    while len(slow.records) < 2 * (LENGTH + 1) and time.monotonic() < deadline:
        policy.version = (1, policy.version[1] + 1)
        loop.step()
    check_episodes(slow.records)
    check_episodes(good.records)
    assert [record["vector"].tolist() for record in slow.records] == [
        [episode, step] for episode in range(2) for step in range(LENGTH + 1)
    ]
    assert len(good.records) > 2 * len(slow.records) and not loop.stats.restarts
    # A record carries the version that chose its action, not the one at the time of its answer.
    chosen = [version for _, version in slow.versions]
    assert chosen == sorted(chosen) and len(set(chosen)) == len(chosen)
    asked = [call for call, held in enumerate(policy.held, 3) if held is None or not held[0]]
    assert chosen == asked[: len(chosen)]


def test_together_means_that_nobody_goes_on_alone() -> None:
    workers = [inline(shaky.Raises), inline(shaky.Steady)]
    loop, notebooks, _ = make_loop(workers, together=True)
    for _ in range(20):
        loop.step()
    assert [len(notebook.records) for notebook in notebooks] == [20, 20]


def test_environment_that_never_works_is_given_up_with_its_error() -> None:
    loop, (notebook,), _ = make_loop([inline(shaky.AlwaysRaises)], most_failures=4)
    with pytest.raises(EnvironmentLost, match="(?s)4 times in a row.*crash.*never works"):
        for _ in range(10):
            loop.step()
    assert [bool(record["is_last"]) for record in notebook.records] == [True] * 4


def test_environment_that_cannot_be_made_says_why_at_once() -> None:
    with pytest.raises(EnvironmentLost, match="^the level file is missing; install the levels$"):
        make_loop([inline(shaky.CannotBeMade)])


def test_environment_with_other_spaces_than_planned_is_refused() -> None:
    with pytest.raises(EnvironmentLost, match="the run was started for"):
        make_loop([InlineWorker("CartPole-v1", EnvConfig())])


@pytest.mark.integration
def test_loop_leaves_a_hanging_environment_when_told_to_stop(closing: list[Worker]) -> None:
    stop = threading.Event()
    closing.append(isolated(shaky.Hangs, hang_timeout_s=60.0))
    loop, _, _ = make_loop(closing, stop=stop)
    loop.step()
    loop.step()
    threading.Timer(0.1, stop.set).start()
    begin = time.monotonic()
    with pytest.raises(LoopStopped):
        loop.step()
    assert time.monotonic() - begin < 5.0


def test_cartpole_with_the_real_policy_gives_the_same_records_for_the_same_seed() -> None:
    obs_space, action_space, _ = env_spaces("CartPole-v1", EnvConfig())
    agent = sized(agent_config("v3", "1m"), "debug")

    def play() -> list[Record]:
        policy = Policy(agent, obs_space, action_space, seed=3)
        notebooks = [Notebook(), Notebook()]
        workers = [InlineWorker("CartPole-v1", EnvConfig()) for _ in notebooks]
        spaces = {"obs_space": obs_space, "action_space": action_space}
        loop = ActingLoop(workers, policy, notebooks, [derive_seed(3, 0, 0), 5], **spaces)
        for tensor in policy.state_dict().values():
            tensor.zero_()
        loop.start()
        for _ in range(60):
            loop.step()
        return notebooks[0].records + notebooks[1].records

    first, second = play(), play()
    assert len(first) == 120 and len({record["vector"].tobytes() for record in first}) > 100
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys() and all((one[k] == other[k]).all() for k in one)


def test_seeds_differ_in_every_part() -> None:
    seeds = {
        derive_seed(a, b, c, d)
        for a in range(4)
        for b in range(4)
        for c in range(4)
        for d in range(4)
    }
    assert len(seeds) == 4**4 and all(0 <= seed < 2**31 for seed in seeds)
