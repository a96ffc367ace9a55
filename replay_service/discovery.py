"""Where metrics are: processes say so on the replay server, Prometheus asks for the list."""

from __future__ import annotations

import json
import logging
import socket
import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from replay_service.client import ReplayClient
from replay_service.errors import ReplayError
from replay_service.security import is_loopback

log = logging.getLogger(__name__)

LIVE_S = 15.0
"""Seconds after which a process that says nothing any more is forgotten."""
BEAT_S = 5.0
ANY_HOST = ("0.0.0.0", "::", "")


@dataclass(frozen=True, kw_only=True)
class Target:
    """One address that serves metrics."""

    address: str
    """host:port as Prometheus reaches it."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """What Prometheus attaches to all that it reads there."""

    def to_json(self) -> dict[str, Any]:
        """Return it as Prometheus's HTTP service discovery wants it."""
        return {"targets": [self.address], "labels": dict(self.labels)}


class Registration:
    """Keeps a process in the list of those with metrics, until it is closed or dies.

    A thread repeats the entry every 5 s; the server's clock decides when one is 15 s old and
    forgotten. A server that does not answer is tried again, and never holds up the process.

    Args:
        client: of the replay server, as a role that may register (actor, learner or admin). Its
            calls are made from the thread.
        target: what to enter.
        live_s: seconds after which it is forgotten.
        beat_s: seconds between two entries.
    """

    def __init__(
        self,
        client: ReplayClient,
        target: Target,
        *,
        live_s: float = LIVE_S,
        beat_s: float = BEAT_S,
    ) -> None:
        assert beat_s < live_s, (beat_s, live_s)
        self._client, self._target = client, target
        self._live_s, self._beat_s = live_s, beat_s
        self._name = uuid.uuid4().hex
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="registration", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Take the process out of the list. Blocks for at most two calls to the server."""
        self._done.set()
        self._thread.join(2 * self._client.timeout_s)

    def __enter__(self) -> Registration:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _beat(self) -> None:
        failing = False
        while not self._done.is_set():
            failing = self._enter(self._live_s, failing)
            self._done.wait(self._beat_s)
        self._enter(0.0, failing)

    def _enter(self, live_s: float, failing: bool) -> bool:
        try:
            register(self._client, self._name, self._target, live_s)
            return False
        except ReplayError as error:
            level = logging.DEBUG if failing else logging.WARNING
            log.log(level, "metrics_not_registered address=%s: %s", self._target.address, error)
            return True


def register(client: ReplayClient, name: str, target: Target, live_s: float) -> None:
    """Enter a process for `live_s` seconds from now, or take it out at 0.

    Raises:
        ReplayError: the server cannot be used, or the role may not.
    """
    client.register(name, round(live_s * 1000), json.dumps(target.to_json()))


def live_targets(client: ReplayClient) -> list[Target]:
    """Return all that are live now, by address. Raises ReplayError."""
    found = [json.loads(text) for text in client.endpoints()]
    targets = [Target(address=one["targets"][0], labels=one["labels"]) for one in found]
    return sorted(targets, key=lambda target: target.address)


@contextmanager
def listed(
    client: ReplayClient,
    port: int,
    *,
    listen: str,
    host: str | None = None,
    node: str = "",
    labels: Mapping[str, str],
) -> Iterator[None]:
    """Have what serves metrics at a port of this process in the list, for as long as the block.

    What listens on loopback is left out where the replay server is another machine: whoever reads
    the list there would ask itself.

    Args:
        client, labels: see `Registration` and `Target`.
        port, listen: at which it serves.
        host: name or address at which others reach this machine; it is believed.
        node: address of this machine, if it listens everywhere; see `reached_at`.
    """
    if host is None and is_loopback(listen) and not _is_here(client.url):
        yield
        return
    address = reached_at(host or listen, port, client.url, node)
    with Registration(client, Target(address=address, labels=labels)):
        yield


def _is_here(url: str) -> bool:
    server = urlsplit(url).hostname
    return not server or is_loopback(server)


def reached_at(host: str, port: int, url: str, node: str = "") -> str:
    """Return host:port at which others reach what listens on `host`.

    Where that is every network of this machine, it is `node`, else the address that this machine
    has towards the replay server at `url`, or its name if the server is on this machine.
    """
    if host in ANY_HOST:
        host = node or _own_address(urlsplit(url).hostname or "") or socket.gethostname()
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _own_address(server: str) -> str:
    """Return the address of this machine on the way to a server, or nothing."""
    if not server or is_loopback(server):
        return ""
    try:
        family, kind, _, _, place = socket.getaddrinfo(server, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            # Sends nothing; only chooses the way.
            probe.connect(place)
            return str(probe.getsockname()[0])
    except OSError as error:
        log.debug("own_address_unknown server=%s error=%s", server, error)
        return ""
