"""Parts of a whole run are killed, stopped, replaced and fed nonsense while it trains."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import copytree, ignore_patterns
from typing import Any
from urllib.request import urlopen

import pytest

from learner.checkpoint import load_newest, newest_fence
from replay_service import EmbeddedServer, ReplayClient
from tests.integration.test_train import END_S, FOREVER, ROOT, START_S, Run, training
from tests.integration.test_train_shards import actors_of, dreamfleet, stats

pytestmark = [
    pytest.mark.faults,
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.timeout(900),
]

Recovered = Callable[..., None]
Start = Callable[..., Run]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    runs: list[Run] = []

    def begin(*flags: str, name: str = "run") -> Run:
        runs.append(Run(tmp_path / name, "--steps", FOREVER, *flags))
        return runs[-1]

    yield begin
    for run in runs:
        run.close()


def own(run: Run) -> Callable[[dict[str, object]], bool]:
    """Return whether a snapshot of a run that trains is one of this process."""
    return lambda status: training(status) and status["pid"] == run.process.pid


def number(run: Run, name: str) -> int:
    return int(str(run.status()[name]))


def metrics(port: Any) -> str:
    """Return what a process of a run exports."""
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        return str(answer.read().decode())


def end(run: Run) -> None:
    """Stop a run, after which nothing contradicts what its replay promises."""
    run.process.send_signal(signal.SIGTERM)
    assert run.process.wait(END_S) == 143, run.output()
    assert run.left(5.0) == []
    code, said = dreamfleet("replay", "check", str(run.directory))
    assert code == 0, said


@pytest.mark.exhaustive
def test_a_learner_is_killed_and_the_same_command_continues(
    start: Start, recovered: Recovered
) -> None:
    flags = ("--learner.checkpoint-every-s", "2")
    run = start(*flags)
    run.wait_for(lambda status: training(status) and saved_fence(run) > 0, START_S)
    before = number(run, "updates")
    run.wait_for(lambda status: int(str(status["updates"])) > before + 30, END_S)
    run.process.kill()
    run.process.wait()
    assert run.left(20.0) == []
    last, fence, steps = number(run, "updates"), saved_fence(run), number(run, "env_steps")
    saved = load_newest(run.directory / "checkpoints")
    assert saved is not None and saved.manifest["update"] <= last + 30

    began = time.monotonic()
    again = start(*flags)
    again.wait_for(own(again), START_S)
    again.wait_for(lambda now: int(str(now["updates"])) > saved.manifest["update"], END_S)
    recovered(time.monotonic() - began, START_S, "updates since the last checkpoint")
    assert re.search(r"resumed .*update", again.output()), again.output()
    assert f"dreamer_fence {fence + 1}.0" in metrics(again.status()["metrics_port"])
    # What was in the replay is there again, the actors' last words aside.
    assert number(again, "env_steps") >= steps
    end(again)
    assert saved_fence(again) == fence + 1


@pytest.mark.exhaustive
def test_an_actor_is_killed_and_replaced(start: Start, recovered: Recovered) -> None:
    run = start()
    run.wait_for(training, START_S)
    (actor,) = actors_of(run)
    os.kill(int(actor["pid"]), signal.SIGKILL)
    began = time.monotonic()

    def acts(_: dict[str, object]) -> bool:
        return any(
            one["pid"] != actor["pid"] and min(one["steps_of_envs"]) > 0
            for one in actors_of(run)
            if "pid" in one
        )

    run.wait_for(acts, END_S)
    recovered(time.monotonic() - began, END_S, "what was not acknowledged")
    before = number(run, "updates")
    run.wait_for(lambda status: int(str(status["updates"])) > before + 20, END_S)
    assert "actor_lost slot=0 reason=died" in run.output()
    port = run.status()["metrics_port"]
    assert 'dreamer_actor_restarts_total{reason="died"} 1.0' in metrics(port)
    end(run)


def test_a_stopped_learner_that_was_replaced_comes_back_and_changes_nothing(
    start: Start, recovered: Recovered, tmp_path: Path
) -> None:
    """As on a file system that two machines share, and on which a lock holds for one of them."""
    with EmbeddedServer(tmp_path / "server", max_memory_bytes=2**27) as server:
        flags = ("--redis", server.url, "--learner.checkpoint-every-s", "2")
        zombie = start(*flags, name="old")
        zombie.wait_for(lambda status: training(status) and saved_fence(zombie) > 0, START_S)
        fence = saved_fence(zombie)
        os.kill(zombie.process.pid, signal.SIGSTOP)
        try:
            left = ignore_patterns("lock", "checkpoints", "status.json", "mirror")
            copytree(zombie.directory, tmp_path / "new", ignore=left)
            shared = zombie.directory / "checkpoints"
            (tmp_path / "new" / "checkpoints").symlink_to(shared)
            began = time.monotonic()
            run = start(*flags, name="new")
            run.wait_for(lambda status: own(run)(status) and saved_fence(run) > fence, START_S)
            seconds = time.monotonic() - began
            theirs = {path.name for path in shared.glob(f"*{fence:06d}-*")}
        finally:
            os.kill(zombie.process.pid, signal.SIGCONT)
        assert zombie.process.wait(END_S) == 2, zombie.output()
        assert zombie.left(20.0) == []
        assert f"fence {fence} was replaced by" in zombie.output()
        assert "Traceback" not in zombie.output()
        # It has saved nothing since, which its successor would have kept, and settled nothing.
        assert {path.name for path in shared.glob(f"*{fence:06d}-*")} <= theirs
        assert stats(server.url).fence == fence + 1 == saved_fence(run)
        before = number(run, "updates")
        run.wait_for(lambda status: int(str(status["updates"])) > before + 20, END_S)
        version = run.status()["policy_version"]
        assert isinstance(version, list) and version[0] == fence + 1
        assert all(one["version"][0] == fence + 1 for one in actors_of(run))
        replayed, size = number(run, "updates"), 4 * 16
        assert replayed * size <= stats_after_end(run, server.url) <= number(run, "updates") * size
        assert load_newest(shared) is not None and saved_fence(run) == fence + 1
        recovered(seconds, START_S, "updates since the last checkpoint")


def test_environments_fail_in_every_way_while_a_run_trains(
    start: Start, recovered: Recovered, monkeypatch: pytest.MonkeyPatch
) -> None:
    # By its bare name, in which environment processes import it.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(Path(__file__).parent)]))
    run = start(
        "--env", "moody:Moody", *("--actor.isolation", "process", "--actor.hang-timeout-s", "2")
    )

    def failed(_: dict[str, object]) -> bool:
        found = actors_of(run)
        told = [{**one.get("env_restarts", {}), **one.get("obs_rejected", {})} for one in found]
        return any({"crash", "hang", "not_finite"} <= one.keys() for one in told)

    run.wait_for(training, START_S)
    run.wait_for(failed, END_S)
    (actor,) = actors_of(run)
    began = time.monotonic()
    run.wait_for(
        lambda _: all(
            now > then
            for now, then in zip(
                actors_of(run)[0]["steps_of_envs"], actor["steps_of_envs"], strict=True
            )
        ),
        END_S,
    )
    recovered(time.monotonic() - began, END_S, "the step that failed")
    found = metrics(actors_of(run)[0]["metrics_port"])
    for name in ("env_restarts_total", "obs_rejected_total"):
        assert re.search(rf"dreamer_{name}{{[^}}]*}} [1-9]", found), found
    before = number(run, "updates")
    run.wait_for(lambda status: int(str(status["updates"])) > before + 20, END_S)
    assert actors_of(run)[0]["life"] == actor["life"], "its actor outlives every environment"
    end(run)


def saved_fence(run: Run) -> int:
    """Return the fence of the newest checkpoint, 0 before the first."""
    return newest_fence(run.directory / "checkpoints")


def stats_after_end(run: Run, url: str) -> int:
    """End a run and return how many steps its server was told that were replayed."""
    end(run)
    client = ReplayClient(url)
    try:
        return client.stats().replayed_steps
    finally:
        client.close()
