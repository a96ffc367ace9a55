"""Not running ahead of a device that works asynchronously."""

from __future__ import annotations

from collections import deque

import torch


class Throttle:
    """Keep the host at most a few updates ahead of a device that works asynchronously.

    Without it the host would queue updates for as long as the limiter allows, and then seem to
    wait for the environments while the device is the limit. Nothing to do on the CPU.
    """

    def __init__(self, device: torch.device, ahead: int = 2) -> None:
        self._enabled, self._ahead = device.type == "cuda", ahead
        self._events: deque[torch.cuda.Event] = deque()

    def submitted(self) -> None:
        """Note one more update, and block while too many are unfinished."""
        if not self._enabled:
            return
        event = torch.cuda.Event(blocking=True)
        event.record()
        self._events.append(event)
        if len(self._events) > self._ahead:
            self._events.popleft().synchronize()
