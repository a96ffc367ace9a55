"""Training on several Ray nodes: who goes where, and nodes that leave and join meanwhile."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from deploy import cluster as ours
from deploy.sentinel import Sentinel

pytestmark = [pytest.mark.integration, pytest.mark.slow]
DEADLINE_S = 240.0
STORE_BYTES = 80 * 2**20


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Yield an empty cluster on this machine; whatever is added ends with the test."""
    import ray
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_worker_niceness", "0")
    ours._set_environment({"RAY_AUTH_MODE": "disabled"}, loopback=False)
    with Sentinel():
        cluster = Cluster()
        try:
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()


def add(cluster: Any, **resources: float) -> Any:
    """Start one more node, which offers the resources and two CPUs.

    Ray itself waits for it no longer than 30 seconds, which a busy machine may exceed.
    """
    deadline = time.monotonic() + DEADLINE_S
    while True:
        try:
            return cluster.add_node(
                num_cpus=2,
                resources=resources,
                object_store_memory=STORE_BYTES,
                include_dashboard=False,
            )
        except Exception as error:
            if "timed out during startup" not in str(error) or time.monotonic() > deadline:
                raise


def start(cluster: Any, run: Path, *flags: str) -> subprocess.Popen[str]:
    """Start a small run on the cluster."""
    words = ["train", "--preset", "v3-cartpole", "--size", "debug", "--run-dir", str(run)]
    words += ["--ray", cluster.address, "--device", "cpu", "--learner.threads", "1", *flags]
    return subprocess.Popen(
        [sys.executable, "-m", "deploy.cli", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )


def status(run: Path) -> dict[str, Any]:
    """Return the last status of a run, empty before the first."""
    try:
        found: dict[str, Any] = json.loads((run / "status.json").read_text())
    except (OSError, ValueError):
        return {}
    return found


def raylet_of(node: Any) -> int:
    """Return the process that starts all others of a node."""
    return int(node.all_processes["raylet"][0].process.pid)


def acting_below(run: Path, raylet: int) -> int:
    """Return how many actors act whose processes belong to the node."""
    acting = [
        one for one in status(run).get("per_actor", []) if one["state"] in ("acting", "blocked")
    ]
    return sum(_parent(int(one["pid"])) == raylet for one in acting)


def _parent(pid: int) -> int:
    try:
        return psutil.Process(pid).ppid()
    except psutil.NoSuchProcess:
        return 0


def until(condition: Callable[[], bool], process: subprocess.Popen[str], what: str) -> None:
    """Wait until a condition holds; fails at the deadline, or when the run ends."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            out, _ = process.communicate(timeout=30)
            pytest.fail(f"{what}: exit code {process.returncode}\n{out[-3000:]}")
        time.sleep(0.1)


def test_training_survives_a_node_that_leaves_and_uses_one_that_joins(
    nodes: Any, tmp_path: Path
) -> None:
    add(nodes, learner=1)
    first = add(nodes, actor=2)
    run = tmp_path / "run"
    process = start(nodes, run, "--steps", "1000000", "--actors", "2")
    try:
        until(
            lambda: acting_below(run, raylet_of(first)) == 2, process, "no actors on the first node"
        )
        until(lambda: status(run)["updates"] > 0, process, "no update")
        nodes.remove_node(first, allow_graceful=False)
        second = add(nodes, actor=2)
        until(
            lambda: acting_below(run, raylet_of(second)) == 2,
            process,
            "no actors on the second node",
        )
        before = status(run)
        until(
            lambda: (
                status(run)["env_steps"] > before["env_steps"]
                and status(run)["updates"] > before["updates"]
            ),
            process,
            "training did not go on",
        )
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 128 + signal.SIGTERM, out[-3000:]
        assert "reason=died" in out
    finally:
        process.kill()
        process.wait(30)


def test_a_learner_on_the_wrong_node_is_told_how_to_get_to_the_right_one(
    nodes: Any, tmp_path: Path
) -> None:
    add(nodes)  # the process that is started here belongs to the first node
    add(nodes, learner=1)
    nodes.wait_for_nodes()
    process = start(nodes, tmp_path / "run", "--steps", "2000")
    out, _ = process.communicate(timeout=DEADLINE_S)
    said = " ".join(out.split())
    assert process.returncode == 2, said
    assert "this process is on a node without the Ray resource 'learner'" in said
    assert """--entrypoint-resources '{"learner": 1}'""" in said


def test_actors_without_room_are_announced(nodes: Any, caplog: pytest.LogCaptureFixture) -> None:
    import ray

    add(nodes, learner=1, actor=1)
    ray.init(address=nodes.address, logging_level="ERROR", log_to_driver=False)
    assert ours.actor_resources(1) == {"actor": 1.0}
    assert not caplog.records
    assert ours.actor_resources(3) == {"actor": 1.0}
    assert "actors_without_room wanted=3 offered=1" in caplog.text
    assert list(ours.this_node().values()) == [0.001]
