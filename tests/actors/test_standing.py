"""Fleets that outlive their learner: taken over, replaced, ended; never shared by two runs."""

from __future__ import annotations

import itertools
import os
import secrets
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from cluster import make_spec, private_ray, replay_server, until
from ray.exceptions import RayError

from actors.fleet import FleetError, Supervision
from actors.hub import sender
from actors.roster import HUB, end_named, find, names_in, namespace_of, standing_hub
from actors.standing import Plan, StandingFleet, differences
from dreamer.weights import pack
from replay_service import ReplayClient, shard_of

pytestmark = [pytest.mark.integration, pytest.mark.slow]

QUICK = Supervision(check_every_s=0.1, answer_timeout_s=5.0, restart_delay_s=0.01)


@pytest.fixture(scope="module", autouse=True)
def running_ray() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}")
        with private_ray():
            yield


@pytest.fixture
def client(tmp_path: Path) -> Iterator[ReplayClient]:
    with replay_server(tmp_path / "replay") as made:
        yield made


@pytest.fixture
def namespace(tmp_path: Path) -> Iterator[str]:
    """A run of its own, with a hub that has weights; nothing of it is left."""
    name = namespace_of(secrets.token_hex(6))
    hub = standing_hub(name, str(tmp_path / "weights"), {}, idle_s=600.0)
    sender(hub)(pack({"w": torch.zeros(1)}, (1, 0)))
    yield name
    for left in names_in(name):
        end_named(left, name)


def plan_of(client: ReplayClient, namespace: str, **changes: Any) -> Plan:
    values: dict[str, Any] = {
        "namespace": namespace,
        "spec": make_spec(client, envs=1),
        "supervision": QUICK,
        "orphan_after_s": 600.0,
        "actors": 2,
    }
    return Plan(**(values | changes))


def started(plan: Plan, fence: int, **options: Any) -> StandingFleet:
    fleet = StandingFleet(plan, fence=fence, ask_every_s=0.1, **options)
    fleet.start()
    return fleet


def states(fleet: StandingFleet) -> list[str]:
    fleet.check()
    return [actor["state"] for actor in fleet.stats()]


def pids(fleet: StandingFleet) -> list[int]:
    return [actor.get("pid", 0) for actor in fleet.stats()]


def test_next_learner_takes_the_same_actors_over_and_the_last_is_refused(
    client: ReplayClient, namespace: str
) -> None:
    plan, told = plan_of(client, namespace), list[str]()
    first = started(plan, 1, on_failure=told.append)
    until(lambda: states(first) == ["acting", "acting"])
    before = pids(first)
    second = started(replace(plan, actors=3), 2)
    until(lambda: states(second) == ["acting"] * 3)
    assert pids(second)[:2] == before
    assert [actor["life"] for actor in second.stats()] == [0, 0, 0]
    until(lambda: bool(told))
    with pytest.raises(FleetError, match=r"another learner \(fence 2\) has taken over"):
        first.check()
    first.stop(0.0)  # whoever was replaced ends nothing
    with pytest.raises(FleetError, match="fence 2"):
        started(plan, 1)
    assert states(second) == ["acting"] * 3
    processes = [psutil.Process(pid) for pid in pids(second)]
    second.stop(5.0)
    assert names_in(namespace) == [HUB]
    assert not psutil.wait_procs(processes, timeout=20.0)[1]


def test_learner_that_never_heard_that_it_was_replaced_ends_nothing(
    client: ReplayClient, namespace: str
) -> None:
    plan = plan_of(client, namespace, actors=1)
    first = StandingFleet(plan, fence=1, ask_every_s=600.0)
    first.start()
    second = started(plan, 2)
    until(lambda: states(second) == ["acting"])
    before = pids(second)
    assert not first.replaced
    first.stop(0.0)
    assert first.replaced
    look = ray.get(find("fleet-train", namespace).look.remote(), timeout=60)
    assert (look["fence"], [one["pid"] for one in look["stats"]]) == (2, before)
    second.stop(5.0)
    assert names_in(namespace) == [HUB] and not second.replaced


def test_supervisor_that_has_forgotten_a_server_is_told_of_it_again(
    client: ReplayClient, namespace: str, tmp_path: Path
) -> None:
    places = (tmp_path / str(number) for number in itertools.count())
    place = next(path for path in places if homes(client.url, path)[0] == url_of(path))
    with replay_server(place) as other:
        both = f"{client.url},{other.url}"
        fleet = started(plan_of(client, namespace, actors=1), 1)
        until(lambda: states(fleet) == ["acting"])
        fleet.redirect(both)
        until(lambda: states(fleet) == ["acting"] and servers(fleet) == [other.url])
        before, host = pids(fleet), find("fleet-train", namespace)
        assert ray.get(host.plan.remote(), timeout=60).spec.replay_url == both
        pid = ray.get(host.look.remote(), timeout=60)["pid"]
        os.kill(pid, signal.SIGKILL)
        until(lambda: alive_again(host, pid))
        # Ray starts it as it was first started; the actor is left where it is.
        until(lambda: ray.get(host.plan.remote(), timeout=60).spec.replay_url == both)
        until(lambda: states(fleet) == ["acting"])
        assert pids(fleet) == before and servers(fleet) == [other.url]
        fleet.leave()
        # The next learner, which has both from its configuration, takes the fleet over.
        plan = plan_of(client, namespace, actors=1)
        second = started(replace(plan, spec=replace(plan.spec, replay_url=both)), 2)
        until(lambda: states(second) == ["acting"])
        assert pids(second) == before
        second.stop(5.0)


def url_of(place: Path) -> str:
    return f"unix://{place}/redis.sock"


def homes(url: str, place: Path) -> list[str]:
    return [shard_of("test-a0", [url, url_of(place)])]


def servers(fleet: StandingFleet) -> list[str]:
    return [actor.get("server", "") for actor in fleet.stats()]


def alive_again(host: Any, pid: int) -> bool:
    try:
        return bool(ray.get(host.look.remote(), timeout=60)["pid"] != pid)
    except RayError:
        return False


def test_killed_supervisor_comes_back_and_adopts_the_living(
    client: ReplayClient, namespace: str
) -> None:
    fleet = started(plan_of(client, namespace), 1)
    until(lambda: states(fleet) == ["acting", "acting"])
    fleet.scale(3)
    until(lambda: states(fleet) == ["acting"] * 3)
    before, host = pids(fleet), find("fleet-train", namespace)
    pid = ray.get(host.look.remote(), timeout=60)["pid"]
    names = names_in(namespace)
    os.kill(before[1], signal.SIGKILL)  # and one actor that nobody sees die
    os.kill(pid, signal.SIGKILL)

    def adopted() -> bool:
        now = pids(fleet)
        return states(fleet) == ["acting"] * 3 and now[1] not in (0, before[1])

    until(adopted)
    assert [pids(fleet)[0], pids(fleet)[2]] == [before[0], before[2]]
    assert ray.get(host.look.remote(), timeout=60)["pid"] != pid
    assert len(names_in(namespace)) == len(names)
    fleet.stop(5.0)
    assert names_in(namespace) == [HUB]


def test_fleet_that_does_something_else_is_replaced_and_the_log_names_the_difference(
    client: ReplayClient, namespace: str, caplog: pytest.LogCaptureFixture
) -> None:
    plan = plan_of(client, namespace, actors=1)
    first = started(plan, 1)
    until(lambda: states(first) == ["acting"])
    before = pids(first)
    first.leave()
    other = replace(plan, spec=replace(plan.spec, mode="greedy"))
    assert differences(plan, other) == ["spec.mode: 'explore' there, 'greedy' now"]
    second = started(other, 2)
    assert "fleet_replaced" in caplog.text and "spec.mode: 'explore' there" in caplog.text
    until(lambda: states(second) == ["acting"] and pids(second) != before)
    assert not psutil.pid_exists(before[0])
    second.stop(5.0)


def test_orphans_end_by_themselves_and_other_runs_do_not_notice(
    client: ReplayClient, namespace: str, tmp_path: Path
) -> None:
    other = namespace_of(secrets.token_hex(6))
    hub = standing_hub(other, str(tmp_path / "other"), {}, idle_s=600.0)
    sender(hub)(pack({"w": torch.zeros(1)}, (1, 0)))
    mine = started(plan_of(client, namespace, actors=1), 1)
    orphan = started(plan_of(client, other, actors=1, orphan_after_s=2.0), 1)
    until(lambda: states(mine) == states(orphan) == ["acting"])
    time.sleep(2.5)  # a fleet whose learner asks is no orphan, however short the deadline
    assert states(orphan) == ["acting"]
    processes = [psutil.Process(pid) for pid in pids(orphan)]
    orphan.leave()
    until(lambda: names_in(other) == [])
    assert not psutil.wait_procs(processes, timeout=20.0)[1]
    assert states(mine) == ["acting"]
    mine.stop(5.0)


def test_hub_without_callers_ends_and_a_lost_one_is_found_again(
    client: ReplayClient, namespace: str, tmp_path: Path
) -> None:
    idle = namespace_of(secrets.token_hex(6))
    standing_hub(idle, str(tmp_path / "idle"), {}, idle_s=1.0)
    fleet = started(plan_of(client, namespace, actors=1), 1)
    until(lambda: states(fleet) == ["acting"])
    end_named(HUB, namespace)
    hub = standing_hub(namespace, str(tmp_path / "weights"), {}, idle_s=600.0)
    assert ray.get(hub.stats.remote(), timeout=60)["version"] == [1, 0]  # from the disk
    sender(hub)(pack({"w": torch.ones(1)}, (2, 5)))
    until(lambda: fleet.stats()[0].get("version") == [2, 5])
    until(lambda: names_in(idle) == [])
    fleet.stop(5.0)
