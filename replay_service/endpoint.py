"""One small HTTP server per process: its metrics, and pages such as /healthz."""

from __future__ import annotations

import hmac
import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app

from replay_service.errors import ReplayConfigError
from replay_service.ports import cannot_listen
from replay_service.security import is_loopback, read_password

log = logging.getLogger(__name__)

REQUEST_S = 10.0
"""Seconds for which a client may stay silent."""
_PLAIN = [("Content-Type", "text/plain; charset=utf-8")]

Answer = tuple[int, str, str]
"""Status, media type and text."""
_REASONS = {200: "OK", 503: "Service Unavailable"}


class MetricsEndpoint:
    """Serves /metrics and further pages over HTTP from threads of its own.

    Guarantees:
        1. Beyond loopback there is a token, and whoever does not send it as ``Authorization:
           Bearer …`` gets 401 from every page but those in `open_pages`.
        2. No page and no log line contains the token.
        3. A client that stalls holds up nobody, and is cut off after 10 s.

    Args:
        registry: what /metrics shows.
        host: address to listen on.
        port: 0 takes a free one, see `port`.
        token_file: file whose first line is the token, readable by its owner alone.
        pages: path to what answers it; called from the thread of the request.
        open_pages: paths that need no token: health checks cannot send one.
        flag: that the user sets the address or the port with, for messages.

    Raises:
        ReplayConfigError: it would listen beyond loopback without a token, the file cannot be
            used, the port is taken, or the address is not of this machine.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        token_file: Path | None = None,
        pages: Mapping[str, Callable[[], Answer]] | None = None,
        open_pages: Iterable[str] = (),
        flag: str = "the metrics",
    ) -> None:
        if token_file is None and not is_loopback(host):
            raise ReplayConfigError(
                f"metrics at {host} would be open to anybody on the network: give a file with a "
                "token that readers must send (its name ends in token-file), or listen at 127.0.0.1"
            )
        self._token = read_password(token_file).encode() if token_file else b""
        self._metrics: Any = make_wsgi_app(registry)
        self._pages, self._open = dict(pages or {}), frozenset(open_pages)
        try:
            self._server = _Server((host, port), _Handler)
        except OSError as error:
            # Checked at the start of a run, a port can still be taken before this.
            raise cannot_listen(error, host, port, flag) from error
        self._server.set_app(self._answer)
        self.port = int(self._server.server_port)
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.1,), name="metrics", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stop serving. Blocks until the thread has ended, about a tenth of a second."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5.0)

    def _answer(self, environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        if path not in self._open and not self._admitted(environ):
            start("401 Unauthorized", [*_PLAIN, ("WWW-Authenticate", "Bearer")])
            return [b"send the token of this endpoint: Authorization: Bearer ...\n"]
        if path == "/metrics":
            shown: Iterable[bytes] = self._metrics(environ, start)
            return shown
        if path not in self._pages:
            start("404 Not Found", _PLAIN)
            known = ", ".join(["/metrics", *self._pages])
            return [f"there is no such page; there are {known}\n".encode()]
        status, kind, text = self._pages[path]()
        start(f"{status} {_REASONS[status]}", [("Content-Type", kind)])
        return [text.encode()]

    def _admitted(self, environ: dict[str, Any]) -> bool:
        if not self._token:
            return True
        kind, _, given = environ.get("HTTP_AUTHORIZATION", "").partition(" ")
        return kind.lower() == "bearer" and hmac.compare_digest(given.encode(), self._token)


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Handler(WSGIRequestHandler):
    timeout = REQUEST_S

    def address_string(self) -> str:
        """Return who asks, without asking a name server."""
        return str(self.client_address[0])

    def log_message(self, format: str, *args: Any) -> None:
        """Requests come every few seconds; they are worth no line each."""
        log.debug("http %s", format % args)
