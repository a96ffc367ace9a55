"""A watcher that outlives a run and ends whatever the run has left behind.

Children can be tied to their parent's life, but not the children of libraries: some of Ray's stay
when its parent is killed. So every process of a run inherits a mark in its environment, and a small
process in a session of its own waits for the run to end, for whatever reason, and then ends all
that are left of it.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

import psutil

MARK = "DREAMFLEET_RUN_MARK"
GRACE_S = 2.0
"""Time for which processes may end by themselves once their run has ended."""
TERM_S = 3.0
"""Time between asking a process to end and killing it."""


class Sentinel:
    """Mark all processes started from now on, and end those that are left when this one ends.

    1. Holds for every end of this process, SIGKILL included.
    2. Leaving the block waits until nothing is left, at most about ``GRACE_S + TERM_S``.
    3. Only processes that carry the mark of this run, or have files open in a temporary directory
       that it owns, are touched, and never this one.
    4. Those directories are removed with them.
    """

    def __init__(self) -> None:
        self.mark = secrets.token_hex(16)
        self._before = os.environ.get(MARK)
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Sentinel:
        # Its own environment must not carry the mark.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "deploy.sentinel", self.mark],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        os.environ[MARK] = self.mark
        return self

    def owns(self, directory: Path) -> None:
        """Have a temporary directory of this run removed with its processes."""
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.write(f"{directory}\n".encode())
        self._process.stdin.flush()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._before is None:
            os.environ.pop(MARK, None)
        else:
            os.environ[MARK] = self._before
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def members(
    mark: str, directories: Sequence[str] = (), but: int | None = None
) -> list[psutil.Process]:
    """Return the running processes of a run, this one and ``but`` excepted.

    Those that carry its mark; and, because a process that sets its title may wipe its environment
    out, those with a file open below one of its directories.
    """
    wanted, found = f"{MARK}={mark}".encode(), []
    below = tuple(f"{directory}/" for directory in directories)
    for pid in psutil.pids():
        try:
            carries = wanted in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            if carries or (below and any(name.startswith(below) for name in _open_files(pid))):
                found.append(psutil.Process(pid))
        except (psutil.Error, OSError):
            continue  # gone meanwhile, or of another user
    return [process for process in found if process.pid not in (os.getpid(), but)]


def _open_files(pid: int) -> list[str]:
    folder = f"/proc/{pid}/fd"
    return [os.readlink(f"{folder}/{number}") for number in os.listdir(folder)]


def end_members(
    mark: str,
    directories: Sequence[str] = (),
    grace_s: float = GRACE_S,
    term_s: float = TERM_S,
    but: int | None = None,
) -> int:
    """Wait for a run's processes to end, ask the rest to, then kill. Return how many were asked."""
    psutil.wait_procs(members(mark, directories, but), timeout=grace_s)
    asked = members(mark, directories, but)
    for process in asked:
        _send(process.terminate)
    psutil.wait_procs(asked, timeout=term_s)
    while left := members(mark, directories, but):
        for process in left:
            _send(process.kill)
        psutil.wait_procs(left, timeout=1.0)
    return len(asked)


def _send(signal: Callable[[], None]) -> None:
    try:
        signal()
    except psutil.Error:
        return  # it has just ended by itself


def main() -> None:
    """Wait until the other end of the standard input is closed, then end what is left."""
    run = os.getppid()
    directories = sys.stdin.read().splitlines()
    end_members(sys.argv[1], directories, but=run)
    for directory in directories:
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
