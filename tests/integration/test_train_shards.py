"""A whole run whose replay is on several servers: one of them stops for a while, one is added."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path

import pytest

from learner.checkpoint import load_newest
from replay_service import EmbeddedServer, ReplayClient, ReplayStats, check_server, shard_of
from tests.integration.test_train import END_S, FOREVER, START_S, Run, training

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(900)]

STREAMS = [f"v3-cartpole-a{slot}" for slot in range(3)]


def places(root: Path) -> list[Path]:
    """Return directories of three servers so that each will be the shard of one of three actors.

    Which shard a stream has depends on the addresses, and those on where the test runs.
    """

    def url(path: Path) -> str:
        return f"unix://{path}/redis.sock"

    for number in count():
        found = [root / f"{number}{letter}" for letter in "abc"]
        two, three = [url(path) for path in found[:2]], [url(path) for path in found]
        spread = {shard_of(stream, two) for stream in STREAMS[:2]} == set(two)
        if spread and {shard_of(stream, three) for stream in STREAMS} == set(three):
            return found
    raise AssertionError


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[list[EmbeddedServer]]:
    with ExitStack() as stack:
        yield [
            stack.enter_context(EmbeddedServer(place, max_memory_bytes=2**27))
            for place in places(tmp_path)
        ]


def asked(servers: list[EmbeddedServer]) -> list[str]:
    """Return flags of a run with an actor for each server."""
    urls = [server.url for server in servers]
    return ["--redis", ",".join(urls), "--actors", str(len(urls)), "--steps", FOREVER]


def end(run: Run, servers: list[EmbeddedServer]) -> None:
    """Stop a run; its servers then hold what they promise, and all it has trained on."""
    run.process.send_signal(signal.SIGTERM)
    assert run.process.wait(END_S) == 143, run.output()
    saved = load_newest(run.directory / "checkpoints")
    found = [stats(server.url) for server in servers]
    assert saved is not None
    assert sum(one.inserted_steps for one in found) >= saved.manifest["env_steps"]
    assert {one.fence for one in found} == {saved.manifest["fence"]}
    for server in servers:
        report = check_server(ReplayClient(server.url))
        assert not report.findings.found, report


def test_a_server_that_stops_is_named_and_training_goes_on_without_it(
    servers: list[EmbeddedServer], tmp_path: Path
) -> None:
    with ExitStack() as stack:
        other = servers[1]
        run = Run(tmp_path / "run", *asked(servers[:2]))
        stack.callback(run.close)
        run.wait_for(training, START_S)
        os.kill(other.process_id, signal.SIGSTOP)
        stack.callback(os.kill, other.process_id, signal.SIGCONT)
        run.wait_for(lambda now: other.url in str(now["inserts_wait"]), 60)
        before = int(str(run.status()["updates"]))
        run.wait_for(lambda now: int(str(now["updates"])) > before + 20, 60)
        os.kill(other.process_id, signal.SIGCONT)
        run.wait_for(lambda now: other.url not in str(now["inserts_wait"]), 60)
        steps = stats(other.url).inserted_steps
        run.wait_for(lambda _: stats(other.url).inserted_steps > steps + 64, 60)
        end(run, servers[:2])


@pytest.mark.exhaustive
def test_a_server_joins_a_run_that_is_continued(
    servers: list[EmbeddedServer], tmp_path: Path
) -> None:
    with ExitStack() as stack:
        first = Run(tmp_path / "run", *asked(servers[:2]))
        stack.callback(first.close)
        first.wait_for(training, START_S)
        end(first, servers[:2])
        before = [stats(server.url).inserted_steps for server in servers[:2]]
        updates = int(str(first.status()["updates"]))
        again = Run(tmp_path / "run", *asked(servers))
        stack.callback(again.close)
        again.wait_for(lambda now: int(str(now.get("updates", 0))) > updates + 20, START_S)
        again.wait_for(
            lambda _: all(
                stats(server.url).inserted_steps > steps + 64
                for server, steps in zip(servers, [*before, 0], strict=True)
            ),
            END_S,
        )
        assert "replay_lost" not in again.output()
        end(again, servers)


def stats(url: str) -> ReplayStats:
    client = ReplayClient(url)
    try:
        return client.stats()
    finally:
        client.close()
