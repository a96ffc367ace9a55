import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from deploy.sentinel import MARK, Sentinel, end_members, members

PARENT = """
import os, subprocess, sys, time
from pathlib import Path
from deploy.sentinel import Sentinel
with Sentinel() as sentinel:
    Path(sys.argv[1]).mkdir()
    sentinel.owns(Path(sys.argv[1]))
    deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(99)"
    first = subprocess.Popen([sys.executable, "-c", deaf], start_new_session=True)
    second = subprocess.Popen(["sleep", "99"], start_new_session=True)
    sys.stdout.write(f"{first.pid} {second.pid} {sentinel.mark}\\n")
    sys.stdout.flush()
    if sys.argv[2] == "wait":
        time.sleep(99)
    if sys.argv[2] == "raise":
        raise SystemExit(3)
"""


def start(directory: Path, how: str) -> tuple[subprocess.Popen[str], list[int], str]:
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(directory), how],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": "."},
    )
    assert process.stdout is not None
    first, second, mark = process.stdout.readline().split()
    process.stdout.close()
    return process, [int(first), int(second)], mark


def gone(pids: list[int], timeout_s: float) -> bool:
    """Wait until all of them have ended; orphans may stay as zombies where nobody reaps them."""

    def alive(pid: int) -> bool:
        try:
            return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    deadline = time.monotonic() + timeout_s
    while any(alive(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.faults
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_what_a_killed_process_leaves_is_ended(tmp_path: Path, number: signal.Signals) -> None:
    process, pids, mark = start(tmp_path / "left", "wait")
    process.send_signal(number)
    process.wait(10)
    assert gone(pids, 15)
    assert not members(mark)
    deadline = time.monotonic() + 5
    while (tmp_path / "left").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not (tmp_path / "left").exists()


@pytest.mark.slow
@pytest.mark.parametrize("how, code", [("leave", 0), ("raise", 3)])
def test_leaving_the_block_waits_until_nothing_is_left(tmp_path: Path, how: str, code: int) -> None:
    process, pids, _ = start(tmp_path / "left", how)
    assert process.wait(20) == code
    assert gone(pids, 0.5)
    assert not (tmp_path / "left").exists()


def test_unmarked_processes_and_those_of_other_runs_are_left_alone() -> None:
    other = subprocess.Popen(["sleep", "99"], env={**os.environ, MARK: "other"})
    try:
        assert end_members("mine", grace_s=0, term_s=0) == 0
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_a_process_without_a_mark_is_known_by_its_files(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as log:
        other = subprocess.Popen(["sleep", "99"], stdout=log)
    try:
        assert end_members("mine", [str(tmp_path)], grace_s=0, term_s=5) == 1
        assert not psutil.pid_exists(other.pid)
    finally:
        other.kill()
        other.wait()


def test_the_mark_is_taken_away_again() -> None:
    before = os.environ.get(MARK)
    with Sentinel() as sentinel:
        assert os.environ[MARK] == sentinel.mark
    assert os.environ.get(MARK) == before
