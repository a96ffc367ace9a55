"""The replay servers of a run: started or found, connected to, prepared, put back in order."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from deploy.config import EMBEDDED, TrainConfig
from deploy.rundir import begin, not_begun, run_id
from replay_service import (
    EmbeddedServer,
    Limits,
    ReplayClient,
    ReplayError,
    Reseeder,
    Schema,
    ShardedClient,
    ShardedReseeder,
    address_for,
    fit_to_server,
    is_loopback,
    split_addresses,
)

if TYPE_CHECKING:
    from learner.learner import Learner

log = logging.getLogger(__name__)

JOINED_FILE = "joined-servers"
"""Holds the addresses of servers that have joined the run while it went on, one a line."""
LIVES = 1000
"""Learners of one run that may have ended, one after the other, before their first checkpoint."""


def with_joined(config: TrainConfig, run: Path) -> TrainConfig:
    """Return the configuration with the servers that have joined the run while it went on.

    The command that began the run does not name them, and may well be the one that continues it;
    their steps would be missing.
    """
    path = run / JOINED_FILE
    known = path.read_text().split("\n") if path.exists() else []
    missing = [one for one in map(str.strip, known) if one and one not in config.addresses]
    if not missing:
        return config
    log.warning("shards_kept joined=%s: to leave one out, remove it from %s", missing, path)
    return replace(config, redis=",".join([*config.addresses, *missing]))


def note_joined(run: Path, addresses: Sequence[str]) -> None:
    """Remember servers for `with_joined`. Raises OSError."""
    from learner.files import write_atomically

    path = run / JOINED_FILE
    known = path.read_text().split() if path.exists() else []
    lines = [*known, *(address for address in addresses if address not in known)]
    write_atomically(path, "".join(f"{line}\n" for line in lines).encode())


def resolved(config: TrainConfig, embedded: str) -> str:
    """Return the addresses of a run, with that of its embedded server for the word."""
    return ",".join(embedded if one == EMBEDDED else one for one in config.addresses)


@contextmanager
def replay_server(config: TrainConfig, run: Path) -> Iterator[str]:
    """Start a private server in the run directory, or use those given; yield their addresses."""
    if EMBEDDED not in config.addresses:
        yield config.redis
        return
    with EmbeddedServer(
        run / "replay",
        max_memory_bytes=config.replay.redis_memory_bytes,
        durability=config.replay.durability,
        listen=config.replay.listen,
        secrets=config.replay.secrets,
    ) as server:
        yield resolved(config, server.listen_url)


def owner_of(run: Path) -> str:
    """Return the mark of a run on its replay: its id, and words that tell people where it is."""
    return f"{run_id(run)} {run.absolute()} on {socket.gethostname()}"


def connect(config: TrainConfig, url: str, owner: str) -> ReplayClient | ShardedClient:
    """Return the learner's client of the replay on one or several servers."""
    clients = [
        ReplayClient(address_for(address, config.replay, "learner"), owner=owner)
        for address in split_addresses(url)
    ]
    if len(clients) == 1:
        return clients[0]
    return ShardedClient(clients, chunk_steps=config.replay.chunk_steps)


def servers_of(client: ReplayClient | ShardedClient) -> tuple[ReplayClient, ...]:
    """Return the clients of all servers, in the order of their addresses."""
    return client.clients if isinstance(client, ShardedClient) else (client,)


def servers_outside(
    config: TrainConfig, client: ReplayClient | ShardedClient
) -> list[ReplayClient]:
    """Return the clients of the servers that do not lie in the run directory."""
    both = zip(servers_of(client), config.addresses, strict=True)
    return [one for one, address in both if address != EMBEDDED]


def servers_here(config: TrainConfig) -> int:
    """Return how many replay servers take memory of this machine; one alone is counted anyway."""
    if len(config.addresses) == 1:
        return 1
    # Neither a socket nor the word for the embedded server names a host.
    hosts = (urlsplit(address).hostname or "localhost" for address in config.addresses)
    return sum(is_loopback(host) for host in hosts)


def create_replay(
    client: ReplayClient | ShardedClient,
    schema: Schema,
    limits: Limits,
    run: Path,
    *,
    take_over: bool = False,
    outside: Sequence[ReplayClient] = (),
) -> Limits:
    """Create the replay; if the run has lost the one it had, closed to actors until `count_on`.

    A run whose mark one of the servers `outside` has taken counts as begun.

    Returns:
        The limits that it has, within the memory of the smallest server.

    Raises:
        ReplayConfigError: a server would drop chunks by itself, or cannot hold the minimum size.
        ReplayError: as `ReplayClient.create`.
    """
    from learner.checkpoint import newest_fence

    for server in servers_of(client):
        limits = fit_to_server(server, schema, limits)
    continued = newest_fence(run / "checkpoints") > 0
    with _marking(outside, run):
        client.create(schema, limits, token="resume" if continued else None, take_over=take_over)
    return limits


@contextmanager
def _marking(outside: Sequence[ReplayClient], run: Path) -> Iterator[None]:
    """Let a run begin before servers that outlive its start are marked, unless they refuse.

    A replay with the mark of a directory that is gone would be nobody's.
    """
    began = bool(outside) and begin(run)
    try:
        yield
    except ReplayError:
        marks = [one.counters().get("owner", b"").decode() for one in outside]
        if began and not any(mark.startswith(run_id(run)) for mark in marks):
            not_begun(run)
        raise


def take_fence(client: ReplayClient | ShardedClient, run: Path) -> int:
    """Return a fence above all that this run ever had, also if the server has lost its data."""
    from learner.checkpoint import newest_fence

    before = newest_fence(run / "checkpoints")
    if before and not client.stats().fence:
        # Lives that ended before their first checkpoint had fences too.
        return client.acquire_fence(before + LIVES)
    return client.acquire_fence()


def look_after(
    config: TrainConfig, url: str, learner: Learner, limits: Limits
) -> Reseeder | ShardedReseeder:
    """Prepare for servers that lose their data."""
    client, addresses = learner.client, split_addresses(url)
    if isinstance(client, ShardedClient):
        limits = client.limits_of_each(limits)
    reseeders = [
        make_reseeder(config, one, address, number, learner, limits)
        for number, (one, address) in enumerate(zip(servers_of(client), addresses, strict=True))
    ]
    return reseeders[0] if len(reseeders) == 1 else ShardedReseeder(client, reseeders)


def make_reseeder(
    config: TrainConfig,
    client: ReplayClient,
    address: str,
    number: int,
    learner: Learner,
    limits: Limits,
) -> Reseeder:
    """Prepare for one server that loses its data. Records go back with the rights of an actor.

    Args:
        config: of the run.
        client, address: the learner's client of the server, and its address without a password.
        number: of its log in the mirror.
        learner: whose mirror it is.
        limits: that it enforces.
    """
    return Reseeder(
        client,
        lambda: ReplayClient(address_for(address, config.replay, "actor")),
        learner.mirror.of(number),
        limits,
        fence=learner.fence,
        mode=config.replay.on_data_loss,
        codec=config.replay.codec,
    )
