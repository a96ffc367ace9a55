"""Every right of every role is needed: without it, something that the role is for fails."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import pytest

from deploy.config import with_values
from deploy.offline import open_source
from deploy.presets import preset
from deploy.secretscmd import SecretsOptions, make_secrets
from replay_service import (
    EmbeddedServer,
    ReplayAuthError,
    ReplayClient,
    ReplayConfig,
    ServerLog,
    encode_chunk,
)
from replay_service.client import INLINE_BYTES, StreamEnd
from replay_service.config import Limits
from replay_service.discovery import live_targets
from replay_service.exporter import ReplayWatch
from replay_service.security import ROLES, Role, RoleName, acl_rules, address_for
from tests.replay_service.records import SCHEMA, absorb_until, chunk, insert, insert_many
from tests.replay_service.test_mirror import following

LIMITS = Limits(capacity_steps=1500, capacity_bytes=2**24, min_size_steps=16, budget_steps=3000)
LARGE = 600
"""Steps of a chunk that does not travel with its commit."""


class Bench:
    """A guarded server, and clients of its roles."""

    def __init__(self, server: EmbeddedServer, config: ReplayConfig) -> None:
        assert config.secrets is not None
        self.url, self.secrets = server.url, config.secrets
        self._config = config
        self.admin = self.client("admin")

    def client(self, role: RoleName, kind: type[ReplayClient] = ReplayClient) -> ReplayClient:
        return kind(address_for(self.url, self._config, role), timeout_s=5.0)

    def allow(self, role: RoleName) -> None:
        """Give a user the rights that `ROLES` says."""
        words = re.findall(r"\([^)]*\)|\S+", acl_rules(role))
        self.admin._command("ACL", "SETUSER", role, "clearselectors", *words)

    def empty(self) -> None:
        self.admin._command("FLUSHALL")
        self.admin._command("FUNCTION", "FLUSH")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    root: Path = tmp_path_factory.mktemp("roles")
    make_secrets(SecretsOptions(directory=root / "secrets"))
    config = ReplayConfig(secrets=root / "secrets")
    with ExitStack() as stack:
        server = EmbeddedServer(root, max_memory_bytes=2**28, secrets=config.secrets)
        made = Bench(stack.enter_context(server), config)
        yield stack.enter_context(closing(made.admin)) and made


def insert_large(client: ReplayClient, slot: int, seq: int) -> str:
    made = chunk(slot, seq, LARGE)
    blob = encode_chunk(made, SCHEMA, "raw")
    assert len(blob) > INLINE_BYTES
    return client.insert(SCHEMA, made.sid, seq, LARGE, blob).code


def act(bench: Bench) -> None:
    """Do all that an actor does, also what it seldom has to."""
    admin = bench.admin
    admin.create(SCHEMA, LIMITS)
    with closing(bench.client("actor")) as actor:
        assert actor.check() and actor.schema() == SCHEMA
        actor.register("process", 1000, "{}")
        actor.register("process", 0, "")
        assert actor.open_stream("s0") == 1
        insert_many(actor, 0, 2)
        assert insert(actor, chunk(0, 1)) == "DUP"
        assert actor.open_stream("s0") == 2
        assert insert_large(actor, 1, 1) == "OK"
        # Somebody's payload of another length is in the way, and an entry that is none of ours.
        admin._command("SET", actor.payload_key("s1@1", 2), "short")
        admin._command("XADD", "{rp0}:log", "*", "x", "1")
        while (code := insert_large(actor, 1, 2)) == "NOPAYLOAD":
            continue
        assert code == "OK"
        actor.close_stream("s1@1", 2)
        # The closed streams go with their last chunks.
        insert_many(actor, 2, 180)
        assert actor.stats().evicted_steps > 0
        assert admin._command("HKEYS", "{rp0}:seq") == [b"s2@1"]
        admin.settle(admin.acquire_fence(), 0, 8)
        reply = actor.insert(SCHEMA, "s2@1", 181, 8, encode_chunk(chunk(2, 181), SCHEMA))
        assert reply.code == "WAIT"
        admin.settle(admin.acquire_fence(), 0, 10_000)
        assert actor.wait_settlement(reply.values[2].decode(), 1.0)


def learn(bench: Bench) -> None:
    """Do all that a learner does, also what it seldom has to."""
    admin = bench.admin
    with closing(bench.client("learner")) as learner:
        assert learner.check() and learner.create(SCHEMA, LIMITS, token="mine")
        assert not learner.create(SCHEMA, LIMITS)
        fence = learner.acquire_fence()
        ends = [StreamEnd("s0", 1, 0, False), StreamEnd("s9", 1, 4, True)]
        account = {"inserted_steps": 16, "put_back_steps": 16, "replayed_steps": 0}
        there = learner.restore(fence, "mine", **account, budget_steps=10**6, streams=ends)
        assert there == [0, 4] and learner.restored(fence) == 0
        assert learner.schema() == SCHEMA
        insert_many(admin, 0, 3)
        admin.close_stream("s0@1", 3)
        learner.settle(fence, 8, 10_000)
        assert learner.stats().size_steps == 24 and learner.memory()[1]
        entries = learner.read_log("0", 10, 0.01)
        assert learner.last_log_id() == entries[-1].entry_id
        admin._command("APPEND", entries[0].key, "more")
        assert None not in learner.fetch(entries)
        learner.quarantine(entries[0], b"", "a test")
        learner.register("process", 1000, "{}")
        learner.register("process", 0, "")
        assert learner.evict(0, 0) == 24
        assert not admin._command("HEXISTS", "{rp0}:seq", "s0@1")


def read(bench: Bench) -> None:
    """Do all that training from the replay of others does."""
    admin = bench.admin
    admin.create(SCHEMA, LIMITS)
    insert_many(admin, 0, 3)
    admin._command("APPEND", admin.payload_key("s0@1", 1), "more")
    with closing(bench.client("reader")) as reader:
        assert reader.check() and reader.schema() == SCHEMA and reader.stats().size_steps == 24
        log = ServerLog(reader)
        with following(log) as mirror:
            absorb_until(mirror, lambda: mirror.caught_up)
            assert mirror.size_steps == 16 and mirror.missed_steps == 8
        # As it does where another thread would have failed.
        entries = log.read_log("0", 10, 0.01)
        assert log.last_log_id() == entries[-1].entry_id and None not in log.fetch(entries)


def watch(bench: Bench) -> None:
    """Do all that the service with metrics, redis_exporter and health checks of containers do."""
    admin = bench.admin
    admin.create(SCHEMA, LIMITS)
    insert_many(admin, 0, 1)
    admin.quarantine(admin.read_log("0", 1, 0.01)[0], b"", "a test")
    made = bench.client("exporter", ReplayWatch)
    assert isinstance(made, ReplayWatch)
    with closing(made) as exporter:
        assert exporter.check() and exporter.facts().quarantined_chunks == 1
        exporter.admits()
        assert exporter.stats().size_steps == 8 and live_targets(exporter) == []
        for line in ("PING", "SLOWLOG LEN", "SLOWLOG GET 1", "LATENCY LATEST"):
            exporter._command(*line.split())


WORK: dict[RoleName, Callable[[Bench], None]] = {
    "actor": act,
    "reader": read,
    "learner": learn,
    "exporter": watch,
}


def without_one(role: Role) -> Iterator[tuple[str, Role]]:
    """Yield the role without one of its rights, for each of them, and which that is."""
    for name in role.functions:
        yield name, replace(role, functions=tuple(one for one in role.functions if one != name))
    for name in role.commands.split():
        yield name, replace(role, commands=_left(role.commands, name))
    for keys, commands in role.on_keys.items():
        for name in commands.split():
            others = {**role.on_keys, keys: _left(commands, name)}
            yield (
                f"{name} on {keys}",
                replace(role, on_keys={key: words for key, words in others.items() if words}),
            )


def _left(words: str, word: str) -> str:
    return " ".join(one for one in words.split() if one != word)


@pytest.mark.parametrize("role", WORK)
def test_each_right_is_needed(
    role: RoleName, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.allow(role)
    bench.empty()
    WORK[role](bench)
    whole, needless = ROLES[role], []
    for right, less in without_one(whole):
        monkeypatch.setitem(ROLES, role, less)
        bench.allow(role)
        bench.empty()
        try:
            WORK[role](bench)
        except ReplayAuthError:
            continue
        needless.append(right)
    assert needless == []


@pytest.mark.parametrize("role", ["reader", "admin"])
def test_offline_training_needs_no_password_but_the_readers_or_in_older_secrets_the_admins(
    role: RoleName, bench: Bench, tmp_path: Path
) -> None:
    bench.allow("reader")
    bench.empty()
    bench.admin.create(SCHEMA, LIMITS)
    insert_many(bench.admin, 0, 3)
    shutil.copy(bench.secrets / f"{role}.password", tmp_path)
    values = {"offline": bench.url, "replay.secrets": tmp_path}
    with open_source(with_values(preset("v3-cartpole"), values)) as source:
        assert source.schema == SCHEMA
        with following(source.log[0]) as mirror:
            absorb_until(mirror, lambda: mirror.caught_up)
            assert mirror.size_steps == 24


def test_every_role_but_the_admin_is_tried() -> None:
    assert WORK.keys() == ROLES.keys() - {"admin"}
