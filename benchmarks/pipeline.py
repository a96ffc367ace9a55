"""The whole: environments to weights through real Ray, real Redis and real processes."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from learner.files import read_rows

CASES: dict[str, tuple[str, ...]] = {
    # The learner is the bottleneck: cheap environments, a ratio that it cannot keep up with.
    "learner": ("--train-ratio", "128", "--steps", "2400"),
    # The environments are: few replayed steps for each of theirs.
    "environments": ("--train-ratio", "0.25", "--steps", "150000"),
}
QUICK: dict[str, tuple[str, ...]] = {"quick": ("--train-ratio", "8", "--steps", "2000")}
_ALWAYS = ("--learner.log-every-s", "1.0", "--learner.metrics-port", "-1")
TIMEOUT_S = 900.0


def run(*, quick: bool = False, preset: str = "v3-cartpole") -> dict[str, Any]:
    """Train in a temporary run directory for a while, and measure what the run itself records.

    Args:
        quick: one short case, to see that everything runs.
        preset: configuration to start from.

    Returns:
        For each case environment steps/s, updates/s and shares of the learner's time, all between
        the first update and the end.
    """
    cases = QUICK if quick else CASES
    return {
        "benchmark": "pipeline",
        "preset": preset,
        "cases": [_measure(name, preset, flags) for name, flags in cases.items()],
    }


def table(result: dict[str, Any]) -> list[list[str]]:
    """Return header and rows of the result as text."""
    rows = [["bound by", "env steps/s", "updates/s", "update", "waits for data", "waits for envs"]]
    for case in result["cases"]:
        if "error" in case:
            rows.append([case["case"], case["error"]])
            continue
        share = case["shares"]
        parts = [share[name] for name in ("update", "data_wait", "environments")]
        rows.append(
            [
                case["case"],
                f"{case['env_steps_per_s']:.0f}",
                f"{case['updates_per_s']:.2f}",
                *(f"{part:.2%}" for part in parts),
            ]
        )
    return rows


def _measure(name: str, preset: str, flags: tuple[str, ...]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="dreamfleet-bench-") as folder:
        run_dir = Path(folder) / "run"
        command = [sys.executable, "-m", "deploy.cli", "train", "--preset", preset]
        command += ["--run-dir", str(run_dir), *_ALWAYS, *flags]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
        if done.returncode:
            return {"case": name, "error": done.stderr.strip().splitlines()[-1]}
        return {"case": name, "flags": list(flags), **_rates(read_rows(run_dir / "metrics.jsonl"))}


def _rates(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return means over the rows after the first in which there were updates."""
    trained = [row for row in rows if row["updates"] > 0]
    first, last = trained[0], trained[-1]
    seconds = last["time"] - first["time"]
    return {
        "seconds": seconds,
        "env_steps_per_s": (last["env_steps"] - first["env_steps"]) / seconds,
        "updates_per_s": (last["updates"] - first["updates"]) / seconds,
        "shares": _mean_shares(trained[1:]),
        "bound_by": last["bound_by"],
    }


def _mean_shares(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    names = [key for key in rows[0] if key.startswith("share/")]
    return {name.removeprefix("share/"): fmean(row[name] for row in rows) for name in names}
