"""A whole run whose replay is on several servers: one stops for a while, one joins."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from learner.checkpoint import load_newest
from replay_service import (
    Column,
    EmbeddedServer,
    Limits,
    ReplayClient,
    ReplayStats,
    Schema,
    check_server,
    shard_of,
)
from replay_service.schema import REQUIRED
from tests.integration.test_train import END_S, FOREVER, ROOT, START_S, Run, training

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(900)]

STREAMS = [f"v3-cartpole-a{slot}" for slot in range(3)]
DIES_BEFORE_IT_NOTES = """
import os, signal, sys
from deploy import cli, join
join.note_joined = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
sys.exit(cli.main())
"""
"""The program, but for the moment in which a server takes part and nothing is written down yet."""


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
    stop(run)
    saved = load_newest(run.directory / "checkpoints")
    found = [stats(server.url) for server in servers]
    assert saved is not None
    assert sum(one.inserted_steps for one in found) >= saved.manifest["env_steps"]
    assert {one.fence for one in found} == {saved.manifest["fence"]}
    for server in servers:
        report = check_server(ReplayClient(server.url))
        assert not report.findings.found, report


def stop(run: Run) -> None:
    run.process.send_signal(signal.SIGTERM)
    assert run.process.wait(END_S) == 143, run.output()


def dreamfleet(*words: str) -> tuple[int, str]:
    """Run a command to its end; return its exit code and what it says in one line."""
    done = subprocess.run(
        [sys.executable, "-m", "deploy.cli", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=END_S,
    )
    return done.returncode, " ".join((done.stdout + done.stderr).split())


def homes(run: Run) -> list[str]:
    """Return the server of each actor that acts."""
    return [one["server"] for one in actors_of(run) if one["state"] in ("acting", "blocked")]


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


def test_a_server_joins_the_embedded_one_of_a_run_that_goes_on(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    own = f"unix://{directory}/replay/redis.sock"
    place = next(
        path
        for path in (tmp_path / str(number) for number in count())
        if len({shard_of(stream, [own, f"unix://{path}/redis.sock"]) for stream in STREAMS}) == 2
    )
    with ExitStack() as stack:
        other = stack.enter_context(EmbeddedServer(place, max_memory_bytes=2**27))
        foreign = stack.enter_context(EmbeddedServer(tmp_path / "z", max_memory_bytes=2**27))
        theirs = ReplayClient(foreign.url, owner="1a /runs/theirs on there")
        theirs.create(theirs_schema(), Limits(capacity_steps=10, capacity_bytes=2**20))
        run = Run(directory, "--actors", "3", "--steps", FOREVER)
        stack.callback(run.close)
        run.wait_for(training, START_S)
        scale = ["scale", str(directory), "--redis"]
        for address, words in (
            ("redis://127.0.0.1:1", "127.0.0.1:1"),
            (foreign.url, "holds the replay of another run, /runs/theirs on there"),
        ):
            code, said = dreamfleet(*scale, f"embedded,{address}")
            assert code == 2 and words in said and "Traceback" not in said, said
        assert "redis: embedded\n" in (directory / "config.yaml").read_text()
        assert set(homes(run)) == {own}
        before, pids = stats(own), {one["slot"]: one["pid"] for one in actors_of(run)}

        code, said = dreamfleet(*scale, f"embedded,{other.url}")
        assert code == 0 and "2 replay servers, 1 before" in said, said + run.output()
        assert sorted(homes(run)) == sorted(shard_of(one, [own, other.url]) for one in STREAMS)
        # Those whose streams have not moved are the same processes.
        again = {one["slot"]: one["pid"] for one in actors_of(run) if one["server"] == own}
        assert again and again.items() <= pids.items()
        steps = stats(own).inserted_steps
        run.wait_for(
            lambda _: stats(other.url).inserted_steps > 64 and stats(own).inserted_steps > steps,
            END_S,
        )
        assert stats(own).fence == stats(other.url).fence == before.fence
        assert stats(own).inserted_steps > before.inserted_steps
        servers = run.status()["replay_servers"]
        assert isinstance(servers, list)
        assert [one["address"] for one in servers] == [own, other.url]
        stop(run)
        saved = load_newest(directory / "checkpoints")
        assert saved is not None and f"redis: embedded,{other.url}\n" in config_of(run)
        code, said = dreamfleet("replay", "check", str(directory))
        assert code == 0 and "violations" not in said, said
        # The command that began it continues it with both.
        more = Run(directory, "--steps", str(saved.manifest["env_steps"] + 500))
        stack.callback(more.close)
        assert more.process.wait(START_S + END_S) == 0, more.output()
        assert "replay_lost" not in more.output() and f",{other.url}\n" in config_of(more)
        code, said = dreamfleet("replay", "check", str(directory))
        assert code == 0 and "violations" not in said, said
        theirs.close()


def test_a_newcomer_that_is_killed_at_once_is_named_and_brings_back_its_actors(
    servers: list[EmbeddedServer], tmp_path: Path
) -> None:
    with ExitStack() as stack:
        run = Run(tmp_path / "run", *asked(servers[:2]), "--actors", "3")
        stack.callback(run.close)
        run.wait_for(training, START_S)
        newcomer, urls = servers[2], [server.url for server in servers]
        code, said = dreamfleet(
            "scale", str(run.directory), "--redis", ",".join(urls), "--timeout-s", "0"
        )
        os.kill(newcomer.process_id, signal.SIGKILL)
        assert code == 0 and "3 replay servers, 2 before" in said, said + run.output()
        run.wait_for(lambda now: newcomer.url in str(now["inserts_wait"]), END_S)
        before = int(str(run.status()["updates"]))
        run.wait_for(lambda now: int(str(now["updates"])) > before + 20, END_S)
        stack.callback(newcomer.stop)
        newcomer.start()
        run.wait_for(lambda _: stats(newcomer.url).inserted_steps > 64, END_S)
        run.wait_for(lambda now: newcomer.url not in str(now["inserts_wait"]), END_S)
        end(run, servers)


def test_a_learner_killed_before_it_has_noted_a_newcomer_has_lost_nothing(
    servers: list[EmbeddedServer], tmp_path: Path
) -> None:
    first, newcomer = servers[:2]
    both = f"{first.url},{newcomer.url}"
    flags = ["--redis", first.url, "--actors", "3", "--steps", FOREVER]
    with ExitStack() as stack:
        run = Run(tmp_path / "run", *flags, program=("-c", DIES_BEFORE_IT_NOTES))
        stack.callback(run.close)
        run.wait_for(training, START_S)
        code, said = dreamfleet("scale", str(run.directory), "--redis", both)
        assert code == 2 and "has ended before it answered" in said, said
        assert run.process.wait(END_S) == -signal.SIGKILL
        assert f"redis: {first.url}\n" in config_of(run)
        assert stats(newcomer.url).inserted_steps == 0
        before = stats(first.url).inserted_steps

        again = Run(tmp_path / "run", *flags)
        stack.callback(again.close)
        again.wait_for(lambda now: training(now) and now["pid"] == again.process.pid, START_S)
        again.wait_for(lambda _: stats(first.url).inserted_steps > before + 64, END_S)
        assert stats(newcomer.url).inserted_steps == 0
        code, said = dreamfleet("scale", str(run.directory), "--redis", both)
        assert code == 0 and "2 replay servers, 1 before" in said, said + again.output()
        again.wait_for(lambda _: stats(newcomer.url).inserted_steps > 64, END_S)
        assert "replay_lost" not in again.output()
        end(again, servers[:2])


def actors_of(run: Run) -> list[dict[str, Any]]:
    found = run.status()["per_actor"]
    assert isinstance(found, list)
    return found


def config_of(run: Run) -> str:
    return (run.directory / "config.yaml").read_text()


def theirs_schema() -> Schema:
    return Schema(tuple(Column(*row) for row in REQUIRED))


def stats(url: str) -> ReplayStats:
    client = ReplayClient(url)
    try:
        return client.stats()
    finally:
        client.close()
