"""The replay service on a real server: metrics, health, the list of targets, and who may ask."""

from __future__ import annotations

import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from replay_service import Limits, MetricsEndpoint, ReplayClient, ReplayConfigError
from replay_service.discovery import (
    Registration,
    Target,
    listed,
    live_targets,
    reached_at,
    register,
)
from replay_service.exporter import PREFIX, ReplayMetrics, ReplayService, ReplayWatch
from replay_service.server import EmbeddedServer
from tests.replay_service.records import SCHEMA, chunk, insert, insert_many


@pytest.fixture
def watch(client: ReplayClient) -> Iterator[ReplayWatch]:
    made = ReplayWatch(client.url, timeout_s=5.0)
    yield made
    made.close()


def read(watch: ReplayWatch) -> dict[str, float]:
    registry = CollectorRegistry()
    registry.register(ReplayMetrics(watch))
    return {
        sample.name.removeprefix(PREFIX): sample.value
        for family in registry.collect()
        for sample in family.samples
    }


def get(url: str, token: str = "") -> tuple[int, str]:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=5) as got:
            return got.status, got.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_a_scrape_says_what_the_server_holds(client: ReplayClient, watch: ReplayWatch) -> None:
    before = read(watch)
    assert before["up"] == 1 and "size_steps" not in before
    client.create(SCHEMA, Limits(capacity_steps=1000, capacity_bytes=10**8, min_size_steps=10))
    insert_many(client, 0, 3)
    found = read(watch)
    stats = client.stats()
    assert found["writable"] == 1 and found["size_steps"] == stats.size_steps > 0
    assert found["inserted_steps_total"] == stats.inserted_steps
    assert found["inserted_bytes_total"] == stats.size_bytes > 0
    assert found["memory_limit_bytes"] == 2**28 > found["memory_used_bytes"] > 0
    assert found["streams"] >= 1 and found["quarantined_chunks_total"] == 0


def test_refused_inserts_and_evictions_are_counted(
    client: ReplayClient, watch: ReplayWatch
) -> None:
    limits = Limits(capacity_steps=32, capacity_bytes=2**24, min_size_steps=16, budget_steps=48)
    client.create(SCHEMA, limits)
    insert_many(client, 0, 1)
    assert "insert_credit_steps" not in read(watch)
    insert_many(client, 0, 5, start=2)
    assert insert(client, chunk(0, 6)) == "DUP"
    assert insert(client, chunk(0, 9)) == insert(client, chunk(1, 2)) == "GAP"
    assert [insert(client, chunk(0, 7)) for _ in range(3)] == ["WAIT"] * 3
    entries = client.read_log("0", 10, 0.01)
    client.quarantine(entries[0], b"torn", "a test")
    found = read(watch)
    want = {
        "inserted_steps_total": 48,
        "committed_chunks_total": 6,
        "evicted_steps_total": 16,
        "duplicates_total": 1,
        "gaps_total": 2,
        "waits_total": 3,
        "quarantined_chunks_total": 1,
        "size_steps": 32,
        "size_bytes": sum(entry.size_bytes for entry in entries),
        "chunks": 4,
        "streams": 1,
        "budget_steps": 48,
        "insert_credit_steps": 0,
        "epoch": client.stats().epoch,
    }
    assert {name: found[name] for name in want} == want
    assert found["inserted_bytes_total"] == client.stats().inserted_bytes > found["size_bytes"]


def test_a_process_stays_listed_while_the_server_has_no_memory(
    client: ReplayClient, watch: ReplayWatch
) -> None:
    client.create(SCHEMA, Limits(capacity_steps=1000, capacity_bytes=10**8))
    with redis.Redis.from_url(client.url) as admin:
        try:
            admin.config_set("maxmemory", "1mb")
            assert read(watch)["writable"] == 0 and read(watch)["up"] == 1
            register(client, "a", Target(address="h:2"), 5.0)
            assert [target.address for target in live_targets(watch)] == ["h:2"]
            admin.config_set("maxmemory", 2**28)
            admin.replicaof("127.0.0.1", "1")
            status, _, text = ReplayService(watch).healthz()
            assert status == 503 and "read only replica" in text and text.count("\n") == 1
        finally:
            admin.replicaof("NO", "ONE")
            admin.config_set("maxmemory", 2**28)


def test_without_a_server_there_are_no_old_numbers(tmp_path: Path) -> None:
    with EmbeddedServer(tmp_path / "server", max_memory_bytes=2**26) as running:
        watch = ReplayWatch(running.url, timeout_s=2.0)
        assert read(watch)["up"] == 1
    try:
        assert read(watch) == {"up": 0}
        assert ReplayService(watch).healthz()[0] == 503
        assert ReplayService(watch).targets()[0] == 503
    finally:
        watch.close()


def test_health_tells_the_truth(client: ReplayClient, watch: ReplayWatch) -> None:
    with redis.Redis.from_url(client.url) as admin:
        admin.function_flush("SYNC")
        status, _, text = ReplayService(watch).healthz()
        assert status == 503 and "lacks the function library" in text
        assert ReplayService(watch, client).healthz()[0] == 200
        assert client.library() == "same"
        limit = admin.config_get("maxmemory")["maxmemory"]
        try:
            admin.config_set("maxmemory", 1)
            assert ReplayService(watch).healthz()[0] == 503
            admin.config_set("maxmemory-policy", "allkeys-lru")
            assert "noeviction" in ReplayService(watch).healthz()[2]
        finally:
            admin.config_set("maxmemory", limit)
            admin.config_set("maxmemory-policy", "noeviction")
    assert ReplayService(watch).healthz()[0] == 200


def test_targets_are_those_that_live(client: ReplayClient, watch: ReplayWatch) -> None:
    client.load_library()
    own = Target(address="127.0.0.1:1", labels={"role": "replay"})
    service = ReplayService(watch, own=own)
    register(client, "dead", Target(address="h:3"), 0.05)
    learner = Target(address="h:2", labels={"role": "learner", "run": "a"})
    with Registration(client, learner, live_s=5.0, beat_s=0.1):
        end = time.monotonic() + 5
        while live_targets(client) != [learner]:
            assert time.monotonic() < end, live_targets(client)
            time.sleep(0.02)
        assert json.loads(service.targets()[2]) == [own.to_json(), learner.to_json()]
    assert json.loads(service.targets()[2]) == [own.to_json()]


def test_beyond_loopback_readers_need_the_token(client: ReplayClient, tmp_path: Path) -> None:
    registry = CollectorRegistry()
    with pytest.raises(ReplayConfigError, match="token"):
        MetricsEndpoint(registry, host="0.0.0.0")
    token = tmp_path / "token"
    token.write_text("right\n")
    token.chmod(0o600)
    endpoint = MetricsEndpoint(
        registry,
        host="0.0.0.0",
        token_file=token,
        pages={"/healthz": lambda: (200, "text/plain", "ok\n")},
        open_pages=["/healthz"],
    )
    try:
        at = f"http://127.0.0.1:{endpoint.port}"
        assert get(f"{at}/metrics")[0] == 401
        assert get(f"{at}/metrics", "wrong")[0] == 401
        assert get(f"{at}/metrics", "right")[0] == 200
        assert get(f"{at}/healthz") == (200, "ok\n")
        assert get(f"{at}/nowhere", "right")[0] == 404
    finally:
        endpoint.close()


def test_port_that_was_taken_since_it_was_checked_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        said = rf"port {port} of --there is in use: .* at 127\.0\.0\.1:{port}; stop it, or choose"
        with pytest.raises(ReplayConfigError, match=said):
            MetricsEndpoint(CollectorRegistry(), port=port, flag="--there")


def test_counters_pages_parse_as_prometheus_text(client: ReplayClient, watch: ReplayWatch) -> None:
    registry = CollectorRegistry()
    registry.register(ReplayMetrics(watch))
    endpoint = MetricsEndpoint(registry)
    try:
        text = get(f"http://127.0.0.1:{endpoint.port}/metrics")[1]
    finally:
        endpoint.close()
    names = {family.name for family in text_string_to_metric_families(text)}
    assert {f"{PREFIX}up", f"{PREFIX}memory_used_bytes"} <= names


@pytest.mark.parametrize(
    ("listen", "host", "away", "address"),
    [
        ("127.0.0.1", None, False, "127.0.0.1:9"),
        ("127.0.0.1", None, True, None),
        ("127.0.0.1", "node7", True, "node7:9"),
        ("0.0.0.0", None, True, "10.1.2.3:9"),
    ],
)
def test_loopback_is_not_listed_on_another_machine(
    client: ReplayClient, listen: str, host: str | None, away: bool, address: str | None
) -> None:
    client.load_library()
    here = ReplayClient(client.url)
    if away:
        here.url = "redis://replay.example:6379"  # what it was called with; it is connected
    with listed(here, 9, listen=listen, host=host, node="10.1.2.3", labels={}):
        end = time.monotonic() + 5
        while address and not live_targets(client):
            assert time.monotonic() < end
            time.sleep(0.02)
        registering = "registration" in {thread.name for thread in threading.enumerate()}
        assert registering == bool(address)
        assert [one.address for one in live_targets(client)] == ([address] if address else [])
    here.close()
    assert live_targets(client) == []


def test_the_address_is_one_that_others_reach() -> None:
    assert reached_at("127.0.0.1", 9, "redis://127.0.0.1:1") == "127.0.0.1:9"
    assert reached_at("::1", 9, "redis://127.0.0.1:1") == "[::1]:9"
    assert reached_at("0.0.0.0", 9, "redis://127.0.0.1:1", node="10.1.2.3") == "10.1.2.3:9"
    assert reached_at("127.0.0.1", 9, "redis://127.0.0.1:1", node="10.1.2.3") == "127.0.0.1:9"
    assert not reached_at("0.0.0.0", 9, "redis://127.0.0.1:1").startswith("0.0.0.0")
