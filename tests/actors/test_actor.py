"""One actor in this process: its phases, its answers, and how it ends."""

from __future__ import annotations

import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cluster import SCHEMA, Cupboard, make_spec, replay_server, until

from actors.actor import ActorProcess, ActorSpec, Rate, load_factory
from actors.config import ActorConfig
from dreamer.weights import pack
from replay_service import Column, ReplayClient, ReplayConfig, Schema
from replay_service.discovery import live_targets

pytestmark = pytest.mark.integration

WEIGHTS = pack({"w": torch.zeros(1)}, (1, 0))


@pytest.fixture
def client(tmp_path: Path) -> Iterator[ReplayClient]:
    with replay_server(tmp_path / "replay") as made:
        yield made


@pytest.fixture
def start() -> Iterator[Any]:
    """Return a function that starts an actor which is stopped after the test."""
    actors: list[ActorProcess] = []

    def started(spec: ActorSpec, source: Any = None) -> ActorProcess:
        actors.append(ActorProcess(spec, source or Cupboard(WEIGHTS)))
        return actors[-1]

    yield started
    for actor in actors:
        actor.stop(drain=False)


def phase(actor: ActorProcess, wanted: str) -> bool:
    stats = actor.stats()
    assert wanted == "failed" or not stats["error"], stats["trace"]
    return bool(stats["phase"] == wanted)


def test_actor_steps_its_environments_into_replay(client: ReplayClient, start: Any) -> None:
    actor = start(make_spec(client, slot=3))
    until(lambda: client.stats().inserted_steps > 200)
    stats = actor.stats()
    assert actor.ping() == stats["phase"] == "acting"
    assert stats["version"] == [1, 0] and not stats["blocked"] and stats["episodes"] > 10
    assert len(stats["steps_of_envs"]) == 2 and stats["env_steps"] == sum(stats["steps_of_envs"])
    assert stats["env_steps_per_s"] == pytest.approx(sum(stats["steps_per_s_of_envs"]))
    streams = {entry.sid[: len("test-a3-e0")] for entry in client.read_log("0", 10, 0.1)}
    assert streams == {"test-a3-e0", "test-a3-e1"}


def test_stop_delivers_every_record_that_was_written(client: ReplayClient, start: Any) -> None:
    actor = start(make_spec(client))
    until(lambda: actor.stats()["env_steps"] > 100)
    stats = actor.stop(drain=True, timeout_s=20.0)
    assert stats["phase"] == "stopped" and stats["pending_chunks"] == 0
    assert client.stats().inserted_steps == stats["env_steps"] == stats["inserted_steps"]


def test_actor_without_weights_waits_for_them(client: ReplayClient, start: Any) -> None:
    source = Cupboard(replace(WEIGHTS, manifest={**WEIGHTS.manifest, "version": [-1, -1]}))
    actor = start(make_spec(client), source)
    until(lambda: phase(actor, "weights"))
    assert actor.stats()["env_steps"] == 0
    source.weights = WEIGHTS
    until(lambda: phase(actor, "acting"))


def test_inserts_that_must_wait_stop_the_stepping_and_say_why(tmp_path: Path, start: Any) -> None:
    with replay_server(tmp_path / "replay", budget_steps=64) as client:
        actor = start(make_spec(client))
        until(lambda: bool(actor.stats()["blocked"]))
        before = actor.stats()
        assert "inserts wait for training" in before["blocked"]
        threading.Event().wait(0.3)
        after = actor.stats()
        assert after["env_steps"] == before["env_steps"] < 64 + 2 * 16 * 4
        assert after["last_step_age_s"] > 0.25
        client.settle(client.acquire_fence(), 0, 10**6)
        until(lambda: actor.stats()["env_steps"] > 400)
        assert not actor.stats()["blocked"]


def test_stop_of_a_blocked_actor_does_not_wait_for_training(tmp_path: Path, start: Any) -> None:
    with replay_server(tmp_path / "replay", budget_steps=64) as client:
        actor = start(make_spec(client))
        until(lambda: bool(actor.stats()["blocked"]))
        begin = time.monotonic()
        assert actor.stop(drain=True, timeout_s=30.0)["phase"] == "stopped"
        assert time.monotonic() - begin < 10.0


@pytest.mark.parametrize(
    ("changes", "failed_in", "message"),
    [
        ({"env_id": "shaky:CannotBeMade"}, "environments", "the level file is missing"),
        ({"env_id": "NoSuchEnv-v0"}, "environments", "NoSuchEnv"),
        ({"policy": "cluster:nothing"}, "policy", "nothing callable called 'nothing'"),
        ({"env_id": "shaky:AlwaysRaises"}, "acting", "never works"),
    ],
)
def test_failure_is_kept_with_its_phase_and_traceback(
    client: ReplayClient, start: Any, changes: dict[str, Any], failed_in: str, message: str
) -> None:
    actor = start(make_spec(client, **changes))
    until(lambda: phase(actor, "failed"))
    stats = actor.stats()
    assert stats["failed_in"] == failed_in and message in stats["error"]
    assert "Traceback" in stats["trace"]


def test_replay_with_other_columns_is_refused(client: ReplayClient, start: Any) -> None:
    other = Schema((*SCHEMA.columns, Column("extra", "float32", (3,))))
    actor = start(make_spec(client, schema=other.to_dict()))
    until(lambda: phase(actor, "failed"))
    assert actor.stats()["failed_in"] == "replay" and "extra" in actor.stats()["error"]


def test_actor_waits_for_a_server_that_is_not_there_yet(tmp_path: Path, start: Any) -> None:
    with replay_server(tmp_path / "replay") as client:
        address = client.url
    spec = make_spec(ReplayClient(address))
    actor = start(spec)
    threading.Event().wait(0.3)
    assert actor.ping() == "replay" and not actor.stats()["error"]
    with replay_server(tmp_path / "replay"):
        until(lambda: phase(actor, "acting"))
        actor.stop(drain=False)


def test_lockstep_collects_exactly_what_was_asked_for(client: ReplayClient, start: Any) -> None:
    actor = start(make_spec(client, lockstep=True, actor=ActorConfig(isolation="process")))
    for round_ in range(1, 4):
        assert actor.collect(10, (1, 0)) == 20
        assert client.stats().inserted_steps == 20 * round_
    assert actor.stats()["env_steps"] == 60
    with pytest.raises(TimeoutError, match="did not come"):
        actor.collect(10, (1, 1), timeout_s=0.2)


def test_lockstep_is_the_same_every_time(tmp_path: Path, start: Any) -> None:
    def collected(number: int) -> list[bytes | None]:
        with replay_server(tmp_path / f"replay{number}") as client:
            isolated = ActorConfig(isolation="process")
            actor = start(make_spec(client, "NotFinite", lockstep=True, actor=isolated))
            assert [actor.collect(25, (1, 0)) for _ in range(3)] == [50] * 3
            return client.fetch(client.read_log("0", 99, 0.1))

    first, second = collected(0), collected(1)
    assert len(first) == 3 * 2 * 2 and None not in first
    assert first == second


def test_collect_is_refused_outside_lockstep(client: ReplayClient, start: Any) -> None:
    with pytest.raises(RuntimeError, match="lockstep=False"):
        start(make_spec(client)).collect(1, (1, 0))


def test_metrics_are_served_on_loopback_under_their_names(client: ReplayClient, start: Any) -> None:
    actor = start(make_spec(client, "Raises", envs=1))
    until(lambda: actor.stats()["episodes"] > 5)
    port = actor.stats()["metrics_port"]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        text = answer.read().decode()
    labels = 'env="shaky:Raises",role="actor",slot="0",split="train"'
    for name in (
        f"dreamer_env_steps_total{{{labels}}}",
        f"dreamer_weights_update{{{labels}}} 0.0",
        f"dreamer_blocked{{{labels}}}",
        "dreamer_env_restarts_total{",
        "dreamer_episodes_total{",
        "dreamer_insert_replies_total{",
        "dreamer_policy_seconds_bucket{",
        "dreamer_episode_return_bucket{",
    ):
        assert name in text, text


def test_old_policy_is_said_to_be_stale(client: ReplayClient, start: Any) -> None:
    actor = start(make_spec(client, actor=ActorConfig(isolation="inline", max_policy_age_s=0.2)))
    until(lambda: phase(actor, "acting"))
    until(lambda: bool(actor.stats()["weights_stale"]))


def test_rate_is_the_mean_over_the_window() -> None:
    rate = Rate(window_s=10.0)
    assert rate.at(0.0, 0) == 0.0
    speeds = [rate.at(second, 100 * second) for second in range(1, 30)]
    assert speeds == pytest.approx([100.0] * 29)
    assert rate.at(40.0, 2900) == pytest.approx(0.0, abs=10.0)


def test_factory_path_must_name_something() -> None:
    assert load_factory("collections:Counter")
    with pytest.raises(ValueError, match="module:name"):
        load_factory("collections.Counter")


def test_chunks_do_not_depend_on_the_clock_in_lockstep(client: ReplayClient, start: Any) -> None:
    config = ReplayConfig(chunk_steps=64, min_size_steps=1, flush_age_s=1e-6)
    actor = start(make_spec(client, lockstep=True, replay=config))
    actor.collect(30, (1, 0))
    assert client.stats().chunks == 2


def test_actor_is_in_the_list_of_metrics_until_it_ends(client: ReplayClient, start: Any) -> None:
    actor = start(replace(make_spec(client), shown_as="tuesday"))
    until(lambda: live_targets(client) != [])
    (target,) = live_targets(client)
    assert target.address == f"127.0.0.1:{actor.stats()['metrics_port']}"
    assert target.labels == {"run": "tuesday"}
    actor.stop()
    assert live_targets(client) == []


def test_metrics_beyond_loopback_want_a_token(
    client: ReplayClient, start: Any, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"give --actor.metrics-token-file .* or listen at 127"):
        ActorConfig(metrics_listen="0.0.0.0")
    token = tmp_path / "metrics.token"
    knobs = ActorConfig(isolation="inline", metrics_listen="0.0.0.0", metrics_token_file=token)
    lost = start(replace(make_spec(client), actor=knobs))
    until(lambda: phase(lost, "failed"))
    assert lost.stats()["failed_in"] == "metrics" and str(token) in lost.stats()["error"]
    token.write_text("sesame\n")
    token.chmod(0o600)
    actor = start(replace(make_spec(client), actor=knobs))
    until(lambda: actor.stats()["metrics_port"] > 0)
    url = f"http://127.0.0.1:{actor.stats()['metrics_port']}/metrics"
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(url, timeout=5)
    known = urllib.request.Request(url, headers={"Authorization": "Bearer sesame"})
    with urllib.request.urlopen(known, timeout=5) as answer:
        assert b"dreamer_env_steps_total" in answer.read()
