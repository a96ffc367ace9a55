"""`dreamfleet replay serve`: the process beside a replay server."""

from __future__ import annotations

import logging
import signal
import threading
from contextlib import ExitStack
from pathlib import Path

from prometheus_client import CollectorRegistry

from deploy.config import ConfigError
from deploy.progress import console
from deploy.replaycmd import ReplayServeOptions, address_of
from replay_service import (
    MetricsEndpoint,
    ReplayClient,
    ReplayUnavailable,
    address_for,
    has_password,
)
from replay_service.discovery import Target, reached_at
from replay_service.exporter import ReplayMetrics, ReplayService, ReplayWatch
from replay_service.ports import require_free_port
from replay_service.security import RoleName, password_file

log = logging.getLogger(__name__)

CALL_S = 2.0
"""Deadline of one call to the server: a scrape makes several, and Prometheus waits 5 to 10 s."""


def serve_replay(options: ReplayServeOptions) -> int:
    """Prepare the server, and serve until SIGTERM or SIGINT. Returns 0.

    A server that does not answer yet is waited for: /healthz says so meanwhile.

    Raises:
        ConfigError, ReplayError: the server, the port or the token file cannot be used as they are.
    """
    if has_password(options.url):
        raise ConfigError(
            "the address contains a password, which the process list shows: use --secrets or "
            "--password-file"
        )
    host, port = address_of(options.listen)
    if port:
        require_free_port(host, port, "--listen")
    with ExitStack() as stack:
        watch, keeper = _clients(options)
        for client in filter(None, (watch, keeper)):
            stack.callback(client.close)
        service = ReplayService(watch, keeper)
        try:
            service.prepare()
            for warning in service.warnings():
                log.warning("replay_configuration address=%s: %s", watch.address, warning)
        except ReplayUnavailable as error:
            log.warning("replay_unavailable the health check tries again: %s", error)
        registry = CollectorRegistry()
        registry.register(ReplayMetrics(watch))
        endpoint = MetricsEndpoint(
            registry,
            host=host,
            port=port,
            token_file=options.token_file,
            pages=service.pages(),
            open_pages=("/healthz",),
            flag="--listen",
        )
        stack.callback(endpoint.close)
        address = reached_at(options.host or host, endpoint.port, watch.url)
        service.own = Target(address=address, labels={"role": "replay"})
        stop = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        console().print(
            f"metrics, health and targets of {watch.address} are at http://{address}",
            highlight=False,
            soft_wrap=True,
        )
        stop.wait()
    return 0


def _clients(options: ReplayServeOptions) -> tuple[ReplayWatch, ReplayClient | None]:
    """Return who looks at the server, and who may load functions into it if anybody may."""
    access, url = options.config(), options.url
    if options.secrets is None or options.password_file is not None:
        # Whoever the address names, or nobody in particular.
        found = address_for(url, access, "admin")
        return ReplayWatch(found, timeout_s=CALL_S), ReplayClient(found, timeout_s=CALL_S)
    looks = _first_of(options.secrets, ("exporter", "admin"))
    loads = _first_of(options.secrets, ("admin", "learner"))
    if looks is None:
        raise ConfigError(
            f"there is no exporter.password and no admin.password in {options.secrets}: make them "
            "with `dreamfleet secrets`"
        )
    watch = ReplayWatch(address_for(url, access, looks), timeout_s=CALL_S)
    if loads is None:
        return watch, None
    return watch, ReplayClient(address_for(url, access, loads), timeout_s=CALL_S)


def _first_of(secrets: Path, roles: tuple[RoleName, ...]) -> RoleName | None:
    """Return the first role whose password is there."""
    return next((role for role in roles if password_file(secrets, role).is_file()), None)
