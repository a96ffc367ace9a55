"""Publish the policy's weights while the learner goes on."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dreamer.agent import Agent
from dreamer.weights import PackedWeights, Version, pack

log = logging.getLogger(__name__)

Send = Callable[[PackedWeights], bool]
"""Deliver weights to the hub; blocks until it answers whether it took them."""


@dataclass
class PublishStats:
    """What publishing has done so far."""

    published: int = 0
    rejected: int = 0
    failed: Version | None = None
    """Weights whose delivery ended in an error, until the next attempt: they may have arrived."""
    seconds: float = 0.0
    size_bytes: int = 0
    version: Version = (0, -1)
    published_at: float = 0.0
    """Monotonic time in seconds at which the last accepted weights were taken from the agent."""


class Publisher:
    """Send weights to the hub from a thread of its own.

    1. The learner waits only for a copy of the policy's tensors, on their device.
    2. One publication is under way at a time; while it is, ``publish`` does nothing and says so.
    3. Versions (fence, update) never go back. A refusal or a failure is logged and counted, and
       training goes on: actors keep the weights they have.
    """

    def __init__(
        self, agent: Agent, send: Send, *, fence: int, config_hash: str, dtype: torch.dtype
    ) -> None:
        self.stats = PublishStats()
        self._agent, self._send = agent, send
        self._fence, self._config_hash, self._dtype = fence, config_hash, dtype
        self._thread: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        """Whether a publication is under way."""
        return self._thread is not None and self._thread.is_alive()

    def publish(self, update: int) -> bool:
        """Start to publish the agent's weights as they are now. Returns False while busy."""
        if self.busy:
            return False
        tensors = {k: v.detach().clone() for k, v in self._agent.policy_tensors().items()}
        ready = _mark(tensors)
        self._thread = threading.Thread(
            target=self._deliver,
            args=(tensors, ready, update, time.monotonic()),
            name="publish",
            daemon=True,
        )
        self._thread.start()
        return True

    def wait(self, timeout_s: float) -> bool:
        """Wait until nothing is under way. Returns False if that takes longer than the timeout."""
        if self._thread is not None:
            self._thread.join(timeout_s)
        return not self.busy

    def _deliver(
        self, tensors: dict[str, Tensor], ready: Any, update: int, taken_at: float
    ) -> None:
        begin, version = time.monotonic(), (self._fence, update)
        doubtful, self.stats.failed = self.stats.failed == version, None
        try:
            weights = _pack_aside(
                tensors, ready, (self._fence, update), self._config_hash, self._dtype
            )
            accepted = self._send(weights)
        except Exception as error:
            # Whatever transport the hub stands behind: an outage must not end the training.
            log.warning("weights_not_published update=%d error=%r", update, error)
            self.stats.rejected += 1
            self.stats.failed = version
            return
        self.stats.seconds = time.monotonic() - begin
        self.stats.size_bytes = weights.buffer.nbytes
        if not accepted and not doubtful:
            log.warning("weights_refused fence=%d update=%d", *version)
            self.stats.rejected += 1
            return
        self.stats.published += 1
        self.stats.version, self.stats.published_at = weights.version, taken_at


def _mark(tensors: dict[str, Tensor]) -> Any:
    """Return a CUDA event behind the copies, or None on the CPU."""
    if not any(tensor.is_cuda for tensor in tensors.values()):
        return None
    event = torch.cuda.Event()
    event.record()
    return event


def _pack_aside(
    tensors: dict[str, Tensor], ready: Any, version: Version, config_hash: str, dtype: torch.dtype
) -> PackedWeights:
    """Pack on a stream of its own, so that the transfer does not queue behind updates."""
    if ready is None:
        return pack(tensors, version, config_hash, dtype)
    stream = torch.cuda.Stream()
    stream.wait_event(ready)
    with torch.cuda.stream(stream):
        return pack(tensors, version, config_hash, dtype)
