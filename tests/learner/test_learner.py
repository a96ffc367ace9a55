"""The learner against a real server, with experience written by the test instead of actors."""

import io
import itertools
import json
import logging
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
import torch
from rich.console import Console

from deploy.launch import count_on, resume
from deploy.progress import view
from deploy.servers import create_replay, take_fence
from dreamer.agent import Agent, make_agent, record_columns
from dreamer.presets import agent_config
from dreamer.spaces import DiscreteAction, ImageSpec, VectorSpec
from dreamer.weights import PackedWeights
from learner.checkpoint import load_newest
from learner.config import LearnerConfig
from learner.files import read_rows
from learner.gif import caption_of
from learner.learner import Learner, LearnerError, RunFacts
from learner.pace import FreePace
from learner.publish import Publisher
from learner.record import Recorder
from learner.status import write_status
from learner.step import UpdateStep
from replay_service import (
    Column,
    EmbeddedServer,
    Mirror,
    ReplayClient,
    ReplayClosed,
    ReplayConfig,
    Reseeder,
    SamplingConfig,
    Schema,
    Uploader,
    check_server,
    plan_limits,
)

pytestmark = pytest.mark.integration

OBS: dict[str, Any] = {"vector": VectorSpec(shape=(3,)), "image": ImageSpec(shape=(64, 64, 3))}
ACTION: dict[str, Any] = {"action": DiscreteAction(classes=2)}
CONFIG = LearnerConfig(
    batch_size=2, batch_length=8, publish_every_updates=5, log_every_s=0.1, video_every_s=0.0
)
REPLAY = ReplayConfig(
    capacity_steps=2000, chunk_steps=16, min_size_steps=64, redis_memory_bytes=256 * 2**20
)
EPISODE = 10


@dataclass
class Stand:
    """One learner with everything it needs, on an own client."""

    learner: Learner
    client: ReplayClient
    mirror: Mirror
    recorder: Recorder
    schema: Schema
    sent: list[tuple[int, int]]

    def close(self) -> None:
        self.mirror.stop()
        self.recorder.close()
        self.client.close()


def make_schema() -> Schema:
    columns = record_columns(agent_config("v3", "debug"), OBS, ACTION)
    return Schema(tuple(Column(*column) for column in columns))


def make_stand(
    url: str,
    directory: Path,
    target: int,
    config: LearnerConfig = CONFIG,
    sampling: SamplingConfig | None = None,
) -> Stand:
    torch.manual_seed(0)
    agent: Agent = make_agent(agent_config("v3", "debug"), OBS, ACTION)
    schema, client, sent = make_schema(), ReplayClient(url), list[tuple[int, int]]()
    window = config.batch_length + agent.config.context
    limits, limiter = plan_limits(
        REPLAY,
        schema,
        train_ratio=2,
        batch_size=config.batch_size,
        batch_length=config.batch_length,
        window_steps=window,
        streams=1,
    )
    create_replay(client, schema, limits, directory)
    mirror = Mirror(
        client,
        schema,
        capacity_steps=REPLAY.capacity_steps,
        window_steps=window,
        sampling=sampling,
    )
    mirror.start()

    def send(weights: PackedWeights) -> bool:
        sent.append(weights.version)
        return True

    fence, recorder = take_fence(client, directory), Recorder(directory)
    learner = Learner(
        config,
        RunFacts(directory=directory, seed=1, target_steps=target, config_hash="x"),
        agent=agent,
        step=UpdateStep(agent, mirror, batch_size=config.batch_size, batch_length=8),
        mirror=mirror,
        client=client,
        limiter=limiter,
        pace=FreePace(mirror, limiter),
        publisher=Publisher(agent, send, fence=fence, config_hash="x", dtype=torch.bfloat16),
        recorder=recorder,
        fence=fence,
        reseeder=Reseeder(client, lambda: ReplayClient(url), mirror, limits, fence=fence),
    )
    return Stand(learner, client, mirror, recorder, schema, sent)


def records(schema: Schema) -> Iterator[dict[str, Any]]:
    """Yield episodes of ten records, each with reward 1 from its second record on."""
    rng = np.random.default_rng(0)
    while True:
        for index in range(EPISODE):
            record: dict[str, Any] = {c.name: np.zeros(c.shape, c.dtype) for c in schema.columns}
            record["image"] = rng.integers(0, 255, (64, 64, 3), np.uint8)
            record["reward"] = np.float32(index > 0)
            record["is_first"] = np.bool_(index == 0)
            record["is_last"] = record["is_terminal"] = np.bool_(index == EPISODE - 1)
            yield record


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedServer]:
    with EmbeddedServer(tmp_path / "replay", max_memory_bytes=256 * 2**20) as running:
        yield running


@pytest.fixture
def feed(server: EmbeddedServer) -> Iterator[None]:
    """Write records in the background until the test ends; the server's budget holds them back."""
    client = ReplayClient(server.url)
    create = make_stand_limits(client)
    uploader = Uploader(client, create, REPLAY)

    def write() -> None:
        try:
            writer = uploader.open_stream("actor-0")
            for record in records(create):
                writer.append(record)
        except ReplayClosed:
            return

    thread = threading.Thread(target=write)
    thread.start()
    yield
    uploader.interrupt()
    thread.join(10)
    uploader.close(0)
    client.close()


def make_stand_limits(client: ReplayClient) -> Schema:
    """Create the replay as the learner will, so that the feed may start first."""
    schema = make_schema()
    limits, _ = plan_limits(
        REPLAY, schema, train_ratio=2, batch_size=2, batch_length=8, window_steps=9, streams=1
    )
    client.create(schema, limits)
    return schema


@pytest.mark.usefixtures("feed")
def test_a_run_reaches_its_target_at_the_ratio_and_leaves_its_files(
    server: EmbeddedServer, tmp_path: Path
) -> None:
    stand = make_stand(server.url, tmp_path, target=400)
    try:
        assert stand.learner.run() == "finished"
        learner = stand.learner
        assert 400 <= learner.env_steps < 400 + REPLAY.chunk_steps
        owed = learner.limiter.drift(learner.env_steps, learner.updates)
        assert -learner.limiter.tol_s <= owed < learner.limiter.batch_steps
        assert stand.sent[0] == (1, 0)
        assert stand.sent == sorted(stand.sent)
        snapshot = learner.snapshot()
    finally:
        stand.close()
    assert snapshot.phase == "finished"
    assert snapshot.return_mean20 == pytest.approx(EPISODE - 1)
    scores = read_rows(tmp_path / "scores.jsonl")
    assert {row["return"] for row in scores} == {EPISODE - 1}
    assert {row["end"] for row in scores} == {"terminated"}
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert rows[-1]["updates"] == learner.updates
    assert "loss/rec" in rows[-1]
    saved = load_newest(tmp_path / "checkpoints")
    assert saved is not None
    assert saved.manifest["update"] == learner.updates


@pytest.mark.usefixtures("feed")
def test_losses_become_priorities_which_a_checkpoint_keeps(
    server: EmbeddedServer, tmp_path: Path
) -> None:
    sampling = SamplingConfig(prioritised=0.5)
    first = make_stand(server.url, tmp_path, target=300, sampling=sampling)
    first.learner.run()
    [(sid, step, values)] = first.mirror.priority_state()["held"]
    first.close()
    trained = values != 1.0
    assert trained.mean() > 0.5 and (values > 0).all(), "300 steps were trained on twice on average"
    again = make_stand(server.url, tmp_path, target=300, sampling=sampling)
    absorb_log(again)
    saved = load_newest(tmp_path / "checkpoints")
    assert saved is not None
    again.learner.restore(saved)
    [(sid_now, step_now, now)] = again.mirror.priority_state()["held"]
    again.close()
    assert (sid_now, step_now) == (sid, step)
    np.testing.assert_array_equal(now[: len(values)], values)


def absorb_log(stand: Stand) -> None:
    """Rebuild a mirror from what the server holds."""
    deadline = time.monotonic() + 20
    while not stand.mirror.caught_up:
        assert time.monotonic() < deadline
        stand.mirror.wait(0.2)
        stand.mirror.absorb()


@pytest.mark.usefixtures("feed")
def test_a_resumed_run_continues_counters_replay_and_scores(
    server: EmbeddedServer, tmp_path: Path
) -> None:
    first = make_stand(server.url, tmp_path, target=300)
    first.learner.run()
    first.close()
    weights = {k: v.clone() for k, v in first.learner.agent.state_dict().items()}
    second = make_stand(server.url, tmp_path, target=500)
    try:
        while not second.mirror.caught_up:
            assert second.mirror.wait(5)
            second.recorder.score(second.mirror.absorb())
        saved = load_newest(tmp_path / "checkpoints")
        assert saved is not None
        second.learner.restore(saved)
        assert second.learner.updates == first.learner.updates
        assert second.learner.env_steps == first.learner.env_steps
        assert second.learner.fence > first.learner.fence
        restored = second.learner.agent.state_dict()
        assert all(torch.equal(restored[k], v) for k, v in weights.items())
        assert second.learner.run() == "finished"
        assert second.learner.env_steps >= 500
    finally:
        second.close()
    steps = [(row["env_steps"], row["actor"]) for row in read_rows(tmp_path / "scores.jsonl")]
    assert steps == sorted(steps)
    episodes = len(steps)
    assert abs(episodes - second.learner.env_steps / EPISODE) <= 2


def test_a_run_that_is_continued_says_how_far_its_mirror_is(
    server: EmbeddedServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "deploy.launch")
    first = make_stand(server.url, tmp_path, target=10**6)
    with writing(first, 96):
        pass
    held = first.client.stats().size_steps
    first.close()
    quick = make_stand(server.url, tmp_path, target=10**6)
    resume(quick.learner, tmp_path, held)
    quick.close()
    assert "rebuilding" not in caplog.text and not (tmp_path / "status.json").exists()

    monkeypatch.setattr("deploy.launch.REBUILDING_EVERY_S", 0.0)
    slow = make_stand(server.url, tmp_path, target=10**6)
    slow.mirror.stop()
    slow.mirror = slow.learner.mirror = Mirror(  # which takes one chunk after the other
        slow.client, slow.schema, capacity_steps=2000, window_steps=9, queue_bytes=1
    )
    slow.mirror.start()
    try:
        resume(slow.learner, tmp_path, held)
        snapshot = json.loads((tmp_path / "status.json").read_text())
    finally:
        slow.close()
    found = re.findall(
        rf"mirror_rebuilding updates wait for the mirror: (\d+) of the {held} steps in the log "
        r"are read \((\d+)%\) for \d+ s",
        caplog.text,
    )
    shares = [int(share) for _, share in found]
    assert found[-1] == (str(held), "100")
    assert shares == sorted(shares) and len(set(shares)) > 1
    assert snapshot["waiting_for"].startswith("updates wait for the mirror: ")


@pytest.mark.usefixtures("feed")
def test_a_run_goes_on_when_its_server_loses_everything(
    server: EmbeddedServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stand = make_stand(server.url, tmp_path, target=700)
    ended = list[str]()
    thread = threading.Thread(target=lambda: ended.append(stand.learner.run()))
    thread.start()
    try:
        deadline = time.monotonic() + 60
        while stand.learner.updates < 20:
            assert time.monotonic() < deadline and thread.is_alive()
            time.sleep(0.05)
        with redis.Redis.from_url(server.url) as admin:
            admin.flushall()
        thread.join(90)
        assert ended == ["finished"]
        learner = stand.learner
        assert 700 <= learner.env_steps < 700 + REPLAY.chunk_steps
        # What was inserted before the loss and what was replayed for it both still count.
        owed = learner.limiter.drift(learner.env_steps, learner.updates)
        assert -learner.limiter.tol_s <= owed < learner.limiter.batch_steps
        stats = stand.client.stats()
        assert stats.size_steps == stats.inserted_steps == stand.mirror.size_steps
        assert check_server(stand.client, account=learner.limiter).ok
        scores = read_rows(tmp_path / "scores.jsonl")
        assert len(scores) == learner.env_steps // EPISODE
        said = [r.message for r in caplog.records if r.message.startswith("replay_lost")]
        assert len(said) == 1 and learner.reseeder is not None and learner.reseeder.losses == 1
    finally:
        stand.learner.stop.set()
        thread.join(20)
        stand.close()


def test_a_learner_that_finds_an_empty_server_counts_on(
    server: EmbeddedServer, tmp_path: Path
) -> None:
    first = make_stand(server.url, tmp_path, target=200)
    with writing(first, 208):
        first.learner.run()
    first.close()
    with redis.Redis.from_url(server.url) as admin:
        admin.flushall()
    second = make_stand(server.url, tmp_path, target=400)
    try:
        # Its checkpoints and weights must count as newer than those of the lost lineage.
        assert second.learner.fence > first.learner.fence
        # An actor that has outlived the first learner must not begin the log before it can count.
        early = second.client.insert(second.schema, "actor-0@1", 1, 16, b"early")
        assert early.code == "NONE"
        count_on(second.learner, resume(second.learner, tmp_path))
        assert second.learner.env_steps == first.learner.env_steps == 208
        with writing(second, 192):
            assert second.learner.run() == "finished"
        assert second.learner.env_steps == 400 and second.mirror.size_steps == 192
        # It need not make up for updates that were paid with the steps that are gone.
        assert second.learner.updates > first.learner.updates
        report = check_server(second.client, account=second.learner.limiter)
        assert report.ok and list(report.streams) != ["actor-0@1"], report.violations
        newest = load_newest(tmp_path / "checkpoints")
        assert newest is not None and newest.manifest["fence"] == second.learner.fence
    finally:
        second.close()


@contextmanager
def writing(stand: Stand, steps: int) -> Iterator[None]:
    """Insert so many steps as an actor would, while the block runs."""

    def write() -> None:
        with Uploader(stand.client, stand.schema, REPLAY) as uploader:
            writer = uploader.open_stream("actor-0")
            for record in itertools.islice(records(stand.schema), steps):
                writer.append(record)

    thread = threading.Thread(target=write)
    thread.start()
    yield
    thread.join(20)


@pytest.mark.usefixtures("feed")
def test_a_stop_saves_and_ends_soon(server: EmbeddedServer, tmp_path: Path) -> None:
    stand = make_stand(server.url, tmp_path, target=10**6)
    threading.Timer(2.0, stand.learner.stop.set).start()
    try:
        assert stand.learner.run() == "stopped"
    finally:
        stand.close()
    saved = load_newest(tmp_path / "checkpoints")
    assert saved is not None
    assert saved.manifest["update"] == stand.learner.updates > 0


def test_first_weights_that_did_not_arrive_are_sent_again(
    server: EmbeddedServer, tmp_path: Path
) -> None:
    config = LearnerConfig(batch_size=2, batch_length=8, publish_every_s=0.1)
    stand, attempts = make_stand(server.url, tmp_path, 10**6, config), list[tuple[int, int]]()
    learner = stand.learner

    def send(weights: PackedWeights) -> bool:
        attempts.append(weights.version)
        if len(attempts) == 1:
            raise ConnectionError("the hub is still starting")
        learner.stop.set()
        return True

    learner.publisher = Publisher(
        learner.agent, send, fence=learner.fence, config_hash="x", dtype=torch.float32
    )
    try:
        assert learner.run() == "stopped"
    finally:
        stand.close()
    assert attempts == [(learner.fence, 0)] * 2


@pytest.mark.usefixtures("feed")
def test_a_newer_learner_ends_this_one(server: EmbeddedServer, tmp_path: Path) -> None:
    stand = make_stand(server.url, tmp_path, target=10**6)
    stand.client.acquire_fence()
    try:
        with pytest.raises(LearnerError, match="another learner"):
            stand.learner.run()
    finally:
        stand.close()


def test_a_replaced_learner_that_wakes_up_saves_nothing_however_it_ends(
    server: EmbeddedServer, tmp_path: Path
) -> None:
    zombie = make_stand(server.url, tmp_path, target=64)
    other = make_stand(server.url, tmp_path / "other", target=64)
    folder = tmp_path / "checkpoints"
    try:
        # It has been told to stop, and the successor has not saved yet: only the server knows.
        zombie.learner.stop.set()
        with pytest.raises(LearnerError, match="another learner"):
            zombie.learner._finish()
        assert not folder.exists()
        # And the server cannot be asked, but the folder tells.
        path = other.learner.save()
        assert path is not None
        path.parent.rename(folder)
        zombie.learner.client = ReplayClient(f"unix://{tmp_path}/gone.sock")
        with pytest.raises(LearnerError, match=r"another learner runs; this one stops"):
            zombie.learner.save()
        assert [left.name for left in folder.iterdir()] == [path.name]
    finally:
        zombie.close()
        other.close()


@pytest.mark.usefixtures("feed")
def test_while_its_only_server_is_away_a_run_says_so_until_it_is_back(
    server: EmbeddedServer, tmp_path: Path
) -> None:
    stand = make_stand(server.url, tmp_path, target=10**6)
    learner, directory = stand.learner, tmp_path / "replay"
    end = threading.Thread(target=learner.run)

    def away() -> float | None:
        registry = stand.recorder.exporter.registry
        return registry.get_sample_value("dreamer_replay_servers_away")

    def wait(until: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not until():
            assert time.monotonic() < deadline, (learner.snapshot(), away())
            time.sleep(0.05)

    end.start()
    try:
        wait(lambda: learner.updates > 5 and away() == 0)
        os.kill(server.process_id, signal.SIGKILL)
        wait(lambda: away() == 1 and str(directory) in learner.snapshot().waiting_for)
        snapshot = learner.snapshot()
        for said in (snapshot.waiting_for, snapshot.inserts_wait):
            assert re.search(rf"the server at unix://{directory}/redis.sock .* for \d+ s", said)
        assert snapshot.inserts_wait.startswith("inserts wait: ")
        write_status(tmp_path / "status.json", snapshot)
        shown = Console(width=400, record=True, file=io.StringIO())
        shown.print(view(json.loads((tmp_path / "status.json").read_text())))
        assert snapshot.inserts_wait in shown.export_text()
        before = learner.updates
        server.start()
        wait(lambda: away() == 0 and learner.updates > before + 5)
        assert "server" not in learner.snapshot().waiting_for + learner.snapshot().inserts_wait
    finally:
        learner.stop.set()
        end.join(60)
        stand.close()


@pytest.mark.usefixtures("feed")
def test_a_diverged_run_ends_and_saves_nothing(server: EmbeddedServer, tmp_path: Path) -> None:
    stand = make_stand(server.url, tmp_path, target=10**6)
    with torch.no_grad():
        next(stand.learner.agent.parameters()).fill_(float("nan"))
    try:
        with pytest.raises(LearnerError, match=r"diverged .* in a row .* not finite.*skipped/"):
            stand.learner.run()
        assert stand.learner.skipped_updates >= 3
    finally:
        stand.close()
    saved = max((tmp_path / "skipped").glob("*.npz"))
    assert {"reward", "is_first", "deter"} <= set(np.load(saved))
    assert load_newest(tmp_path / "checkpoints") is None


@pytest.mark.usefixtures("feed")
def test_a_checkpoint_that_fails_is_counted_and_training_goes_on(
    server: EmbeddedServer, tmp_path: Path
) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    config = LearnerConfig(batch_size=2, batch_length=8, checkpoint_every_steps=50)
    stand = make_stand(server.url, tmp_path, target=300, config=config)
    try:
        with pytest.raises(LearnerError, match="final checkpoint"):
            stand.learner.run()
        assert stand.learner.checkpoint_failures >= 2
        assert stand.learner.env_steps >= 300
    finally:
        stand.close()


@pytest.mark.usefixtures("feed")
def test_videos_are_written_while_training(server: EmbeddedServer, tmp_path: Path) -> None:
    config = LearnerConfig(batch_size=2, batch_length=8, video_every_s=1.0, log_every_s=0.1)
    stand = make_stand(server.url, tmp_path, target=300, config=config)
    try:
        stand.learner.run()
    finally:
        stand.close()
    newest = max((tmp_path / "videos").glob("image-*.gif"))
    assert "sees the frames with a green border" in caption_of(newest)
    assert newest.name in (tmp_path / "videos" / "index.html").read_text()
    assert json.loads(json.dumps(stand.learner.snapshot().shares))
