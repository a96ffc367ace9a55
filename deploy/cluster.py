"""Ray for one run: a private local instance, or a connection to a cluster."""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)

MIB = 1024**2
TEMP_PREFIX = "dreamfleet-ray-"
OBJECT_STORE_BYTES = 256 * MIB
"""Room for a few copies of the largest published policy."""


class ClusterError(RuntimeError):
    """Ray cannot be started or reached; the message says what to do."""


@contextmanager
def ray_cluster(address: str, *, cpus: int, note: Path) -> Iterator[None]:
    """Start a private Ray, or join the cluster at the address, for the time of the block.

    A private Ray is reached by this process and its children alone: it listens on the loopback
    interface, and a token made for this run guards what it opens elsewhere. It ends with this
    process, whatever ends it; the file ``note`` remembers its temporary files, so that the next run
    in the same directory can remove what a kill left behind.

    Args:
        address: ``local``, ``auto`` or ``host:port``.
        cpus: slots for actors of a private Ray.
        note: file for the place of its temporary files.

    Raises:
        ClusterError: nothing answers, or it cannot be started.
    """
    import ray

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # A machine without GPUs would otherwise warn, and actors must not hide the learner's devices.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    temp = None
    try:
        if address == "local":
            temp = _start_private(cpus, note)
        else:
            _join(address)
        yield
    finally:
        ray.shutdown()
        if temp is not None:
            shutil.rmtree(temp, ignore_errors=True)
            note.unlink(missing_ok=True)


def remove_leftovers(note: Path) -> None:
    """Remove the temporary files that a killed run of the same directory left behind."""
    try:
        left = Path(json.loads(note.read_text())["temp"])
    except (OSError, ValueError, KeyError):
        return
    if left.name.startswith(TEMP_PREFIX):
        shutil.rmtree(left, ignore_errors=True)
    note.unlink(missing_ok=True)


def _start_private(cpus: int, note: Path) -> Path:
    import ray

    # Ray's sockets lie below this folder and their paths are limited to 107 characters.
    temp = Path(tempfile.mkdtemp(prefix=TEMP_PREFIX, dir=_short_temp()))
    note.write_text(json.dumps({"temp": str(temp)}))
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(16)
    try:
        ray.init(
            address="local",
            num_cpus=cpus,
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            namespace="dreamfleet",
            log_to_driver=False,
            logging_level=logging.ERROR,
            _node_ip_address="127.0.0.1",
            _temp_dir=str(temp),
        )
    except (RuntimeError, OSError, ValueError, ConnectionError) as error:
        raise ClusterError(
            f"a local Ray could not be started: {error}; `dreamfleet doctor` checks what it needs, "
            "and its logs were in the folder named above"
        ) from error
    log.info("ray_started temp=%s cpus=%d", temp, cpus)
    return temp


def _join(address: str) -> None:
    import ray

    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    try:
        ray.init(
            address=address,
            namespace="dreamfleet",
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (RuntimeError, OSError, ValueError, ConnectionError) as error:
        raise ClusterError(
            f"no Ray cluster answers at --ray {address}: {error}; start one with `ray start`, set "
            "RAY_AUTH_MODE as the cluster has it, or leave --ray out for a local one"
        ) from error
    log.info("ray_joined address=%s", address)


def _short_temp() -> str | None:
    """Return a folder with a short path for temporary files, None for the default."""
    default = tempfile.gettempdir()
    return "/tmp" if len(default) > 20 and Path("/tmp").is_dir() else None
