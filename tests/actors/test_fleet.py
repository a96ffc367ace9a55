"""The fleet: replaces what dies or hangs, gives up what keeps failing, leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from cluster import make_spec, private_ray, replay_server, until
from prometheus_client import CollectorRegistry, generate_latest

from actors.config import ActorConfig
from actors.fleet import Fleet, FleetError, Supervision
from actors.hub import sender, start_hub
from actors.metrics import FleetMetrics
from actors.weights import HubSource
from dreamer.weights import pack
from replay_service import ReplayClient, check_server, shard_of
from replay_service.discovery import LIVE_S
from replay_service.endpoint import MetricsEndpoint
from replay_service.exporter import ReplayMetrics, ReplayService, ReplayWatch

pytestmark = [pytest.mark.integration, pytest.mark.slow]

QUICK = Supervision(check_every_s=0.1, answer_timeout_s=2.0, restart_delay_s=0.01, most_restarts=2)


@pytest.fixture(scope="module")
def source() -> Iterator[HubSource]:
    """Weights from a hub on a private Ray, whose processes can import the shaky environments."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)
    try:
        with private_ray():
            hub = start_hub()
            sender(hub)(pack({"w": torch.zeros(1)}, (1, 0)))
            yield HubSource(hub)
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before


@pytest.fixture
def client(tmp_path: Path) -> Iterator[ReplayClient]:
    with replay_server(tmp_path / "replay") as made:
        yield made


@pytest.fixture
def fleets() -> Iterator[list[Fleet]]:
    """A list of fleets that are stopped after the test."""
    started: list[Fleet] = []
    yield started
    for fleet in started:
        fleet.stop(0.0)


def launch(fleets: list[Fleet], source: HubSource, spec: Any, **options: Any) -> Fleet:
    fleet = Fleet(spec, source, **({"actors": 2, "supervision": QUICK} | options))
    fleets.append(fleet)
    fleet.start()
    return fleet


def states(fleet: Fleet) -> list[str]:
    fleet.check()
    return [actor["state"] for actor in fleet.stats()]


def failed(fleet: Fleet) -> bool:
    try:
        fleet.check()
    except FleetError:
        return True
    return False


def test_killed_and_stopped_actors_are_replaced_and_nothing_is_left(
    client: ReplayClient, source: HubSource, fleets: list[Fleet]
) -> None:
    spec = make_spec(client, envs=1, actor=ActorConfig(isolation="process"))
    fleet = launch(fleets, source, spec)
    until(lambda: states(fleet) == ["acting", "acting"])
    first, second = (actor["pid"] for actor in fleet.stats())
    children = psutil.Process(first).children(recursive=True)
    assert len(children) >= spec.envs
    os.kill(first, signal.SIGKILL)
    os.kill(second, signal.SIGSTOP)
    until(lambda: [actor["life"] for actor in fleet.stats()] == [1, 1])
    until(lambda: states(fleet) == ["acting", "acting"])
    assert not psutil.wait_procs(children, timeout=10.0)[1]
    registry = CollectorRegistry()
    registry.register(FleetMetrics(fleet.summary))
    text = generate_latest(registry).decode()
    assert 'dreamer_actor_restarts_total{reason="died"} 1.0' in text
    assert 'dreamer_actor_restarts_total{reason="hung"} 1.0' in text
    assert "dreamer_fleet_actors_desired 2.0" in text
    processes = [psutil.Process(actor["pid"]) for actor in fleet.stats()]
    processes += [child for process in processes for child in process.children(recursive=True)]
    ended = fleet.stop(drain_s=10.0)
    assert [actor["state"] for actor in ended] == ["stopped", "stopped"]
    assert not psutil.wait_procs(processes, timeout=10.0)[1]


def test_killed_actor_leaves_the_list_of_metrics_and_its_successor_enters_it(
    client: ReplayClient, source: HubSource, fleets: list[Fleet]
) -> None:
    watch, registry = ReplayWatch(client.url), CollectorRegistry()
    registry.register(ReplayMetrics(watch))
    endpoint = MetricsEndpoint(registry, pages=ReplayService(watch).pages())

    def listed() -> set[str]:
        with urllib.request.urlopen(f"http://127.0.0.1:{endpoint.port}/sd", timeout=5.0) as answer:
            return {address for one in json.load(answer) for address in one["targets"]}

    def serving(fleet: Fleet) -> set[str]:
        return {f"127.0.0.1:{actor['metrics_port']}" for actor in fleet.stats()}

    try:
        fleet = launch(fleets, source, make_spec(client, envs=1))
        until(lambda: states(fleet) == ["acting", "acting"])
        before, victim = serving(fleet), fleet.stats()[0]
        until(lambda: listed() == before)
        dead = f"127.0.0.1:{victim['metrics_port']}"
        os.kill(victim["pid"], signal.SIGKILL)
        # Nobody takes the entry out: it is too old, by the server's clock.
        until(lambda: dead not in listed(), LIVE_S + 30.0)
        until(lambda: states(fleet) == ["acting", "acting"])
        assert fleet.stats()[0]["life"] == 1 and dead not in serving(fleet)
        until(lambda: listed() == serving(fleet))
        assert len(serving(fleet) & before) == 1
    finally:
        endpoint.close()
        watch.close()


def test_environment_that_cannot_be_made_fails_fast_with_its_message(
    client: ReplayClient, source: HubSource, fleets: list[Fleet]
) -> None:
    told: list[str] = []
    fleet = launch(fleets, source, make_spec(client, "CannotBeMade"), on_failure=told.append)
    until(lambda: failed(fleet) and bool(told))
    with pytest.raises(FleetError, match="'environments'.*the level file is missing"):
        fleet.check()
    assert len(told) == 1 and "install the levels" in told[0]


def test_slot_that_keeps_failing_is_quarantined_with_its_traceback(
    client: ReplayClient, source: HubSource, fleets: list[Fleet]
) -> None:
    config = ActorConfig(isolation="inline", max_failures=2)
    fleet = launch(fleets, source, make_spec(client, "AlwaysRaises", actor=config), actors=1)
    until(lambda: failed(fleet))
    (actor,) = fleet.stats()
    assert actor["state"] == "quarantined" and actor["restarts"] == QUICK.most_restarts
    assert "this simulator never works" in actor["trouble"] and "Traceback" in actor["trace"]
    with pytest.raises(FleetError, match="(?s)failed more than 2 times.*never works"):
        fleet.check()


def test_actors_join_and_leave_and_those_that_leave_deliver_what_they_hold(
    client: ReplayClient, source: HubSource, fleets: list[Fleet]
) -> None:
    fleet = launch(fleets, source, make_spec(client, envs=1), actors=1)
    until(lambda: states(fleet) == ["acting"])
    (stays,) = (actor["pid"] for actor in fleet.stats())
    fleet.scale(3)
    until(lambda: states(fleet) == ["acting"] * 3)
    gone = [psutil.Process(actor["pid"]) for actor in fleet.stats()[1:]]
    until(lambda: all(actor["env_steps"] > 20 for actor in fleet.stats()))
    leaving = [slot for slot in fleet._slots[1:]]
    fleet.scale(1)
    assert fleet.summary()["desired"] == 1 and fleet.summary()["states"]["draining"] == 2
    until(lambda: len(fleet.stats()) == 1)
    assert not psutil.wait_procs(gone, timeout=10.0)[1]
    assert [actor["pid"] for actor in fleet.stats()] == [stays] and states(fleet) == ["acting"]
    for slot in leaving:
        assert slot.last["phase"] == "stopped"
        assert slot.last["inserted_steps"] == slot.last["env_steps"] > 20
    with pytest.raises(ValueError, match="at least 1 actor, got 0"):
        fleet.scale(0)


def test_actors_move_to_a_server_that_joins_and_deliver_first_what_they_hold(
    client: ReplayClient, source: HubSource, fleets: list[Fleet], tmp_path: Path
) -> None:
    number = 0
    while len(found := homes(client.url, tmp_path / str(number))) != 2 or found[0] != client.url:
        number += 1
    with replay_server(tmp_path / str(number)) as other:
        fleet = launch(fleets, source, make_spec(client, envs=1))
        until(lambda: states(fleet) == ["acting", "acting"])
        until(lambda: all(actor["env_steps"] > 20 for actor in fleet.stats()))
        stays, moves = (actor["pid"] for actor in fleet.stats())
        assert [actor["server"] for actor in fleet.stats()] == [client.url] * 2
        leaving = fleet._slots[1]
        steps = fleet.stats()[1]["env_steps"]
        fleet.redirect(f"{client.url},{other.url}")
        until(lambda: fleet.stats()[1].get("server") == other.url)
        until(lambda: states(fleet) == ["acting", "acting"])
        first, second = fleet.stats()
        assert first["pid"] == stays and first["life"] == 0
        assert second["pid"] != moves and second["life"] == 1
        # It was not lost, and what it has acted before counts.
        assert second["restarts"] == 0 and second["env_steps"] >= steps
        until(lambda: other.stats().inserted_steps > 0)
        delivered = client.stats().inserted_steps
        assert delivered >= steps and fleet._slots[1] is leaving
        # Scaling down takes those that move along, wherever they are on their way.
        fleet.redirect(client.url)
        until(lambda: fleet.stats()[1]["state"] in ("draining", "starting"))
        fleet.scale(1)
        until(lambda: len(fleet.stats()) == 1)
        assert fleet.summary()["desired"] == 1 and states(fleet) == ["acting"]
        for one in (client, other):
            report = check_server(one)
            assert not report.findings.found, report
        fleet.stop(5.0)


def homes(url: str, place: Path) -> list[str]:
    """Return where actors 0 and 1 of a test belong with a server there too, without doubles."""
    both = [url, f"unix://{place}/redis.sock"]
    return list(dict.fromkeys(shard_of(f"test-a{slot}", both) for slot in range(2)))


def test_fleet_in_lockstep_collects_from_every_actor(
    client: ReplayClient, source: HubSource, fleets: list[Fleet]
) -> None:
    fleet = launch(fleets, source, make_spec(client, lockstep=True))
    assert [fleet.collect(5, (1, 0)) for _ in range(2)] == [20, 20]
    assert client.stats().inserted_steps == 40
    ray.kill(fleet._slots[1].handle)
    with pytest.raises(FleetError, match="actor 1"):
        fleet.collect(5, (1, 0))
