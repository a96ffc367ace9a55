"""Several Ray nodes on this machine, and runs that are started on them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from deploy import cluster as ours
from deploy.sentinel import Sentinel

DEADLINE_S = 240.0
STORE_BYTES = 80 * 2**20


@contextmanager
def empty_cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Yield an empty cluster on this machine; whatever is added ends with the block."""
    import ray
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_worker_niceness", "0")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
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
    words += ["--ray", cluster.address, "--device", "cpu", "--learner.threads", "1"]
    words += ["--learner.mode", "eager", *flags]
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


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds; fails at the deadline."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "this took too long"
        time.sleep(0.1)


def alive(condition: Callable[[], bool]) -> bool:
    """Return what a question of a Ray actor answers, False while the actor is not there."""
    from ray.exceptions import RayError

    try:
        return condition()
    except (RayError, AttributeError):
        return False
