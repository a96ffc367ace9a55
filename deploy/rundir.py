"""The run directory: one run at a time, and always of the same configuration."""

from __future__ import annotations

import fcntl
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from deploy.config import FILE_NAME, ConfigError, TrainConfig, load_config, require_resumable

log = logging.getLogger(__name__)

LOCK = "lock"
ID_FILE = "id"
"""Holds what names this run where runs meet, such as on a Ray cluster."""
STARTING = "starting"
"""Is there as long as the run has not begun: what stands beside it is worth nothing yet."""


@contextmanager
def run_directory(config: TrainConfig) -> Iterator[Path]:
    """Lock the run directory for the time of the block, if the configuration may run there.

    A new run that ends before `begin` leaves nothing, else it would keep its corrected successor
    out. Where it was killed, the next one that comes here removes what it has left.

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
        _clear_unbegun(directory)
        _require_fitting(directory, config)
        if not (directory / FILE_NAME).exists():
            not_begun(directory)
        try:
            yield directory
        finally:
            if _clear_unbegun(directory):
                _remove(directory)
    finally:
        os.close(lock)


def begin(directory: Path) -> bool:
    """Keep what is in the directory, however the run ends. Returns whether it was not kept yet."""
    try:
        (directory / STARTING).unlink()
    except FileNotFoundError:
        return False
    return True


def not_begun(directory: Path) -> None:
    """Keep nothing of a new run unless it comes to `begin`, or comes to it again."""
    (directory / STARTING).touch()


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


def _clear_unbegun(directory: Path) -> bool:
    """Remove all but the lock if the run has not begun. Returns whether that is so."""
    if not (directory / STARTING).exists():
        return False
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name not in (LOCK, STARTING):
            path.unlink()
    # Last: whoever is killed meanwhile leaves the rest to the next one.
    (directory / STARTING).unlink()
    return True


def _remove(directory: Path) -> None:
    (directory / LOCK).unlink()
    # A link, or where a volume is mounted, stays there empty.
    with suppress(OSError):
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
