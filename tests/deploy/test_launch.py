from __future__ import annotations

import logging
import signal
import socket
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import redis

from actors.fleet import FleetError
from deploy.cli import main
from deploy.config import FILE_NAME, load_config, save_config, with_values
from deploy.interrupts import Interrupts
from deploy.launch import leaves
from deploy.presets import preset
from deploy.secretscmd import SecretsOptions, make_secrets
from deploy.servers import (
    connect,
    create_replay,
    owner_of,
    replay_server,
    servers_here,
    take_fence,
)
from learner.learner import LearnerError, LearnerReplaced
from replay_service import (
    EmbeddedServer,
    Limits,
    ReplayAuthError,
    ReplayClient,
    ReplayConfig,
    ReplayConfigError,
    ReplayFenced,
    ReplayMissing,
    ReplayOwned,
    address_for,
    encode_chunk,
    split_addresses,
    with_absolute_paths,
)
from replay_service.chunk import max_blob_bytes
from tests.replay_service.records import SCHEMA, chunk, columns, insert

LIMITS = Limits(capacity_steps=1000, capacity_bytes=2**24)


@pytest.fixture
def client(tmp_path: Path) -> Iterator[ReplayClient]:
    with EmbeddedServer(tmp_path / "server", max_memory_bytes=2**26) as server:
        made = ReplayClient(server.url)
        yield made
        made.close()


@pytest.mark.parametrize("received", [None, signal.SIGTERM])
def test_a_learner_leaves_what_its_successor_has_and_ends_what_it_was_told_to_end(
    received: signal.Signals | None,
) -> None:
    config, told = preset("v3-cartpole"), cast(Interrupts, SimpleNamespace(received=received))
    kept = with_values(config, {"fleet.keep": True})
    assert leaves(config, told, LearnerReplaced("by another"))
    assert leaves(config, told, LearnerError("diverged")) == (received is None)
    assert not leaves(config, told, None)
    assert leaves(kept, told, None) == (received is not None)
    assert leaves(kept, told, FleetError("no actor works")) == (received is not None)


def test_guarded_server_of_a_run_admits_learner_and_actor_with_their_own_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_secrets(SecretsOptions(directory=Path("secrets")))
    with socket.create_server(("127.0.0.1", 0)) as free:
        listen = f"127.0.0.1:{free.getsockname()[1]}"
    config = with_values(
        preset("v3-cartpole"),
        {
            "replay.secrets": Path("secrets"),
            "replay.listen": listen,
            "replay.durability": "strict",
            "replay.redis_memory_bytes": 2**26,
        },
    )
    with replay_server(config, tmp_path / "run") as url:
        assert url == f"redis://{listen}"
        learner = ReplayClient(address_for(url, config.replay, "learner"))
        learner.create(SCHEMA, Limits(capacity_steps=1000, capacity_bytes=2**24))
        # Actors run in another directory.
        sent = with_absolute_paths(config.replay)
        monkeypatch.chdir("/")
        actor = ReplayClient(address_for(url, sent, "actor"))
        assert insert(actor, chunk(0, 1)) == "OK"
        with pytest.raises(ReplayAuthError, match="role learner or admin"):
            actor.acquire_fence()
        actor.close()
        learner.close()


def test_address_of_a_server_is_used_as_it_is(tmp_path: Path) -> None:
    config = replace(preset("v3-cartpole"), redis="rediss://me@replay.example:6400")
    with replay_server(config, tmp_path) as url:
        assert url == config.redis


def test_an_embedded_server_and_others_share_the_work(tmp_path: Path) -> None:
    config = replace(preset("v3-cartpole"), redis="embedded,redis://other.example:6400")
    assert config.addresses == ("embedded", "redis://other.example:6400")
    assert servers_here(config) == 1
    small = with_values(config, {"replay.redis_memory_bytes": 2**26})
    with replay_server(small, tmp_path / "run") as url:
        own, other = split_addresses(url)
        assert other == "redis://other.example:6400"
        client = ReplayClient(own)
        client.check()
        client.close()


def test_what_is_meant_for_one_start_is_not_remembered(tmp_path: Path) -> None:
    config = with_values(preset("v3-cartpole"), {"replay.take_over": True})
    save_config(config, tmp_path / FILE_NAME)
    assert not load_config(tmp_path / FILE_NAME).replay.take_over


def test_the_replay_of_another_run_directory_is_refused_and_named(
    client: ReplayClient, tmp_path: Path
) -> None:
    runs = [tmp_path / "one", tmp_path / "two"]
    for run in runs:
        run.mkdir()
    config = replace(preset("v3-cartpole"), redis=client.url)
    one, two = (connect(config, client.url, owner_of(run)) for run in runs)
    create_replay(one, SCHEMA, LIMITS, runs[0])
    first = take_fence(one, runs[0])
    with pytest.raises(ReplayOwned, match=f"another run, {runs[0]} on .*: give this run a server"):
        create_replay(two, SCHEMA, LIMITS, runs[1])
    # Nothing has changed: the first goes on, and is continued, wherever its directory is by then.
    one.settle(first, 0, 100)
    moved = runs[0].rename(tmp_path / "moved")
    again = connect(config, client.url, owner_of(moved))
    create_replay(again, SCHEMA, LIMITS, moved)
    with pytest.raises(ReplayOwned, match=str(moved)):
        create_replay(two, SCHEMA, LIMITS, runs[1])
    # Taken over, it belongs to the second alone.
    create_replay(two, SCHEMA, LIMITS, runs[1], take_over=True)
    take_fence(two, runs[1])
    with pytest.raises(ReplayFenced):
        one.settle(first, 0, 100)
    with pytest.raises(ReplayOwned, match=str(runs[1])):
        create_replay(again, SCHEMA, LIMITS, moved)
    for made in (one, two, again):
        made.close()


def test_a_server_that_drops_chunks_by_itself_is_refused(
    client: ReplayClient, tmp_path: Path
) -> None:
    with redis.Redis.from_url(client.url) as admin:
        admin.config_set("maxmemory-policy", "allkeys-lru")
        with pytest.raises(ReplayConfigError, match="is allkeys-lru, expected noeviction; set"):
            create_replay(client, SCHEMA, LIMITS, tmp_path)
        with pytest.raises(ReplayMissing):
            client.stats()
        # Without a limit no policy has anything to do.
        admin.config_set("maxmemory", 0)
        create_replay(client, SCHEMA, LIMITS, tmp_path)


def test_log_stays_within_a_server_that_is_smaller_than_configured(
    client: ReplayClient, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wide = Limits(capacity_steps=10**6, capacity_bytes=2**30, max_chunk_steps=64)
    bounded = create_replay(client, SCHEMA, wide, tmp_path)
    assert client.stats().capacity_bytes == bounded.capacity_bytes == 2**26 * 3 // 4
    assert f"replay_log_bounded address={client.address} maxmemory={2**26}: " in caplog.text
    caplog.clear()
    # What it advises is heard no more, nor what could never fill the server.
    advised = ReplayConfig(redis_memory_bytes=2**26)
    same = replace(wide, capacity_bytes=advised.log_bytes)
    assert create_replay(client, SCHEMA, same, tmp_path) == same
    create_replay(client, SCHEMA, replace(wide, capacity_steps=1000), tmp_path)
    assert not caplog.records
    # The oldest go before the server refuses the newest.
    with redis.Redis.from_url(client.url) as admin:
        admin.config_set("maxmemory", 2**23)
        create_replay(client, SCHEMA, wide, tmp_path)
        image = replace(chunk(0, 1, 64), columns=columns(0, 0, 64))
        for seq in range(1, 3000):
            blob = encode_chunk(replace(image, seq=seq, first_step=64 * (seq - 1)), SCHEMA, "raw")
            assert client.insert(SCHEMA, image.sid, seq, 64, blob).code == "OK"
    assert client.stats().evicted_steps > 0


def test_a_server_that_cannot_hold_the_minimum_is_refused_with_the_arithmetic(
    client: ReplayClient, tmp_path: Path
) -> None:
    wide = Limits(
        capacity_steps=10**6, capacity_bytes=2**30, max_chunk_steps=64, min_size_steps=64 * 1000
    )
    need = 1002 * max_blob_bytes(SCHEMA, 64)
    with redis.Redis.from_url(client.url) as admin:
        admin.config_set("maxmemory", need * 4 // 3 - 4)
        with pytest.raises(ReplayConfigError, match=f"64000 steps, which may take {need} bytes"):
            create_replay(client, SCHEMA, wide, tmp_path)
        admin.config_set("maxmemory", need * 4 // 3 + 1)
        create_replay(client, SCHEMA, wide, tmp_path)


def test_the_learners_role_may_ask_for_the_servers_memory(tmp_path: Path) -> None:
    make_secrets(SecretsOptions(directory=tmp_path / "secrets"))
    config = ReplayConfig(secrets=tmp_path / "secrets")
    with EmbeddedServer(tmp_path / "s", max_memory_bytes=2**26, secrets=config.secrets) as server:
        learner = ReplayClient(address_for(server.url, config, "learner"))
        create_replay(learner, SCHEMA, LIMITS, tmp_path)
        learner.close()


def test_a_new_run_that_is_refused_leaves_nothing_unless_a_server_is_marked_as_its_own(
    client: ReplayClient, tmp_path: Path
) -> None:
    client.owner = "0123456789ab another run"
    client.create(SCHEMA, LIMITS)
    run = tmp_path / "new"
    words = ["train", "--preset", "v3-cartpole", "--run-dir", str(run), "--redis"]
    assert main([*words, client.url]) == 2
    assert not run.exists()
    # Its own server goes with the directory.
    assert main([*words, f"embedded,{client.url}"]) == 2
    assert not run.exists()
    with EmbeddedServer(tmp_path / "free", max_memory_bytes=2**26) as free:
        assert main([*words, f"{free.url},{client.url}"]) == 2
        assert {path.name for path in run.iterdir()} == {"lock", "id", FILE_NAME}
        # Without its directory that one would be nobody's.
        with closing(ReplayClient(free.url)) as marked:
            assert marked.counters()["owner"].decode() == owner_of(run)


def test_password_that_crosses_a_network_in_the_clear_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    word = tmp_path / "word"
    word.write_text("hunter2\n")
    word.chmod(0o600)
    config = ReplayConfig(password_file=word)
    for url in ("redis://127.0.0.1:1", "rediss://replay.example:1", "unix:///run/x.sock"):
        address_for(url, config, "actor")
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        address_for("redis://replay.example:1", config, "actor")
    assert "replay_not_encrypted address=redis://replay.example:1" in caplog.text
    assert "hunter2" not in caplog.text
