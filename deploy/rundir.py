"""The run directory: one run at a time, and always of the same configuration."""

from __future__ import annotations

import fcntl
import logging
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deploy.config import FILE_NAME, ConfigError, TrainConfig, load_config, require_resumable

log = logging.getLogger(__name__)

LOCK = "lock"
ID_FILE = "id"
"""Holds what names this run where runs meet, such as on a Ray cluster."""


@contextmanager
def run_directory(config: TrainConfig) -> Iterator[Path]:
    """Lock the run directory for the time of the block, if the configuration may run there.

    The configuration is not left in it yet: a run that cannot start must not keep its corrected
    successor out.

    Raises:
        ConfigError: another process runs there, it holds a run of another configuration (the
            differences are listed), or it cannot be written.
    """
    directory = config.directory
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ConfigError(
            f"the run directory {directory} cannot be used: {error}; choose another --run-dir"
        ) from error
    try:
        _take(lock, directory)
        try:
            _require_fitting(directory, config)
            yield directory
        finally:
            _forget_if_unused(directory)
    finally:
        os.close(lock)


def forget_refused(directory: Path) -> None:
    """Take back what a new run has written of itself, if that is all there is: it did not begin."""
    if {path.name for path in directory.iterdir()} == {LOCK, FILE_NAME, ID_FILE}:
        (directory / FILE_NAME).unlink()
        (directory / ID_FILE).unlink()


def run_id(directory: Path) -> str:
    """Return what names the run of a directory wherever it is moved; made up the first time.

    Raises:
        ConfigError: the file that holds it holds something else.
    """
    path = directory / ID_FILE
    if not path.exists():
        path.write_text(secrets.token_hex(6) + "\n")
    found = path.read_text().strip()
    if not re.fullmatch("[0-9a-f]{12}", found):
        raise ConfigError(
            f"{path} holds {found[:40]!r}, expected 12 hex digits; remove it, and end with "
            "`ray list actors` and `ray kill` what may be left of the run on a cluster"
        )
    return found


def _require_fitting(directory: Path, config: TrainConfig) -> None:
    saved = directory / FILE_NAME
    if saved.exists():
        require_resumable(load_config(saved), config)
    elif left := sorted(p.name for p in directory.iterdir() if p.name != LOCK):
        raise ConfigError(
            f"{directory} is not empty ({', '.join(left[:5])}) and holds no run; choose "
            "another --run-dir"
        )


def _forget_if_unused(directory: Path) -> None:
    """Remove the directory if the run left nothing in it but the lock: it could not start."""
    if [path.name for path in directory.iterdir()] == [LOCK]:
        (directory / LOCK).unlink()
        directory.rmdir()


def _take(lock: int, directory: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(lock, 32, 0).decode(errors="replace").strip() or "unknown"
        raise ConfigError(
            f"{directory} is in use by process {holder}; wait for that run, stop it "
            f"(kill {holder}), or choose another --run-dir"
        ) from None
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
