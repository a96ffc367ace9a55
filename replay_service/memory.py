"""How much memory a configuration will need, known before anything is started."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from replay_service.chunk import max_blob_bytes
from replay_service.config import Limits, ReplayConfig
from replay_service.errors import ReplayConfigError
from replay_service.pages import page_count
from replay_service.schema import Schema
from replay_service.sumtree import tree_bytes

if TYPE_CHECKING:
    from replay_service.client import ReplayClient

log = logging.getLogger(__name__)

_MIB = 1024**2
_CHUNK_OVERHEAD_BYTES = 1536
_NOTE_BYTES = 512
QUEUE_BYTES = 64 * _MIB
"""Decoded chunks that may wait for the learner."""


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Upper bounds in bytes, for data that does not compress."""

    step_bytes: int
    """One step, all columns."""
    redis_bytes: int
    """Servers on this machine: their memory limit, or less if the capacity is smaller."""
    mirror_bytes: int
    """The learner's decoded copy, wherever it is placed."""
    queue_bytes: int
    """Decoded chunks on their way into it (always RAM)."""
    resend_bytes: int
    """Resend rings and chunks being filled, over all streams."""
    sampling_bytes: int
    """Sums by priority and within episodes, and what is noted of each chunk (always RAM)."""
    retained_steps: int
    """Steps that the server can hold if nothing compresses; bounds what a restart brings back."""
    notes: tuple[str, ...] = ()
    """What the user should know although it is no error."""

    def check(self, available: Mapping[str, int], placement: str = "ram") -> None:
        """Refuse a plan that does not fit.

        Args:
            available: free bytes of ``ram`` and, if used, ``cuda`` or ``disk``.
            placement: where the mirror goes: ``cuda``, ``ram`` or ``disk``.

        Raises:
            ReplayConfigError: showing the arithmetic.
        """
        parts = {
            "server": self.redis_bytes,
            "queue": self.queue_bytes,
            "writers": self.resend_bytes,
            "sampling": self.sampling_bytes,
        }
        if placement == "ram":
            parts["mirror"] = self.mirror_bytes
        elif self.mirror_bytes > available.get(placement, 0):
            raise ReplayConfigError(
                f"the mirror needs {_mib(self.mirror_bytes)} in {placement}, which has "
                f"{_mib(available.get(placement, 0))} free; lower capacity_steps or change "
                "placement"
            )
        need = sum(parts.values())
        if need > available["ram"]:
            terms = " + ".join(f"{name} {_mib(size)}" for name, size in parts.items())
            raise ReplayConfigError(
                f"replay needs {terms} = {_mib(need)} of RAM, {_mib(available['ram'])} are free "
                f"({self.step_bytes} bytes a step); lower capacity_steps or redis_memory_bytes, or "
                "set placement to disk"
            )

    def describe(self) -> str:
        """Return the plan in one line."""
        return (
            f"server {_mib(self.redis_bytes)}, mirror {_mib(self.mirror_bytes)}, queue "
            f"{_mib(self.queue_bytes)}, writers {_mib(self.resend_bytes)}, "
            f"sampling {_mib(self.sampling_bytes)} ({self.step_bytes} bytes a step)"
        )


def estimate_memory(
    schema: Schema, config: ReplayConfig, *, streams: int, writers: int = 1, servers: int = 1
) -> MemoryPlan:
    """Estimate the memory of server, mirror, sampling and writers.

    Args:
        schema, config: the replay.
        streams: environments that write at the same time.
        writers: processes that they are spread over.
        servers: on this machine; each takes its limit.
    """
    chunk_bytes = max_blob_bytes(schema, config.chunk_steps) + _CHUNK_OVERHEAD_BYTES
    chunks = -(-config.capacity_steps // config.chunk_steps)
    retained = min(config.capacity_steps, config.log_bytes // chunk_bytes * config.chunk_steps)
    notes = []
    if retained < config.capacity_steps:
        notes.append(
            f"if nothing compresses the server retains {retained} of {config.capacity_steps} "
            "steps; a restarted learner then starts with those only"
        )
    rows = page_count(config.capacity_steps, config.page_steps) * config.page_steps
    rings = min(streams * config.resend_chunks * chunk_bytes, writers * config.resend_bytes)
    trees = (config.sampling.windows == "episodes") + (config.sampling.prioritised > 0)
    return MemoryPlan(
        step_bytes=schema.step_bytes,
        redis_bytes=servers * min(config.redis_memory_bytes, chunks * chunk_bytes * 4 // 3),
        mirror_bytes=rows * schema.step_bytes,
        queue_bytes=QUEUE_BYTES,
        resend_bytes=rings + streams * (2 * config.pending_chunks + 1) * chunk_bytes,
        sampling_bytes=trees * tree_bytes(rows) + chunks * _NOTE_BYTES,
        retained_steps=retained,
        notes=tuple(notes),
    )


def fit_to_server(client: ReplayClient, schema: Schema, limits: Limits) -> Limits:
    """Return the limits of a replay as a server can keep them.

    Where its memory limit is lower than the configuration says, the oldest chunks go earlier: else
    it would refuse inserts before they do, and writers wait for ever.

    Args:
        client: with the rights of a learner.
        schema, limits: of the replay that the server is to hold.

    Raises:
        ReplayConfigError: it would drop chunks by itself, or cannot hold the minimum size.
        ReplayError: it cannot be used, or its version is too old.
    """
    client.check()
    limit = client.memory()[1]
    require_no_eviction(client.address, limit, client.memory_policy())
    room = limit * 3 // 4
    if not limit or limits.capacity_bytes <= room:
        return limits
    steps, chunk_bytes = limits.max_chunk_steps, max_blob_bytes(schema, limits.max_chunk_steps)
    need = chunk_bytes * (limits.min_size_steps // steps + 2)
    if room < need:
        raise ReplayConfigError(
            f"three quarters of the maxmemory of the server at {client.address} = {room} bytes "
            f"cannot hold the minimum of {limits.min_size_steps} steps, which may take {need} "
            f"bytes ({schema.step_bytes} a step); raise maxmemory to {need * 4 // 3 + 1} or more"
        )
    held = -(-limits.capacity_steps // steps) * chunk_bytes
    if room < held:
        log.warning(
            "replay_log_bounded address=%s maxmemory=%d: if nothing compresses, its three quarters "
            "retain %d of %d steps, and a restarted learner starts with those only; raise it, or "
            "set --replay.redis-memory-bytes to it",
            client.address,
            limit,
            room // chunk_bytes * steps,
            limits.capacity_steps,
        )
    return replace(limits, capacity_bytes=room)


def require_no_eviction(address: str, limit_bytes: int, policy: str) -> None:
    """Refuse a server that would drop chunks by itself.

    Args:
        address: of the server, as it may be shown.
        limit_bytes: its maxmemory, 0 for none.
        policy: its maxmemory-policy.

    Raises:
        ReplayConfigError: it would.
    """
    if limit_bytes and policy != "noeviction":
        raise ReplayConfigError(
            f"the server at {address} would drop chunks by itself: its maxmemory-policy is "
            f"{policy}, expected noeviction; set that in its configuration, and now with "
            "`CONFIG SET maxmemory-policy noeviction`"
        )


def available_ram_bytes() -> int:
    """Return the RAM that can be used now, within the limits of a container."""
    free = [_meminfo("MemAvailable")]
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        root = Path("/sys/fs/cgroup")
        try:
            free.append(int((root / limit).read_text()) - int((root / used).read_text()))
        except (OSError, ValueError):
            # No such cgroup version, or "max": then this is no limit.
            continue
    return max(min(free), 0)


def _meminfo(key: str) -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise ReplayConfigError(f"/proc/meminfo has no {key}: memory cannot be estimated here")


def _mib(size: int) -> str:
    return f"{size / _MIB:.0f} MiB"
