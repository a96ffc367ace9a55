"""WeightHub: where the learner leaves policy weights and actors wait for newer ones."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from dreamer.weights import PackedWeights, Version, WeightsError, unpack

log = logging.getLogger(__name__)

FILE_NAME = "weights.bin"
NEVER: Version = (-1, -1)
_LENGTH_BYTES = 8


class WeightHub:
    """Keep the newest weights and hand them to whoever waits for them. An async Ray actor.

    Guarantees:
        1. Versions are ordered by (fence, update) and only go up: whatever is not newer than what
           the hub has is refused, so a learner that was replaced cannot bring its weights back.
        2. The hub owns the shared-memory object, which outlives the learner that sent it.
        3. The newest weights are on the disk (if a directory is given) before `publish` answers,
           as a complete file or not at all; a hub that starts again offers them.

    Args:
        directory: folder for the newest weights; None keeps them in memory only.
        keep: versions whose objects are kept, so that slow readers can finish.
        idle_s: end this Ray actor when nobody has called for so many seconds; None never does.
            Actors that live call all the time.
    """

    def __init__(
        self, directory: str | None = None, keep: int = 2, idle_s: float | None = None
    ) -> None:
        self._path = Path(directory) / FILE_NAME if directory else None
        self._version = NEVER
        self._kept: deque[Any] = deque(maxlen=keep)
        self._changed = asyncio.Condition()
        self._storing = asyncio.Lock()
        self._counts = {"published": 0, "rejected": 0}
        self._called_at = time.monotonic()
        if self._path is not None:
            self._restore(self._path)
        if idle_s is not None:
            threading.Thread(target=self._watch, args=(idle_s,), name="idle", daemon=True).start()

    async def publish(
        self, fence: int, update: int, buffer: NDArray[np.uint8], manifest: dict[str, Any]
    ) -> bool:
        """Offer weights; answers whether they were taken.

        Args:
            fence: lineage of the learner; a restarted learner has a higher one.
            update: how many updates these weights have seen.
            buffer: (bytes,) uint8, all tensors.
            manifest: describes the buffer; its version must be (fence, update).

        Raises:
            ValueError: if the manifest belongs to other weights.
        """
        self._called_at = time.monotonic()
        if tuple(manifest["version"]) != (fence, update):
            raise ValueError(
                f"weights are offered as {(fence, update)}, but their manifest says "
                f"{manifest['version']}; pack and publish them with the same version"
            )
        async with self._storing:
            if (fence, update) <= self._version:
                self._counts["rejected"] += 1
                log.warning(
                    "weights_rejected offered=%s current=%s", (fence, update), self._version
                )
                return False
            weights = PackedWeights(buffer=buffer, manifest=manifest)
            if self._path is not None:
                await asyncio.to_thread(write_weights, self._path, weights)
            self._offer(weights)
        async with self._changed:
            self._changed.notify_all()
        return True

    async def wait_newer(self, version: Version, timeout_s: float) -> list[Any] | None:
        """Wait for weights above `version`; [reference to them], or None after the timeout."""
        self._called_at = time.monotonic()
        wanted = (version[0], version[1])
        try:
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait_for(lambda: self._version > wanted)
        except TimeoutError:
            return None
        # Inside a list the reference reaches the caller as it is, and not as the object.
        return [self._kept[-1]]

    async def latest(self) -> list[Any] | None:
        """Return [reference to the newest weights], None before the first ones."""
        return [self._kept[-1]] if self._kept else None

    async def stats(self) -> dict[str, Any]:
        """Return version [fence, update], numbers of accepted and refused offers, process id."""
        return {"version": list(self._version), **self._counts, "pid": os.getpid()}

    def _watch(self, idle_s: float) -> None:
        # Only time ends this wait: a hub that is stopped is killed, and this thread with it.
        while time.monotonic() - self._called_at < idle_s:
            time.sleep(min(1.0, idle_s / 4))
        log.error("hub_orphaned nobody has asked for %.0f s: the hub ends", idle_s)
        ray.kill(ray.get_runtime_context().current_actor, no_restart=True)

    def _offer(self, weights: PackedWeights) -> None:
        self._kept.append(ray.put((weights.buffer, weights.manifest)))
        self._version = weights.version
        self._counts["published"] += 1

    def _restore(self, path: Path) -> None:
        try:
            weights = read_weights(path)
        except FileNotFoundError:
            return
        except (OSError, WeightsError) as error:
            log.warning("weights_not_restored path=%s error=%s", path, error)
            return
        self._offer(weights)
        log.info("weights_restored version=%s", weights.version)


def start_hub(directory: Path | None = None, resources: Mapping[str, float] | None = None) -> Any:
    """Start a hub on this Ray cluster and return its handle; Ray restarts it if it dies.

    Args:
        directory: folder for the newest weights; None keeps them in memory only.
        resources: what the node must offer, so that the folder is there.
    """
    return (
        ray.remote(WeightHub)
        .options(
            num_cpus=0,
            resources=dict(resources or {}),
            max_restarts=-1,
            max_concurrency=10_000,
        )
        .remote(str(directory) if directory else None)
    )


def sender(hub: Any, timeout_s: float = 60.0) -> Callable[[PackedWeights], bool]:
    """Return a function that delivers weights to the hub and blocks until it has answered.

    The function raises Ray's errors (RayActorError, GetTimeoutError) if the hub is not there.
    """

    def send(weights: PackedWeights) -> bool:
        fence, update = weights.version
        answer = hub.publish.remote(fence, update, weights.buffer, weights.manifest)
        return bool(ray.get(answer, timeout=timeout_s))

    return send


def write_weights(path: Path, weights: PackedWeights) -> None:
    """Write weights to a file that is complete or not there at all. Blocks until it is on disk."""
    header = json.dumps(weights.manifest).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    with draft.open("wb") as file:
        file.write(len(header).to_bytes(_LENGTH_BYTES, "little"))
        file.write(header)
        file.write(np.ascontiguousarray(weights.buffer).data)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def read_weights(path: Path) -> PackedWeights:
    """Read and verify a file of `write_weights`.

    Raises:
        FileNotFoundError: if there is none.
        WeightsError: if it is damaged.
    """
    data = path.read_bytes()
    start = _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "little")
    try:
        manifest = json.loads(data[_LENGTH_BYTES:start])
        weights = PackedWeights(buffer=np.frombuffer(data[start:], np.uint8), manifest=manifest)
        unpack(weights)
    except WeightsError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{path.name} is damaged: {error!r}; it is ignored") from error
    return weights
