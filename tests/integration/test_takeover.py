"""Fleets that outlive their learners on a cluster: left, waiting, taken over, ended."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from actors.roster import HUB, find, names_in, namespace_of
from deploy.rundir import run_id
from replay_service import EmbeddedServer, ReplayClient, check_server, shard_of
from tests.integration.raylets import (
    DEADLINE_S,
    add,
    alive,
    empty_cluster,
    start,
    status,
    until,
    wait_for,
)

pytestmark = [pytest.mark.integration, pytest.mark.slow]


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """One node that this process has joined too."""
    import ray

    with empty_cluster(monkeypatch) as cluster:
        add(cluster)
        ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
        yield cluster


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[str]:
    with EmbeddedServer(tmp_path / "server", max_memory_bytes=2**27) as server:
        yield server.url


def look(run: Path) -> dict[str, Any]:
    """Ask a run's fleet how it is, as nobody's learner."""
    import ray

    host = find("fleet-train", namespace_of(run_id(run)))
    found: dict[str, Any] = ray.get(host.look.remote(), timeout=60)
    return found


def acting(run: Path, wanted: int) -> bool:
    actors = status(run).get("per_actor", [])
    return len(actors) == wanted and all(one["state"] in ("acting", "blocked") for one in actors)


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate(timeout=30)


def test_fleet_outlives_a_killed_learner_waits_and_is_taken_over(
    nodes: Any, redis: str, tmp_path: Path
) -> None:
    import ray

    run = tmp_path / "run"
    flags = ["--steps", "1000000", "--actors", "2", "--redis", redis]
    first = start(nodes, run, *flags)
    second: subprocess.Popen[str] | None = None
    try:
        until(lambda: status(run).get("updates", 0) > 0 and acting(run, 2), first, "no training")
        members = {one["slot"]: (one["pid"], one["life"]) for one in status(run)["per_actor"]}
        first.kill()
        out, _ = first.communicate(timeout=30)
        before = status(run)
        # Nobody trains: the actors use up what the train ratio admits, and say that they wait.
        wait_for(lambda: {one["state"] for one in look(run)["stats"]} == {"blocked"})
        left = look(run)
        reasons = [one["blocked"] for one in left["stats"]]
        assert all("train" in reason for reason in reasons), reasons
        assert left["learner_away_s"] > 0
        namespace = namespace_of(run_id(run))
        hub = find(HUB, namespace)
        version = ray.get(hub.stats.remote(), timeout=60)["version"]
        # The supervisor dies as well: Ray starts it again, and it finds the same actors.
        os.kill(left["pid"], signal.SIGKILL)
        wait_for(lambda: alive(lambda: look(run)["pid"] != left["pid"]))
        wait_for(lambda: {one["state"] for one in look(run)["stats"]} == {"blocked"})

        second = start(nodes, run, *flags)
        until(
            lambda: (
                status(run)["policy_version"][0] > before["policy_version"][0] and acting(run, 2)
            ),
            second,
            "no takeover",
        )
        until(lambda: status(run)["updates"] > before["updates"], second, "training did not go on")
        again = {one["slot"]: (one["pid"], one["life"]) for one in status(run)["per_actor"]}
        assert again == members
        after = ray.get(find(HUB, namespace).stats.remote(), timeout=60)
        assert after["version"] > version and after["pid"]
        second.send_signal(signal.SIGTERM)
        out, _ = second.communicate(timeout=90)
        assert "fleet_taken_over" in out and "hub_taken_over" in out, out[-3000:]
        assert names_in(namespace) == []
    finally:
        for process in (first, second):
            if process is not None:
                end(process)


def test_a_server_joins_a_run_on_a_cluster_and_the_next_learner_finds_its_actors_there(
    nodes: Any, redis: str, tmp_path: Path
) -> None:
    def url(path: Path) -> str:
        return f"unix://{path}/redis.sock"

    def homes(path: Path) -> list[str]:
        return [shard_of(f"v3-cartpole-a{slot}", [redis, url(path)]) for slot in range(2)]

    def steps(address: str) -> int:
        client = ReplayClient(address)
        found = client.stats().inserted_steps
        client.close()
        return found

    run, second = tmp_path / "run", None
    places = (tmp_path / str(number) for number in itertools.count())
    place = next(path for path in places if homes(path) == [redis, url(path)])
    flags = ["--steps", "1000000", "--actors", "2", "--redis", redis]
    first = start(nodes, run, *flags)
    with EmbeddedServer(place, max_memory_bytes=2**27) as server:
        try:
            until(lambda: status(run).get("updates", 0) > 0 and acting(run, 2), first, "training")
            stays = status(run)["per_actor"][0]["pid"]
            said = command("scale", str(run), "--redis", f"{redis},{server.url}")
            assert "2 replay servers, 1 before" in said
            members = {one["slot"]: (one["pid"], one["server"]) for one in status(run)["per_actor"]}
            assert members[0] == (stays, redis) and members[1][1] == server.url
            until(lambda: steps(server.url) > 0, first, "nothing is inserted at the newcomer")
            end(first)
            wait_for(lambda: {one["state"] for one in look(run)["stats"]} == {"blocked"})
            before = status(run)
            second = start(nodes, run, *flags)
            until(
                lambda: status(run)["updates"] > before["updates"] and acting(run, 2),
                second,
                "training did not go on",
            )
            again = {one["slot"]: (one["pid"], one["server"]) for one in status(run)["per_actor"]}
            assert again == members
            second.send_signal(signal.SIGTERM)
            out, _ = second.communicate(timeout=90)
            assert "fleet_taken_over" in out and "replay_lost" not in out, out[-3000:]
            for address in (redis, server.url):
                with closing(ReplayClient(address)) as client:
                    report = check_server(client)
                assert not report.findings.found, report
        finally:
            for process in filter(None, (first, second)):
                end(process)


def command(*words: str) -> str:
    """Run a command to its end and return what it says in one line."""
    done = subprocess.run(
        [sys.executable, "-m", "deploy.cli", *words],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return " ".join(done.stdout.split())


def test_two_runs_share_nothing_and_a_kept_fleet_is_scaled_and_stopped(
    nodes: Any, redis: str, tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    first = start(nodes, one, "--steps", "1000000", "--redis", redis, "--fleet.keep")
    second = start(nodes, two, "--steps", "1000000")
    try:
        until(lambda: status(one).get("updates", 0) > 0 and acting(one, 1), first, "one")
        until(lambda: status(two).get("updates", 0) > 0 and acting(two, 1), second, "two")
        spaces = [namespace_of(run_id(run)) for run in (one, two)]
        names = [names_in(space) for space in spaces]
        assert [len(found) for found in names] == [3, 3]  # hub, fleet and actor of each
        assert status(one)["per_actor"][0]["pid"] != status(two)["per_actor"][0]["pid"]
        first.send_signal(signal.SIGTERM)
        out, _ = first.communicate(timeout=90)
        assert "fleet_left" in out, out[-3000:]
        assert names_in(spaces[0]) == names[0]
        said = command("stop", str(one), "--look")
        assert "ends by itself in" in said and names_in(spaces[0]) == names[0]
        said = command("scale", str(one), "--actors", "2")
        assert "the learner is away" in said
        wait_for(lambda: [a["state"] for a in look(one)["stats"]] == ["blocked"] * 2)
        assert "2 blocked (inserts wait for training" in command("stop", str(one), "--look")
        assert "hub" in command("stop", str(one))
        assert names_in(spaces[0]) == [] and names_in(spaces[1]) == names[1]
        before = status(two)["env_steps"]
        until(lambda: status(two)["env_steps"] > before, second, "the other run did not go on")
    finally:
        end(first)
        end(second)
