"""The order for servers to join a training, as far as it needs no training."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from deploy.config import FILE_NAME, ConfigError, load_config, save_config
from deploy.join import ORDER_FILE, Joining, wanted
from deploy.presets import preset
from deploy.scale import ScaleOptions, scale
from deploy.servers import JOINED_FILE, note_joined, with_joined
from learner.errands import Errands
from learner.status import Snapshot
from replay_service import (
    CreditLimiter,
    EmbeddedServer,
    Limits,
    Mirror,
    ReplayClient,
    ReplayConfigError,
    ReplayError,
    ReplayTimeout,
)
from tests.replay_service.records import SCHEMA

OURS = replace(preset("v3-cartpole"), redis="redis://a:1,redis://b:2")
LIMITS = Limits(capacity_steps=10**5, capacity_bytes=2**24, min_size_steps=64)


@pytest.mark.parametrize(
    "redis, want",
    [
        ("redis://b:2,redis://a:1,redis://c:3", ["redis://a:1", "redis://b:2", "redis://c:3"]),
        ("redis://a:1,redis://b:2", ["redis://a:1", "redis://b:2"]),
        ("redis://c:3", "redis://a:1, redis://b:2 cannot leave .* give --redis redis://a:1,redis"),
        ("redis://a:1,redis://b:2,c:3", "--redis must be"),
        ("redis://a:1,redis://b:2,redis://a:1", "named more than once"),
        ("redis://a:1,redis://b:2,redis://me:word@c:3", "--redis holds a password"),
    ],
)
def test_servers_join_those_that_are_there_and_none_leaves(redis: str, want: Any) -> None:
    if isinstance(want, list):
        assert wanted(OURS, redis) == want
        return
    with pytest.raises(ConfigError, match=want):
        wanted(OURS, redis)


def test_a_run_in_lockstep_has_one_server() -> None:
    config = replace(preset("v3-cartpole"), lockstep=True)
    with pytest.raises(ConfigError, match="--lockstep gives the same run again"):
        wanted(config, "embedded,redis://a:1")


def test_servers_that_joined_are_there_whatever_command_continues_the_run(tmp_path: Path) -> None:
    assert with_joined(OURS, tmp_path) is OURS
    note_joined(tmp_path, ["redis://c:3"])
    note_joined(tmp_path, ["redis://d:4", "redis://c:3"])
    again = with_joined(OURS, tmp_path)
    assert again.addresses == ("redis://a:1", "redis://b:2", "redis://c:3", "redis://d:4")
    assert with_joined(again, tmp_path) is again
    (tmp_path / JOINED_FILE).write_text("redis://d:4\n\n")
    assert with_joined(OURS, tmp_path).addresses == ("redis://a:1", "redis://b:2", "redis://d:4")


def test_scaling_nothing_or_nobody_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give --actors, --redis, or both"):
        ScaleOptions(run_dir=tmp_path)
    save_config(OURS, tmp_path / FILE_NAME)
    over = {**{name: None for name in Snapshot.__dataclass_fields__}, "phase": "stopped", "pid": 1}
    (tmp_path / "status.json").write_text(json.dumps(over))
    options = ScaleOptions(run_dir=tmp_path, redis="redis://a:1,redis://b:2,redis://c:3")
    with pytest.raises(ConfigError, match="nothing trains in .* --redis redis://a:1,.* continues"):
        scale(options)
    assert load_config(tmp_path / FILE_NAME).redis == OURS.redis


class Rest:
    """The parts of a run that a server joins, without a training."""

    def __init__(self, server: EmbeddedServer, run: Path, tolerance: int | None = None) -> None:
        self.client = ReplayClient(server.url)
        self.client.create(SCHEMA, LIMITS)
        self.mirror = Mirror(self.client, SCHEMA, capacity_steps=1000, window_steps=8)
        self.mirror.start()
        account = CreditLimiter(
            train_ratio=4,
            batch_steps=32,
            chunk_steps=8,
            min_size_steps=64,
            capacity_steps=10**5,
            insert_tolerance=tolerance,
            sample_tolerance=tolerance,
        )
        self.learner: Any = SimpleNamespace(
            client=self.client,
            mirror=self.mirror,
            limiter=account,
            fence=self.client.acquire_fence(),
            between=Errands(),
            reseeder=None,
        )
        self.redirected = list[str]()
        crew = cast(Any, SimpleNamespace(redirect=self.redirected.append))
        config = replace(preset("v3-cartpole"), redis=server.url)
        save_config(config, run / FILE_NAME)
        self.joining = Joining(
            config, run, server.url, SCHEMA, LIMITS, self.learner, crew, ExitStack()
        )

    def close(self) -> None:
        self.mirror.stop()
        self.client.close()


@pytest.fixture
def servers(tmp_path: Path):  # type: ignore[no-untyped-def]
    one, two = (EmbeddedServer(tmp_path / name, max_memory_bytes=2**26) for name in ("x", "y"))
    with one, two:
        yield [one, two]


@pytest.mark.parametrize(
    "tolerance, newcomer, kind, words",
    [
        (64, "", ReplayConfigError, "raise tolerance_steps or lower chunk_steps"),
        (None, "unix:///nowhere/redis.sock", ReplayError, "nowhere/redis.sock"),
        (None, "", ReplayTimeout, "the training has ended meanwhile"),
    ],
)
def test_what_cannot_join_changes_nothing(
    servers: list[EmbeddedServer],
    tmp_path: Path,
    tolerance: int | None,
    newcomer: str,
    kind: type[Exception],
    words: str,
) -> None:
    rest = Rest(servers[0], tmp_path, tolerance)
    try:
        before, known = rest.client.counters(), load_config(tmp_path / FILE_NAME)
        rest.learner.between.close()
        with pytest.raises(kind, match=words):
            rest.joining.join(f"{servers[0].url},{newcomer or servers[1].url}")
        assert rest.client.counters() == before and not rest.redirected
        assert load_config(tmp_path / FILE_NAME) == known
        assert len(rest.mirror._logs) == 1 and rest.learner.client is rest.client
    finally:
        rest.close()


@pytest.mark.parametrize("order", ["", "[]", "{}", '{"id": "../../x", "redis": "redis://a:1"}'])
def test_an_order_that_is_none_is_dropped(
    order: str, servers: list[EmbeddedServer], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rest = Rest(servers[0], tmp_path)
    try:
        rest.joining.heed()
        assert not caplog.records
        (tmp_path / ORDER_FILE).write_text(order)
        rest.joining.heed()
        assert "join_refused" in caplog.text and not (tmp_path / ORDER_FILE).exists()
    finally:
        rest.close()
