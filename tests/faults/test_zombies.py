"""A learner that was stopped and replaced comes back, to a hub and actors that have another."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from shutil import copytree, ignore_patterns
from typing import Any

import psutil
import pytest

from actors.roster import HUB, find, names_in, namespace_of
from deploy.rundir import run_id
from replay_service import EmbeddedServer
from tests.faults.test_runs import number, own, saved_fence, stats_after_end
from tests.integration.raylets import add, empty_cluster, wait_for
from tests.integration.test_train import END_S, FOREVER, START_S, Run, training
from tests.integration.test_train_shards import actors_of, stats

pytestmark = [
    pytest.mark.faults,
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.exhaustive,
    pytest.mark.timeout(1800),
]

PATIENCE_S = 2 * START_S
"""Two runs and a cluster start, which takes minutes on a machine that does much else."""
Recovered = Callable[..., None]
STOPS_BEFORE_IT_PUBLISHES = """
import os, signal, sys
from pathlib import Path
from deploy import cli
from learner.publish import Publisher
publish, wanted = Publisher.publish, Path(sys.argv[1])
def stops(self, update):
    if not wanted.exists():
        return publish(self, update)
    self.wait(60.0)
    wanted.unlink()
    os.kill(os.getpid(), signal.SIGSTOP)
    started = publish(self, update)
    self.wait(60.0)
    return started
Publisher.publish = stops
sys.exit(cli.main(sys.argv[2:]))
"""
"""The program, but once a file is there it stops where it is about to publish."""


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """One node of Ray that this process has joined too."""
    import ray

    with empty_cluster(monkeypatch) as cluster:
        add(cluster)
        ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
        yield cluster


def hub_stats(run: Path) -> dict[str, Any]:
    import ray

    hub = find(HUB, namespace_of(run_id(run)))
    found: dict[str, Any] = ray.get(hub.stats.remote(), timeout=60)
    return found


def members(run: Run) -> set[tuple[int, int, int]]:
    return {(one["slot"], one["pid"], one["life"]) for one in actors_of(run) if "pid" in one}


@pytest.mark.parametrize("told_to_end", [False, True], ids=["goes on", "told to end"])
def test_a_stopped_learner_comes_back_to_a_hub_and_a_fleet_that_have_another(
    nodes: Any, recovered: Recovered, tmp_path: Path, told_to_end: bool
) -> None:
    """Told to end while it was stopped, it must still not end what its successor uses."""
    wanted = tmp_path / "wanted"
    with ExitStack() as stack:
        server = stack.enter_context(EmbeddedServer(tmp_path / "server", max_memory_bytes=2**27))
        flags = ("--steps", FOREVER, "--ray", nodes.address, "--redis", server.url)
        flags += ("--learner.checkpoint-every-s", "2")
        # Of the same name in two places: the fleet is the same one to both.
        (tmp_path / "old").mkdir()
        zombie = Run(
            tmp_path / "old" / "run",
            *flags,
            program=("-c", STOPS_BEFORE_IT_PUBLISHES, str(wanted)),
        )
        stack.callback(zombie.close)
        zombie.wait_for(
            lambda status: training(status) and saved_fence(zombie) > 0 and bool(members(zombie)),
            PATIENCE_S,
        )
        fence, shared = saved_fence(zombie), zombie.directory / "checkpoints"
        wanted.touch()
        stopped = psutil.Process(zombie.process.pid)
        wait_for(lambda: stopped.status() == psutil.STATUS_STOPPED)
        assert not wanted.exists()
        before = members(zombie)

        left = ignore_patterns("lock", "checkpoints", "status.json", "mirror")
        copytree(zombie.directory, tmp_path / "new" / "run", ignore=left)
        (tmp_path / "new" / "run" / "checkpoints").symlink_to(shared)
        began = time.monotonic()
        run = Run(tmp_path / "new" / "run", *flags)
        stack.callback(run.close)
        run.wait_for(
            lambda status: (
                own(run)(status)
                and saved_fence(run) > fence
                and hub_stats(run.directory)["version"][0] > fence
            ),
            PATIENCE_S,
        )
        seconds = time.monotonic() - began
        theirs = {path.name for path in shared.glob(f"*{fence:06d}-*")}
        hub = hub_stats(run.directory)

        if told_to_end:
            zombie.process.send_signal(signal.SIGTERM)
        os.kill(zombie.process.pid, signal.SIGCONT)
        assert zombie.process.wait(END_S) == 2, zombie.output()
        assert f"weights_refused fence={fence} update=" in zombie.output()
        assert f"fence {fence} was replaced by" in zombie.output()
        assert "Traceback" not in zombie.output()

        # The hub is the same, has taken nothing of it, and goes on with its successor's weights.
        after = hub_stats(run.directory)
        assert (after["pid"], after["rejected"]) == (hub["pid"], hub["rejected"] + 1)
        assert after["version"][0] == fence + 1
        run.wait_for(lambda _: hub_stats(run.directory)["version"] > after["version"], END_S)
        updates = number(run, "updates")
        run.wait_for(
            lambda status: (
                int(str(status["updates"])) > updates + 20
                and all(one["version"][0] == fence + 1 for one in actors_of(run))
            ),
            END_S,
        )
        assert members(run) == before, "its actors are the same ones, untouched"
        # Nothing was saved or settled since, which its successor would have kept.
        assert {path.name for path in shared.glob(f"*{fence:06d}-*")} <= theirs
        assert stats(server.url).fence == fence + 1 == saved_fence(run)
        replayed, size = number(run, "updates"), 4 * 16
        settled = stats_after_end(run, server.url)
        assert replayed * size <= settled <= number(run, "updates") * size
        assert names_in(namespace_of(run_id(run.directory))) == []
        recovered(seconds, START_S, "updates since the last checkpoint")
