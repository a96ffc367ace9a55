"""The order for servers to join a training, as far as it needs no training."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import redis

from deploy.config import FILE_NAME, ConfigError, load_config, save_config
from deploy.join import ORDER_FILE, Joining, wanted
from deploy.presets import preset
from deploy.scale import ScaleOptions, scale
from deploy.servers import JOINED_FILE, look_after, note_joined, owner_of, with_joined
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
    ReplayMissing,
    ReplayOwned,
    ReplayTimeout,
    ShardedClient,
    check_server,
)
from tests.replay_service.records import SCHEMA, absorb_until, contents, insert_many

OURS = replace(preset("v3-cartpole"), redis="redis://a:1,redis://b:2")
LIMITS = Limits(capacity_steps=10**5, capacity_bytes=2**24, min_size_steps=64)


@pytest.mark.parametrize(
    "given, want",
    [
        ("redis://b:2,redis://a:1,redis://c:3", ["redis://a:1", "redis://b:2", "redis://c:3"]),
        ("redis://a:1,redis://b:2", ["redis://a:1", "redis://b:2"]),
        ("redis://c:3", "redis://a:1, redis://b:2 cannot leave .* give --redis redis://a:1,redis"),
        ("redis://a:1,redis://b:2,c:3", "--redis must be"),
        ("redis://a:1,redis://b:2,redis://a:1", "named more than once"),
        ("redis://a:1,redis://b:2,redis://me:word@c:3", "--redis holds a password"),
    ],
)
def test_servers_join_those_that_are_there_and_none_leaves(given: str, want: Any) -> None:
    if isinstance(want, list):
        assert wanted(OURS, given) == want
        return
    with pytest.raises(ConfigError, match=want):
        wanted(OURS, given)


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
        self.client = ReplayClient(server.url, owner=owner_of(run))
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
            budget=lambda: account.budget(0),
            share_replay=self.share_replay,
        )
        self.redirected = list[str]()
        crew = cast(Any, SimpleNamespace(redirect=self.redirected.append))
        config = replace(preset("v3-cartpole"), redis=server.url)
        save_config(config, run / FILE_NAME)
        self.learner.reseeder = look_after(config, server.url, self.learner, LIMITS)
        self.joining = Joining(
            config, run, server.url, SCHEMA, LIMITS, self.learner, crew, ExitStack()
        )

    def share_replay(self, client: Any, limiter: Any, reseeder: Any) -> None:
        self.learner.client, self.learner.limiter = client, limiter
        self.learner.reseeder = reseeder

    def join(self, urls: str) -> None:
        """Let servers join, with this thread as the learner's. Raises what `Joining.join` does."""
        with ThreadPoolExecutor(1) as pool:
            asked, deadline = pool.submit(self.joining.join, urls), time.monotonic() + 30
            while not asked.done():
                assert time.monotonic() < deadline
                self.learner.between.run()
                wait([asked], 0.01)
            asked.result()

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


def test_a_server_that_has_joined_is_looked_after_like_the_first(
    servers: list[EmbeddedServer], tmp_path: Path
) -> None:
    rest = Rest(servers[0], tmp_path)
    learner, urls = rest.learner, ",".join(server.url for server in servers)
    try:
        insert_many(rest.client, 0, 9)
        absorb_until(rest.mirror, lambda: rest.mirror.inserted_steps == 72)
        rest.join(urls)
        assert rest.redirected == [urls] and load_config(tmp_path / FILE_NAME).redis == urls
        assert with_joined(OURS, tmp_path).addresses[-1] == servers[1].url
        client, account = learner.client, learner.limiter
        assert isinstance(client, ShardedClient) and account.shards == 2
        replayed, total = account.replayed_steps(20), account.budget(20)
        for _ in range(3):
            client.settle(learner.fence, replayed, total)
        assert client.stats().budget_steps == total
        newcomer = client.clients[1]
        assert newcomer.stats().budget_steps > 8
        insert_many(newcomer, 1, 2)
        absorb_until(rest.mirror, lambda: rest.mirror.inserted_steps == 88)
        held = contents(rest.mirror)
        with redis.Redis.from_url(servers[1].url) as admin:
            admin.flushall()
        with pytest.raises(ReplayMissing, match=servers[1].url):
            for _ in range(100):
                client.settle(learner.fence, replayed, total)
        learner.reseeder.run(replayed, total)
        assert learner.reseeder.losses == 1 and newcomer.stats().inserted_steps == 16
        # It is still this run's.
        stranger = ReplayClient(servers[1].url, owner="2b /runs/theirs on there")
        with pytest.raises(ReplayOwned, match=str(tmp_path)):
            stranger.create(SCHEMA, LIMITS)
        stranger.close()
        client.settle(learner.fence, replayed, total)
        insert_many(newcomer, 1, 1, start=3)
        absorb_until(rest.mirror, lambda: rest.mirror.inserted_steps == 96)
        assert contents(rest.mirror).items() >= held.items() and rest.mirror.missed_steps == 0
        for one in client.clients:
            report = check_server(one)
            assert not report.findings.found, report
    finally:
        rest.close()


def test_a_server_that_the_run_cannot_remember_gets_no_actors(
    servers: list[EmbeddedServer], tmp_path: Path
) -> None:
    rest, urls = Rest(servers[0], tmp_path), ",".join(server.url for server in servers)
    (tmp_path / JOINED_FILE).mkdir()
    try:
        with pytest.raises(ConfigError, match="they get no actors yet: mend that and repeat"):
            rest.join(urls)
        assert not rest.redirected
        (tmp_path / JOINED_FILE).rmdir()
        rest.join(urls)
        assert rest.redirected == [urls] and len(rest.mirror._logs) == 2
        assert (tmp_path / JOINED_FILE).read_text().split() == [servers[1].url]
    finally:
        rest.close()


@pytest.mark.parametrize("order", ["", "[]", "{}", '{"id": "../../x", "redis": "redis://a:1"}'])
def test_an_order_that_is_none_is_dropped(
    order: str, servers: list[EmbeddedServer], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rest = Rest(servers[0], tmp_path)
    try:
        rest.joining.heed()
        assert "join_refused" not in caplog.text
        (tmp_path / ORDER_FILE).write_text(order)
        rest.joining.heed()
        assert "join_refused" in caplog.text and not (tmp_path / ORDER_FILE).exists()
    finally:
        rest.close()
