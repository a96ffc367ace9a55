"""Every agent through the whole pipeline: actors, replay, learner, checkpoint, evaluation."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.cli import main
from learner.files import read_rows

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[2]
FLAGS = (
    ("--size", "debug", "--steps", "384", "--train-ratio", "4", "--actors", "1")
    + ("--envs-per-actor", "2", "--learner.batch-size", "4", "--learner.batch-length", "16")
    + ("--replay.min-size-steps", "128", "--replay.chunk-steps", "16")
    + ("--environment.action-repeat", "1", "--learner.log-every-s", "0.5")
)
CASES = {
    "v1-dmc-proprio": "Pendulum-v1",
    "v2-dmc-proprio": "CartPole-v1",
    "v3-2023-dmc-proprio": "Pendulum-v1",
    "pro-dmc-vision": "CartPole-v1",
    "pro-v3-dmc-vision": "CartPole-v1",
    "r2-dmc-vision": "CartPole-v1",
}


def train(*args: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "deploy.cli", "train", *args],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("preset", CASES)
def test_an_agent_trains_and_is_evaluated_as_its_paper_does(tmp_path: Path, preset: str) -> None:
    run = tmp_path / "run"
    command = ("--preset", preset, "--env", CASES[preset], *FLAGS)
    train(*command, "--environment.obs", "auto", "--run-dir", str(run))
    rows = read_rows(run / "metrics.jsonl")
    losses = {key: value for key, value in rows[-1].items() if key.startswith("loss/")}
    assert {"loss/policy", "loss/value", "loss/rew"} <= set(losses)
    assert all(math.isfinite(value) for value in losses.values())
    assert rows[-1]["updates"] >= 16 and rows[-1]["env_steps"] >= 384
    # In this process, which has imported everything before.
    assert main(["eval", str(run), "--episodes", "2", "--envs", "2"]) == 0
    result = json.loads((run / "eval.json").read_text())
    assert len(result["episodes"]) == 2
    assert result["mode"] == ("sample" if preset.startswith("v3") else "greedy")
