"""What other threads want done in the learner's, between two updates."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

Result = TypeVar("Result")


class Errands:
    """Functions that wait for their thread.

    Guarantees:
        1. Each runs in the thread of `run`, once and in order, or not at all if it was cancelled.
        2. After `close` whatever waits, or comes later, is cancelled: nobody waits for ever.
    """

    def __init__(self) -> None:
        self._waiting: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._closed = False
        self._lock = threading.Lock()

    def ask(self, errand: Callable[[], Result]) -> Future[Result]:
        """Have a function run soon; its result, or what it raises, is that of the future."""
        answer: Future[Result] = Future()
        with self._lock:
            if self._closed:
                answer.cancel()
            else:
                self._waiting.append((errand, answer))
        return answer

    def run(self) -> None:
        """Run everything that waits. Raises nothing."""
        while self._waiting:
            errand, answer = self._waiting.popleft()
            if not answer.set_running_or_notify_cancel():
                continue
            try:
                answer.set_result(errand())
            except Exception as error:
                # Whoever asked gets it.
                answer.set_exception(error)

    def close(self) -> None:
        """Cancel what waits, and whatever comes later."""
        with self._lock:
            self._closed = True
            while self._waiting:
                self._waiting.popleft()[1].cancel()
