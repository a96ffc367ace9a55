"""Signals that ask a run to end: first to save and stop, then to stop at once."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

AGAIN_S = 0.1
"""Wait until a signal that came in the middle of an import is tried again."""


class Interrupted(KeyboardInterrupt):
    """A signal ended the run before it could end by itself."""


class Interrupts:
    """Turn signals into an orderly end.

    1. Before training there is nothing to save: a signal raises `Interrupted` in the main thread,
       once no module is half imported; at the latest where training would begin.
    2. Inside ``graceful`` the first signal calls the given function, and the second one raises.
    3. While things are taken down (``closing``) signals change nothing: that is bounded in time.
    4. Leaving the block ends the exception; ``exit_code`` tells what happened.

    Use it in the main thread.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._stop: Callable[[], None] | None = None
        self._closing = False
        self._before: dict[signal.Signals, Any] = {}
        self._again: threading.Timer | None = None

    def __enter__(self) -> Interrupts:
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        if self._again is not None:
            self._again.cancel()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if isinstance(error, SystemExit) and error.code == signal.SIGTERM:
            # Ray's handler, in force for a moment while Ray starts.
            self.received = signal.SIGTERM
            return True
        return isinstance(error, Interrupted)

    @contextmanager
    def graceful(self, stop: Callable[[], None]) -> Iterator[None]:
        """Call ``stop`` at the first signal inside the block; close when the block ends.

        Raises:
            Interrupted: a signal came before, and what it raised was lost in a library.
        """
        if self.received is not None:
            self._closing = True
            raise Interrupted(f"stopped by {self.received.name}")
        self._stop = stop
        try:
            yield
        finally:
            self._closing = True

    def reinstall(self) -> None:
        """Take the signals back from a library that has installed handlers of its own."""
        for number in SIGNALS:
            signal.signal(number, self._handle)

    @property
    def exit_code(self) -> int:
        """Exit code by which shells recognise the signal; 0 without one."""
        return 128 + self.received if self.received else 0

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._closing:
            return
        first = self.received is None
        self.received = signal.Signals(number)
        if self._stop is not None and first:
            log.warning("%s: saving and stopping; once more stops at once", self.received.name)
            self._stop()
            return
        if self._stop is None and _importing(frame):
            # Raised there it would leave half a module, or be swallowed: it comes again.
            self._again = threading.Timer(AGAIN_S, os.kill, (os.getpid(), number))
            self._again.daemon = True
            self._again.start()
            return
        self._closing = True
        raise Interrupted(f"stopped by {self.received.name}")


def _importing(frame: FrameType | None) -> bool:
    """Whether the main thread is in the middle of importing something."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
