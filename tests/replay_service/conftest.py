from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from replay_service import EmbeddedServer, ReplayClient


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    """One server for all tests that do not restart it."""
    directory: Path = tmp_path_factory.mktemp("server")
    with EmbeddedServer(directory, max_memory_bytes=2**28) as running:
        yield running


@pytest.fixture
def client(server: EmbeddedServer) -> Iterator[ReplayClient]:
    """A client of an empty server."""
    with redis.Redis.from_url(server.url) as admin:
        admin.flushall()
    made = ReplayClient(server.url, timeout_s=5.0)
    yield made
    made.close()
