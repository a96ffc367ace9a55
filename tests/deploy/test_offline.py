"""Training from replays that are only read."""

from __future__ import annotations

import io
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from deploy.cli import main, parse_train
from deploy.config import FILE_NAME, ConfigError, TrainConfig, load_config, save_config, with_values
from deploy.launch import record_schema
from deploy.offline import Source, make_learner, make_mirror, require_columns
from deploy.presets import preset
from deploy.probe import EnvFacts
from deploy.progress import line, view
from deploy.secretscmd import SecretsOptions, make_secrets
from deploy.servers import replay_server
from dreamer.spaces import DiscreteAction, VectorSpec
from learner.checkpoint import load_newest
from learner.files import read_rows
from replay_service import (
    Archive,
    ArchiveLog,
    Chunk,
    CreditLimiter,
    EmbeddedServer,
    Limits,
    Mirror,
    ReplayClient,
    ReplayConfig,
    Schema,
    ServerLog,
    Uploader,
    address_for,
    check_mirror,
    check_server,
    encode_chunk,
    export_archive,
)
from tests.replay_service.records import absorb_until

pytestmark = pytest.mark.integration

FACTS = EnvFacts(
    obs_space={"vector": VectorSpec(shape=(4,))},
    action_space={"action": DiscreteAction(classes=2)},
    action_repeat=1,
)
STEPS, CHUNK = 96, 16
NAMING = b"client|setinfo"
CAPACITY = 320
"""Steps that the server of a test with evictions keeps."""


def cartpole() -> TrainConfig:
    return with_values(
        preset("v3-cartpole", "debug"),
        {"replay.redis_memory_bytes": 2**26, "learner.batch_size": 2, "learner.batch_length": 8},
    )


def fill(client: ReplayClient, schema: Schema, stream: str = "actor-0") -> None:
    """Insert episodes of twelve steps, as CartPole would look."""
    rng = np.random.default_rng(0)
    client.create(schema, Limits(capacity_steps=1000, capacity_bytes=2**24))
    for seq in range(1, STEPS // CHUNK + 1):
        steps = np.arange((seq - 1) * CHUNK, seq * CHUNK)
        columns: dict[str, Any] = {
            c.name: np.zeros((CHUNK, *c.shape), c.dtype) for c in schema.columns
        }
        columns["vector"] = rng.normal(size=(CHUNK, 4)).astype(np.float32)
        columns["reward"] = (steps % 12 > 0).astype(np.float32)
        columns["is_first"], columns["is_last"] = steps % 12 == 0, steps % 12 == 11
        chunk = Chunk(stream, 1, seq, int(steps[0]), columns)
        blob = encode_chunk(chunk, schema)
        assert client.insert(schema, chunk.sid, seq, CHUNK, blob).code == "OK"


@pytest.fixture
def source(tmp_path: Path) -> Iterator[tuple[Path, ReplayClient, str]]:
    """A run whose server is up, and holds 96 steps of DreamerV3's records."""
    config, run = cartpole(), tmp_path / "source"
    save_config(config, run / FILE_NAME)
    with replay_server(config, run) as url:
        client = ReplayClient(url)
        fill(client, record_schema(config, FACTS))
        yield run, client, url
        client.close()


def test_a_mirror_of_an_archive_is_that_of_its_server(
    source: tuple[Path, ReplayClient, str], tmp_path: Path
) -> None:
    _, client, _ = source
    export_archive(client, tmp_path / "dump")
    mirrors = [
        Mirror(log, client.schema(), capacity_steps=200, window_steps=9, placement="ram")
        for log in (ArchiveLog(Archive(tmp_path / "dump")), ServerLog(client))
    ]
    for mirror in mirrors:
        mirror.start()
        absorb_until(mirror, lambda mirror=mirror: mirror.caught_up)
        mirror.stop()
        assert check_mirror(mirror, client).ok
    first, second = mirrors
    assert first.size_steps == second.size_steps == STEPS and first.valid_starts == STEPS - 8
    for name, column in first.columns.items():
        rows = np.concatenate([rows for *_, rows in first.held()])
        assert (column[rows] == second.columns[name][rows]).all(), name


def test_reading_leaves_the_server_as_it_is(source: tuple[Path, ReplayClient, str]) -> None:
    _, client, _ = source
    fence = client.acquire_fence()
    before = client.stats()
    mirror = Mirror(
        ServerLog(client),
        client.schema(),
        keep=("vector", "reward", "is_first", "is_last", "is_terminal"),
        capacity_steps=200,
        window_steps=9,
        placement="ram",
    )
    mirror.start()
    absorb_until(mirror, lambda: mirror.caught_up)
    mirror.stop()
    assert sorted(mirror.columns) == ["is_first", "is_last", "is_terminal", "reward", "vector"]
    assert client.stats() == before
    client.settle(fence, 10, 1000)  # the learner that paces the replay is not fenced out


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_agents_train_from_one_live_replay_which_stays_as_it_is(
    source: tuple[Path, ReplayClient, str], tmp_path: Path
) -> None:
    run, client, _ = source
    fence, before = client.acquire_fence(), client.stats()
    flags = ["--updates", "6", "--learner.log-every-s", "0.1"]
    flags += ["--learner.batch-size", "2", "--learner.batch-length", "8"]
    first, second = tmp_path / "v3", tmp_path / "v2"
    assert main(["train", "--offline", str(run), *flags, "--run-dir", str(first)]) == 0
    other = ["--preset", "v2-dmc-proprio", "--size", "debug"]
    assert main(["train", "--offline", str(run), *other, *flags, "--run-dir", str(second)]) == 0
    for directory, agent in ((first, "v3"), (second, "v2")):
        config = load_config(directory / FILE_NAME)
        assert (config.agent.name, config.env) == (agent, "CartPole-v1")
        saved = load_newest(directory / "checkpoints")
        assert saved is not None and saved.manifest["update"] == 6
        assert read_rows(directory / "metrics.jsonl")[-1]["updates"] == 6
        assert not read_rows(directory / "scores.jsonl")
        assert (directory / "curve.png").stat().st_size > 0
    assert client.stats() == before
    client.settle(fence, 10, 1000)  # the learner that paces the replay is not fenced out
    assert main(["train", "--run-dir", str(first), "--updates", "8"]) == 0
    saved = load_newest(first / "checkpoints")
    assert saved is not None and saved.manifest["update"] == 8


@dataclass
class Settled:
    """What the learner that paces a replay has told its server last."""

    fence: int
    updates: int
    limiter: CreditLimiter


@contextmanager
def paced(actor: ReplayClient, learner: ReplayClient, schema: Schema) -> Iterator[Settled]:
    """Fill a replay without end, at the pace of a learner that settles every few milliseconds."""
    limiter = CreditLimiter(
        train_ratio=1,
        batch_steps=CHUNK,
        chunk_steps=CHUNK,
        min_size_steps=96,
        capacity_steps=CAPACITY,
    )
    limits = Limits(capacity_steps=CAPACITY, capacity_bytes=2**24, budget_steps=limiter.budget(0))
    learner.create(schema, limits)
    settled = Settled(learner.acquire_fence(), 0, limiter)
    full, paid = threading.Event(), threading.Event()
    failed: list[BaseException] = []

    def pace() -> None:
        try:
            while not paid.wait(0.01):
                replayed = limiter.replayed_steps(settled.updates)
                budget = limiter.budget(settled.updates)
                inserted, size = learner.settle(settled.fence, replayed, budget)
                settled.updates += limiter.may_start_update(size, inserted, settled.updates)
        except BaseException as error:
            failed.append(error)

    def act(uploader: Uploader) -> None:
        rng, step = np.random.default_rng(0), 0
        writer = uploader.open_stream("actor-0")
        while not full.is_set():
            row = {c.name: np.zeros(c.shape, c.dtype) for c in schema.columns}
            row["vector"] = rng.normal(size=4).astype(np.float32)
            row["is_first"], row["is_last"] = np.bool_(step % 12 == 0), np.bool_(step % 12 == 11)
            writer.append(row)
            step += 1

    with Uploader(actor, schema, ReplayConfig(chunk_steps=CHUNK)) as uploader:
        pacer = threading.Thread(target=pace)
        writer = threading.Thread(target=act, args=(uploader,))
        pacer.start()
        writer.start()
        try:
            yield settled
        finally:
            full.set()
            writer.join(30.0)
            drained = uploader.drain(30.0)
            paid.set()
            pacer.join(30.0)
        assert drained and not failed, failed
        learner.settle(
            settled.fence,
            limiter.replayed_steps(settled.updates),
            limiter.budget(settled.updates),
        )
        assert learner.stats().inserted_steps == uploader.stats.steps


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_another_agent_trains_while_the_replay_is_filled_and_has_no_part_in_its_account(
    tmp_path: Path,
) -> None:
    make_secrets(SecretsOptions(directory=tmp_path / "secrets"))
    # All that the reader's machine has to hold: it could not log in as anybody else.
    (tmp_path / "readers").mkdir(mode=0o700)
    for name in ("reader.password", "ca.crt"):
        shutil.copy(tmp_path / "secrets" / name, tmp_path / "readers")
    config = with_values(cartpole(), {"replay.secrets": tmp_path / "secrets"})
    schema, run, other = record_schema(config, FACTS), tmp_path / "source", tmp_path / "v2"
    save_config(config, run / FILE_NAME)
    words = ["--offline", str(run), "--preset", "v2-dmc-proprio", "--size", "debug"]
    words += ["--updates", "1000000", "--run-dir", str(other), "--learner.log-every-s", "0.1"]
    words += ["--learner.batch-size", "2", "--learner.batch-length", "8"]
    words += ["--learner.mode", "eager", "--replay.secrets", str(tmp_path / "readers")]
    with replay_server(config, run) as url:
        actor, learner, admin = (
            ReplayClient(address_for(url, config.replay, role))
            for role in ("actor", "learner", "admin")
        )
        with closing(actor), closing(learner), closing(admin):
            with paced(actor, learner, schema) as settled:
                reader = subprocess.Popen(
                    [sys.executable, "-m", "deploy.cli", "train", *words],
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                )
                try:
                    first, last = trained_through(other, reader, 2 * CAPACITY)
                    reader.send_signal(signal.SIGTERM)
                    assert reader.wait(120) == 128 + signal.SIGTERM
                finally:
                    reader.kill()
                    reader.wait()
            stats, report = admin.stats(), check_server(admin)
            log = admin._command("ACL", "LOG")
        # More than the server holds went by while it trained: what it began with was evicted.
        assert last["updates"] > first["updates"] and stats.evicted_steps > CAPACITY
        saved = load_newest(other / "checkpoints")
        assert saved is not None and saved.manifest["update"] >= last["updates"]
        # Nor has it tried more than a reader may; the library of Redis says its name unasked.
        refused = {(row[row.index(b"username") + 1], row[row.index(b"object") + 1]) for row in log}
        assert report.ok and {what for who, what in refused if who == b"reader"} <= {NAMING}
        # The account is that of the one learner that paces the replay, to the last step.
        limiter = settled.limiter
        assert settled.updates > 0 and stats.fence == settled.fence
        assert stats.replayed_steps == limiter.replayed_steps(settled.updates)
        assert stats.budget_steps == limiter.budget(settled.updates)
        assert stats.inserted_steps - stats.evicted_steps == stats.size_steps <= CAPACITY
        assert (stats.duplicates, stats.gaps) == (0, 0)


def trained_through(
    run: Path, process: subprocess.Popen[bytes], steps: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Wait until so many steps have come between the first and the last row, and return both."""
    deadline = time.monotonic() + 200
    while True:
        assert process.poll() is None, "the reader has ended"
        file = run / "metrics.jsonl"
        rows = read_rows(file) if file.exists() else []
        if rows and rows[-1]["env_steps"] - rows[0]["env_steps"] >= steps:
            return rows[0], rows[-1]
        assert time.monotonic() < deadline, rows[-1:]
        time.sleep(0.2)


def test_a_server_that_cannot_be_followed_is_named_while_training_goes_on(tmp_path: Path) -> None:
    config = with_values(cartpole(), {"offline": "both", "updates": 5})
    schema = record_schema(config, FACTS)
    servers = [EmbeddedServer(tmp_path / name, max_memory_bytes=2**26) for name in ("one", "two")]
    with servers[0], servers[1]:
        clients = [ReplayClient(server.url) for server in servers]
        for number, client in enumerate(clients):
            fill(client, schema, f"actor-{number}")
        source = Source(log=[ServerLog(client) for client in clients], schema=schema, steps=None)
        mirror = make_mirror(config, source, schema, tmp_path)
        mirror.start()
        absorb_until(mirror, lambda: mirror.size_steps == 2 * STEPS)
        learner = make_learner(config, tmp_path, FACTS, mirror)
        assert learner.snapshot().inserts_wait == ""
        servers[1].stop()
        absorb_until(mirror, lambda: mirror.trouble)
        snapshot = learner.snapshot()
        assert snapshot.inserts_wait.startswith("new steps are not read: ")
        assert clients[1].address in snapshot.inserts_wait
        assert clients[0].address not in snapshot.inserts_wait and not snapshot.waiting_for
        assert snapshot.inserts_wait in line(asdict(snapshot))
        console = Console(width=400, record=True, file=io.StringIO())
        console.print(view(asdict(snapshot)))
        assert snapshot.inserts_wait in console.export_text()
        mirror.stop()
        learner.recorder.close()
        for client in clients:
            client.close()


def test_what_an_agent_lacks_in_a_replay_is_named_with_the_way_out() -> None:
    config = with_values(cartpole(), {"offline": "dump"})
    wanted = record_schema(config, FACTS)
    bare = Schema(tuple(c for c in wanted.columns if c.name not in ("deter", "stoch")))
    with pytest.raises(ConfigError, match=r"deter: float16.*missing.*--agent.context 0") as error:
        require_columns(config, wanted, bare)
    assert "--env" not in str(error.value)
    other = Schema(tuple(c for c in wanted.columns if c.name != "vector"))
    with pytest.raises(ConfigError, match=r"v3 on CartPole-v1: it lacks vector.*--environment"):
        require_columns(config, wanted, other)
    require_columns(config, bare, wanted)


@pytest.mark.parametrize(
    ("steps", "length", "hint"),
    [(0, 8, "is empty"), (STEPS, 200, "96 steps and no stretch of 201.*--learner.batch-length")],
)
def test_replays_without_a_window_are_refused(
    source: tuple[Path, ReplayClient, str], tmp_path: Path, steps: int, length: int, hint: str
) -> None:
    from deploy.offline import require_windows

    _, client, _ = source
    config = with_values(cartpole(), {"offline": "dump", "learner.batch_length": length})
    mirror = Mirror(ServerLog(client), client.schema(), capacity_steps=500, window_steps=length + 1)
    if steps:
        mirror.start()
        absorb_until(mirror, lambda: mirror.caught_up)
        mirror.stop()
    with pytest.raises(ConfigError, match=hint):
        require_windows(config, mirror)


@pytest.mark.parametrize(
    ("flags", "hint"),
    [
        (["--learner.batch-length", "200"], "no stretch of 201"),
        (["--learner.mode", "graph", "--device", "cpu"], "needs a CUDA device"),
    ],
)
def test_an_offline_run_that_is_refused_leaves_nothing(
    source: tuple[Path, ReplayClient, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    hint: str,
) -> None:
    words = ["train", "--offline", str(source[0]), "--updates", "6", *flags]
    assert main([*words, "--run-dir", str(tmp_path / "off")]) == 2
    assert hint in capsys.readouterr().err
    assert not (tmp_path / "off").exists()


def test_the_source_brings_environment_and_agent_unless_a_preset_is_named(tmp_path: Path) -> None:
    source = with_values(
        preset("v3-dmc-proprio", "debug"),
        {"env": "dmc:cheetah-run", "environment.action_repeat": 4, "run_dir": tmp_path / "x"},
    )
    save_config(source, tmp_path / "x" / FILE_NAME)
    same = parse_train(["--offline", str(tmp_path / "x"), "--updates", "5"])
    assert (same.agent, same.env, same.run_dir) == (source.agent, source.env, None)
    assert same.directory == Path("runs/v3-dmc-proprio-dmc-cheetah-run-debug-offline-0")
    other = parse_train(["--offline", str(tmp_path / "x"), "--preset", "v2-dmc-proprio"])
    assert (other.agent.name, other.env) == ("v2", "dmc:cheetah-run")
    assert other.environment.action_repeat == 4
    assert same.target_updates == 5
    assert other.target_updates == other.steps * 160 // (16 * 50)


@pytest.mark.parametrize(
    ("values", "hint"),
    [
        ({"updates": 5}, "give --offline SOURCE"),
        ({"updates": 0, "offline": "dump"}, "at least 1"),
        ({"offline": "dump", "lockstep": True}, "--lockstep"),
    ],
)
def test_flags_that_make_no_sense_together_are_refused(values: dict[str, Any], hint: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(hint)):
        with_values(preset("v3-cartpole"), values)


def test_a_run_is_not_its_own_source_nor_one_without_a_replay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    save_config(with_values(cartpole(), {"offline": "elsewhere"}), run / FILE_NAME)
    assert (
        main(["train", "--offline", str(run), "--preset", "v3-cartpole", "--run-dir", str(run)])
        == 2
    )
    assert "is the run directory itself" in " ".join(capsys.readouterr().err.split())
