"""A run in lockstep that was stopped and resumed equals one that was not, bit for bit."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from learner.checkpoint import load_newest
from learner.files import read_rows

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
LOCKSTEP = (
    ("--preset", "v3-cartpole", "--size", "debug", "--lockstep", "--device", "cpu")
    + ("--envs-per-actor", "2", "--train-ratio", "4", "--seed", "3")
    + ("--learner.batch-size", "2", "--learner.batch-length", "8")
    + ("--replay.chunk-steps", "16", "--replay.min-size-steps", "64")
    + ("--learner.checkpoint-every-steps", "320", "--learner.threads", "1")
    + ("--replay.capacity-steps", "5000")
)


def train(directory: Path, steps: int) -> None:
    command = [sys.executable, "-m", "deploy.cli", "train", *LOCKSTEP]
    done = subprocess.run(
        [*command, "--run-dir", str(directory), "--steps", str(steps)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr


def scores(directory: Path) -> list[tuple[Any, ...]]:
    """Return every episode, but for the fence, which counts the learner's starts."""
    return [
        (row["env_steps"], row["actor"], row["return"], row["length"], row["policy_version"][1])
        for row in read_rows(directory / "scores.jsonl")
    ]


def test_a_resumed_lockstep_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(whole, 640)
    train(parts, 320)
    train(parts, 640)
    one, two = load_newest(whole / "checkpoints"), load_newest(parts / "checkpoints")
    assert one is not None and two is not None
    assert one.manifest["update"] == two.manifest["update"] > 100
    assert one.manifest["env_steps"] == two.manifest["env_steps"] == 640
    assert one.state["agent"].keys() == two.state["agent"].keys()
    differ = [
        name
        for name, value in one.state["agent"].items()
        if not torch.equal(value, two.state["agent"][name])
    ]
    assert not differ, differ
    assert scores(whole) == scores(parts)
