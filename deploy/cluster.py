"""Ray for one run: a private local instance, or a connection to a cluster."""

from __future__ import annotations

import importlib
import logging
import os
import secrets
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deploy.sentinel import Sentinel

log = logging.getLogger(__name__)

MIB = 1024**2
TEMP_PREFIX = "dreamfleet-ray-"
OBJECT_STORE_BYTES = 1024 * MIB
"""Room for a few copies of the policy of size 200m (223 MB); memory is taken when it is used."""
LEAST_STORE_BYTES = 128 * MIB

LEARNER, ACTOR = "learner", "actor"
"""Resources of Ray with which the nodes of a cluster say what they are for."""
_CLUSTERS = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Despite its name Ray reads it on every system."""
LISTENER_TIMEOUT_S = 5.0
_GCS_AWAY = "RAY_gcs_rpc_server_reconnect_timeout_s"
"""Not in ``_system_config``: the driver's first client of the GCS is older than that."""
GCS_AWAY_S = 600
"""How long this process goes on without the control process (GCS) of its private Ray.

A SIGTERM to a whole process group or service ends Ray's processes too, and after Ray's own 60 s it
would end this one: an update that takes longer, such as one that compiles, could then save nothing.
Not longer: where the GCS alone has died, an actor that is lost does not come back, the run waits,
and only this end lets whoever watches it start it again.
"""


class ClusterError(RuntimeError):
    """Ray cannot be started or reached; the message says what to do."""


@contextmanager
def ray_cluster(address: str, *, cpus: int, sentinel: Sentinel) -> Iterator[None]:
    """Start a private Ray, or join the cluster at the address, for the time of the block.

    A private Ray belongs to this process and its children: a token made for this run guards
    whatever it listens on. It ends with this process, whatever ends it, and takes its temporary
    files along.

    Args:
        address: ``local``, ``auto`` or ``host:port``.
        cpus: slots for actors of a private Ray.
        sentinel: ends what a kill of this process leaves of it.

    Raises:
        ClusterError: nothing answers, or it cannot be started.
    """
    try:
        if address == "local":
            _start_private(cpus, sentinel)
        else:
            _join(address)
        yield
    finally:
        import ray

        ray.shutdown()


def this_node() -> dict[str, float]:
    """Return the resource that this node of the joined Ray alone offers."""
    import ray

    return {f"node:{ray.util.get_node_ip_address()}": 0.001}


def actor_resources(actors: int) -> dict[str, float]:
    """Return what each actor takes on the joined Ray, besides a share of a CPU.

    A cluster has roles if one of its nodes offers the resource ``learner`` or ``actor``. Then this
    process must be on a node with the first, where there is one, and actors go to nodes with the
    second, of which each takes 1. Actors without room wait until a node joins; the log says so.

    Raises:
        ClusterError: this node is not for learners.
    """
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    offers = {node["NodeID"]: node["Resources"] for node in nodes}
    here = ray.get_runtime_context().get_node_id()
    learners = [node["NodeManagerHostname"] for node in nodes if LEARNER in node["Resources"]]
    slots = sum(found.get(ACTOR, 0.0) for found in offers.values())
    if not learners and not slots:
        return {}
    if learners and LEARNER not in offers.get(here, {}):
        raise ClusterError(
            f"this process is on a node without the Ray resource {LEARNER!r}, which "
            f"{', '.join(sorted(learners))} has: submit with ray job submit "
            f"--entrypoint-resources '{{\"{LEARNER}\": 1}}', or start it on that node"
        )
    if slots < actors:
        log.warning(
            "actors_without_room wanted=%d offered=%d: the others wait until a node joins with "
            "ray start --resources '{\"%s\": N}'",
            actors,
            slots,
            ACTOR,
        )
    return {ACTOR: 1.0}


def _start_private(cpus: int, sentinel: Sentinel) -> None:
    # Ray's sockets lie below this folder and their paths are limited to 107 characters.
    temp = Path(tempfile.mkdtemp(prefix=TEMP_PREFIX, dir=_short_temp()))
    sentinel.owns(temp)
    _set_environment({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}, True)
    import ray

    try:
        ray.init(
            address="local",
            num_cpus=cpus,
            include_dashboard=False,
            object_store_memory=_object_store_bytes(),
            namespace="dreamfleet",
            log_to_driver=False,
            logging_level=logging.ERROR,
            _node_ip_address="127.0.0.1",
            _temp_dir=str(temp),
            _system_config={"enable_metrics_collection": False},
        )
    except Exception as error:
        # Ray raises plain Exception where its own processes do not start in time.
        raise ClusterError(
            f"a local Ray could not be started: {error}; `dreamfleet doctor` checks what it needs, "
            "and its logs were in the folder named above"
        ) from error
    log.info("ray_started temp=%s cpus=%d", temp, cpus)


def _join(address: str) -> None:
    if address != "auto":
        require_listener(address)
    _set_environment({"RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE", "disabled")}, False)
    import ray

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


def require_listener(address: str) -> None:
    """Raise ClusterError if nothing listens there: Ray itself would try for many minutes.

    Blocks for at most 5 s.
    """
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), LISTENER_TIMEOUT_S).close()
    except (OSError, ValueError) as error:
        raise ClusterError(
            f"nothing answers at --ray {address}: {error}; give host:port of the head node's GCS "
            "(`ray start` prints it), auto on a machine of the cluster, or leave --ray out"
        ) from error


def _set_environment(authentication: dict[str, str], loopback: bool) -> None:
    """Set what Ray and its processes read; also where Ray was imported, and has read it, before.

    Args:
        authentication: the mode, and the token if there is one.
        loopback: whether everything listens on 127.0.0.1. Ray takes a loopback address of a node
            for a mistake, and replaces it, unless clusters are switched off altogether. Then
            this Ray is private, too, and its GCS may be away for long.
    """
    imported = "ray" in sys.modules
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # Actors without a GPU must not hide the learner's devices, nor warn that they do not.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray's own choice is 15: beside a learner on the same cores actors would hardly ever run.
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.update(authentication)
    os.environ[_CLUSTERS] = "0" if loopback else "1"
    if loopback:
        os.environ[_GCS_AWAY] = str(GCS_AWAY_S)
    if imported:
        constants: Any = importlib.import_module("ray._private.ray_constants")
        constants.ENABLE_RAY_CLUSTER = not loopback
        raylet: Any = importlib.import_module("ray._raylet")
        raylet.Config.initialize("")
        raylet.AuthenticationTokenLoader.instance().reset_cache()


def _object_store_bytes() -> int:
    """Return what a private Ray may keep in shared memory: not more than half of what is free."""
    try:
        shared = os.statvfs("/dev/shm")
    except OSError:
        return LEAST_STORE_BYTES
    return max(min(OBJECT_STORE_BYTES, shared.f_bavail * shared.f_frsize // 2), LEAST_STORE_BYTES)


def _short_temp() -> str | None:
    """Return a folder with a short path for temporary files, None for the default."""
    default = tempfile.gettempdir()
    return "/tmp" if len(default) > 20 and Path("/tmp").is_dir() else None
