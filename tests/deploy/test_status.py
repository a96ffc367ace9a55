from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from deploy.config import FILE_NAME, ConfigError, save_config
from deploy.presets import preset
from deploy.status import StatusOptions, read_status, require_run, status


@pytest.fixture
def run(tmp_path: Path) -> Path:
    save_config(preset("v3-cartpole"), tmp_path / "run" / FILE_NAME)
    return tmp_path / "run"


def write(run: Path, **values: Any) -> None:
    snapshot = {"env_steps": 5, "target_steps": 10, "phase": "update", "started_at": time.time()}
    (run / "status.json").write_text(json.dumps(snapshot | values))


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_running_run_is_alive(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(run, pid=os.getpid())
    assert read_status(run)["alive"]
    assert status(StatusOptions(run_dir=run)) == 0
    assert "running" in capsys.readouterr().out


def test_running_run_says_where_its_metrics_are(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(run, pid=os.getpid(), metrics_port=9123)
    status(StatusOptions(run_dir=run))
    assert "http://127.0.0.1:9123/metrics" in capsys.readouterr().out


@pytest.mark.parametrize(
    "facts", [{"metrics_port": None}, {"metrics_port": 9123, "phase": "stopped"}]
)
def test_metrics_that_nobody_serves_are_not_shown(
    run: Path, capsys: pytest.CaptureFixture[str], facts: dict[str, Any]
) -> None:
    write(run, pid=os.getpid(), **facts)
    status(StatusOptions(run_dir=run))
    assert "/metrics" not in capsys.readouterr().out


def test_killed_run_is_reported_as_dead_with_how_to_continue(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(run, pid=dead_pid())
    assert status(StatusOptions(run_dir=run, json=True)) == 1
    assert not json.loads(capsys.readouterr().out)["alive"]


def test_process_number_that_another_program_has_by_now_is_no_run(run: Path) -> None:
    write(run, pid=os.getpid(), started_at=time.time() - 10**6)
    assert not read_status(run)["alive"]


@pytest.mark.parametrize(("phase", "code"), [("finished", 0), ("stopped", 0), ("failed", 1)])
def test_ended_run_says_how_it_ended(run: Path, phase: str, code: int) -> None:
    write(run, pid=os.getpid(), phase=phase)
    assert not read_status(run)["alive"]
    assert status(StatusOptions(run_dir=run)) == code


def test_run_without_a_status_is_starting(run: Path) -> None:
    with pytest.raises(ConfigError, match=r"no status.json yet"):
        read_status(run)


def test_torn_status_file_is_named(run: Path) -> None:
    (run / "status.json").write_text("{")
    with pytest.raises(ConfigError, match=r"cannot read .*status.json"):
        read_status(run)


def test_wrong_directory_names_the_runs_beside_it(run: Path) -> None:
    with pytest.raises(ConfigError, match=rf"no run in .*other; runs here: {run}"):
        require_run(run.parent / "other")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"updates_per_s": 2.0, "waiting_for": ""}, "healthy"),
        ({"updates_per_s": 0.0, "waiting_for": "updates wait for experience"}, "healthy"),
        ({"updates_per_s": 0.0, "waiting_for": ""}, "no update"),
        ({"updates_per_s": 2.0, "phase": "failed"}, "does not run (phase failed)"),
        ({"updates_per_s": 2.0, "pid": None}, "does not run"),
    ],
)
def test_health_check_of_a_run_tells_waiting_from_standing_still(
    run: Path, capsys: pytest.CaptureFixture[str], values: dict[str, Any], said: str
) -> None:
    write(run, **{"pid": os.getpid(), **values})
    code = status(StatusOptions(run_dir=run, healthy=True))
    assert said in capsys.readouterr().out
    assert code == (0 if said == "healthy" else 1)


def test_health_check_of_a_run_notices_that_nothing_is_reported(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(run, pid=os.getpid(), updates_per_s=2.0, waiting_for="")
    long_ago = time.time() - 100
    os.utime(run / "status.json", (long_ago, long_ago))
    assert status(StatusOptions(run_dir=run, healthy=True)) == 1
    assert "has not reported for 100 s" in capsys.readouterr().out
