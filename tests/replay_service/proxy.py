"""A proxy between a client and a server that loses replies on purpose."""

from __future__ import annotations

import socket
import threading
from pathlib import Path


class LossyProxy:
    """Forwards a unix socket and, every n-th reply, breaks the connection instead of replying."""

    def __init__(self, directory: Path, server_url: str, lose_every: int) -> None:
        self._target = server_url.removeprefix("unix://")
        self._lose_every = lose_every
        self._replies = 0
        self.lost = 0
        self._lock = threading.Lock()
        self._listener = socket.socket(socket.AF_UNIX)
        self._path = directory / "proxy.sock"
        self._listener.bind(str(self._path))
        self._listener.listen()
        self._open: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    @property
    def url(self) -> str:
        """Address to give to a client."""
        return f"unix://{self._path}"

    def close(self) -> None:
        """Close the listener and every connection, and end all threads."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in self._open:
            _hang_up(connection)
        for thread in self._threads:
            thread.join(5)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.socket(socket.AF_UNIX)
            server.connect(self._target)
            self._open += [client, server]
            for source, sink, lossy in ((client, server, False), (server, client, True)):
                pump = threading.Thread(target=self._pump, args=(source, sink, lossy), daemon=True)
                self._threads.append(pump)
                pump.start()

    def _pump(self, source: socket.socket, sink: socket.socket, lossy: bool) -> None:
        try:
            while data := source.recv(65536):
                if lossy and self._lose():
                    break
                sink.sendall(data)
        except OSError:
            pass
        _hang_up(source)
        _hang_up(sink)

    def _lose(self) -> bool:
        with self._lock:
            self._replies += 1
            lose = self._replies % self._lose_every == 0
            self.lost += lose
            return lose


def _hang_up(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
    connection.close()
