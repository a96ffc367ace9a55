"""A proxy between a client and a server that hurts what passes through it."""

from __future__ import annotations

import random
import socket
import threading
from collections import Counter
from pathlib import Path
from typing import Literal

Mode = Literal["pass", "refuse", "silence"]

ON_REQUEST = ("reset", "half", "delay")
ON_REPLY = ("lose", "cut", "delay")
_LONGEST_DELAY_S = 0.02


class FaultProxy:
    """Forwards a unix socket to a server, and injects faults into a share of the messages.

    ==========  =================================================================
        fault   what happens
    ==========  =================================================================
    reset       the connection breaks before the request reaches the server
    half        half of the request reaches the server, then the connection breaks
    lose        the server has done what was asked, the reply is lost
    cut         half of the reply arrives, then the connection breaks
    delay       the message is late by up to 20 ms
    ==========  =================================================================

    Args:
        path: of the socket to listen at.
        target_url: ``unix://`` address of the server; `target` may be changed at any time.
        seed: of the random choices.

    Attributes:
        rate: share of messages that are hurt, 0 to 1.
        kinds: the faults to choose from.
        mode: ``pass``; ``refuse`` breaks every connection; ``silence`` swallows everything and
            breaks nothing, as a cut cable does.
        injected: faults so far, by name.
    """

    def __init__(self, path: Path, target_url: str, *, seed: int = 0) -> None:
        self.target = target_url.removeprefix("unix://")
        self.rate = 0.0
        self.kinds = frozenset(ON_REQUEST + ON_REPLY)
        self.mode: Mode = "pass"
        self.injected: Counter[str] = Counter()
        self.url = f"unix://{path}"
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(64)
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def close(self) -> None:
        """Close the listener and every connection."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._accepting.join(5)
        self.break_all()

    def refuse(self) -> None:
        """Break every connection and refuse new ones until `heal`."""
        self.mode = "refuse"
        self.break_all()

    def silence(self) -> None:
        """Swallow everything until `heal`; nobody is told."""
        self.mode = "silence"

    def heal(self) -> None:
        """Let everything pass again, over new connections where bytes were swallowed."""
        broken, self.mode = self.mode != "pass", "pass"
        if broken:
            self.break_all()

    def break_all(self) -> None:
        """Break the connections that are open now."""
        with self._lock:
            connections = list(self._open)
        for connection in connections:
            _hang_up(connection)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.socket(socket.AF_UNIX)
            try:
                if self.mode == "refuse":
                    raise ConnectionRefusedError
                server.connect(self.target)
            except OSError:
                server.close()
                client.close()
                continue
            with self._lock:
                self._open |= {client, server}
            for source, sink, kinds in ((client, server, ON_REQUEST), (server, client, ON_REPLY)):
                threading.Thread(target=self._pump, args=(source, sink, kinds), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, kinds: tuple[str, ...]) -> None:
        try:
            while data := source.recv(65536):
                if self.mode == "silence":
                    continue
                fault = self._fault(kinds)
                if fault == "delay":
                    threading.Event().wait(self._random.uniform(0.001, _LONGEST_DELAY_S))
                elif fault:
                    if fault in ("half", "cut"):
                        sink.sendall(data[: len(data) // 2])
                    break
                sink.sendall(data)
        except OSError:
            pass  # either side, or `break_all`, has ended the connection
        finally:
            with self._lock:
                self._open -= {source, sink}
            _hang_up(source)
            _hang_up(sink)

    def _fault(self, kinds: tuple[str, ...]) -> str:
        with self._lock:
            if self._random.random() >= self.rate:
                return ""
            possible = [kind for kind in kinds if kind in self.kinds]
            if not possible:
                return ""
            fault = self._random.choice(possible)
            self.injected[fault] += 1
            return fault


def _hang_up(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # the other side was first
    connection.close()
