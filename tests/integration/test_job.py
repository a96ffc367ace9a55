"""`ray job submit --working-dir . -- dreamfleet train --ray auto`, as docs/operations.md has it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.integration.raylets import DEADLINE_S, STORE_BYTES, empty_cluster, status

pytestmark = [pytest.mark.integration, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
STEPS = 800


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def test_training_is_submitted_as_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("aiohttp_cors", reason="submitting jobs needs ray[default]")
    port, run, bin_dir = free_port(), tmp_path / "run", Path(sys.executable).parent
    monkeypatch.setenv("PATH", f"{bin_dir}:{os.environ['PATH']}")
    with empty_cluster(monkeypatch) as cluster:
        cluster.add_node(
            num_cpus=2,
            resources={"learner": 1, "actor": 1},
            object_store_memory=STORE_BYTES,
            include_dashboard=True,
            dashboard_host="127.0.0.1",
            dashboard_port=port,
            dashboard_agent_listen_port=free_port(),
        )
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + DEADLINE_S
        while not answers(f"{url}/api/version"):
            assert time.monotonic() < deadline, "the dashboard did not start"
            time.sleep(0.2)
        words = [str(bin_dir / "ray"), "job", "submit", "--address", url, "--working-dir", "."]
        words += ["--entrypoint-resources", '{"learner": 1}', "--", "dreamfleet", "train"]
        words += ["--ray", "auto", "--preset", "v3-cartpole", "--size", "debug"]
        words += ["--steps", str(STEPS), "--replay.min-size-steps", "512", "--device", "cpu"]
        words += ["--learner.threads", "1", "--run-dir", str(run)]
        while True:
            done = subprocess.run(
                words, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_S, check=False
            )
            said = done.stdout + done.stderr
            # The dashboard answers before the agent that starts jobs does.
            if "No available agent" not in said or time.monotonic() > deadline:
                break
        assert done.returncode == 0, said[-4000:]
        assert "succeeded" in said and "fleet_started" in said, said[-4000:]
        assert status(run)["phase"] == "finished" and status(run)["env_steps"] >= STEPS
