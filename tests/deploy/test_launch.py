from __future__ import annotations

import logging
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from deploy.config import with_values
from deploy.launch import replay_server
from deploy.presets import preset
from deploy.secretscmd import SecretsOptions, make_secrets
from replay_service import (
    Limits,
    ReplayAuthError,
    ReplayClient,
    ReplayConfig,
    address_for,
    with_absolute_paths,
)
from tests.replay_service.records import SCHEMA, chunk, insert


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
