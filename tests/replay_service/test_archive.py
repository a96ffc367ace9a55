"""What was exported comes back exactly, once; what was damaged or does not fit is refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import redis

from replay_service import (
    Archive,
    Column,
    EmbeddedServer,
    EpisodeSummary,
    Limits,
    ReplayClient,
    ReplayConfigError,
    ReplayEmpty,
    ReplayError,
    ReplaySchemaError,
    ReplayTimeout,
    Schema,
    check_archive,
    check_server,
    create_like,
    encode_chunk,
    export_archive,
    import_archive,
)
from replay_service.admin import ReplayAdmin
from replay_service.archive import MANIFEST
from tests.replay_service.records import (
    SCHEMA,
    UNBOUNDED,
    chunk,
    columns,
    insert,
    insert_many,
    renamed,
)

SMALL = Limits(capacity_steps=200, capacity_bytes=2**27)


@pytest.fixture
def cut(client: ReplayClient) -> ReplayClient:
    """A replay whose oldest stream lost its beginning, within an episode, to eviction."""
    client.create(SCHEMA, SMALL)
    client.open_stream("s0", 1)
    client.open_stream("s1", 4)
    insert_many(client, 0, 20)
    for seq in range(1, 9):
        ends = (EpisodeSummary(1.5, seq, "truncated"),) * (seq % 3)
        made = renamed(
            chunk(1, seq, incarnation=4), episodes=ends, version_min=(1, seq), version_max=(2, 9)
        )
        assert insert(client, made) == "OK"
    insert_many(client, 0, 1, start=21)
    assert check_server(client).streams["s0@1"].first_seq > 1
    return client


@pytest.fixture
def other(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReplayClient]:
    """A second replay server, empty."""
    directory = tmp_path_factory.mktemp("other")
    with EmbeddedServer(directory, max_memory_bytes=2**27) as server:
        client = ReplayClient(server.url)
        yield client
        client.close()


def test_everything_comes_back_exactly_even_streams_cut_by_eviction(
    cut: ReplayClient, other: ReplayClient, tmp_path: Path
) -> None:
    before = check_server(cut)
    made = export_archive(cut, tmp_path / "dump")
    assert (made.steps, made.chunks) == (before.steps, before.chunks)
    stored = check_archive(made)
    assert stored.ok and stored.streams == before.streams
    assert create_like(other, made) and not create_like(other, made)
    result = import_archive(other, made)
    assert (result.chunks, result.steps, result.present_chunks) == (before.chunks, before.steps, 0)
    after = check_server(other)
    assert after.ok and after.streams == before.streams
    assert after.contents_sha256 == before.contents_sha256 == made.contents_sha256 != ""
    assert check_server(cut).contents_sha256 == before.contents_sha256

    # Again: nothing is inserted twice, and nothing changes.
    again = import_archive(other, made)
    assert (again.chunks, again.present_chunks) == (0, before.chunks)
    assert other.stats() == replace(other.stats(), inserted_steps=before.steps)
    # A writer of the same name begins a stream of its own.
    assert [other.open_stream(name) for name in ("s0", "s1")] == [2, 5]
    # Imported streams are closed: evicted, they are forgotten.
    other.evict(0, 0)
    with ReplayAdmin.like(other) as admin:
        assert list(admin.streams()) == []


def test_interrupted_import_is_continued(
    cut: ReplayClient, other: ReplayClient, tmp_path: Path
) -> None:
    made = export_archive(cut, tmp_path / "dump")
    create_like(other, made)

    def stop(done: int, total: int) -> None:
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_archive(other, made, progress=stop)
    assert check_server(other).ok and other.stats().chunks == 7
    result = import_archive(other, made)
    assert (result.chunks, result.present_chunks) == (made.chunks - 7, 7)
    assert check_server(other).contents_sha256 == made.contents_sha256


def test_arrays_open_with_numpy_alone_as_documented(cut: ReplayClient, tmp_path: Path) -> None:
    export_archive(cut, tmp_path / "dump")
    chunks = {path.stem: np.load(path) for path in (tmp_path / "dump/chunks").glob("*.npy")}
    manifest = json.loads((tmp_path / "dump" / MANIFEST).read_text())
    names = np.array([stream["stream"] for stream in manifest["streams"]])
    stream = np.repeat(names[chunks["stream"]], chunks["steps"])
    step = np.repeat(chunks["first_step"] - chunks["row"], chunks["steps"]) + np.arange(len(stream))
    stored = {p.stem[3:]: np.load(p, mmap_mode="r") for p in (tmp_path / "dump/columns").iterdir()}
    assert np.array_equal(stored["step"], step)
    assert [f"s{slot}" for slot in stored["slot"]] == stream.tolist()
    assert stored["image"].shape == (manifest["steps"], 2, 2, 3)
    assert stored["deter"].dtype == np.float16
    for name, facts in manifest["files"].items():
        data = (tmp_path / "dump" / name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (facts["bytes"], facts["sha256"])


def test_export_appears_whole_or_not_at_all(cut: ReplayClient, tmp_path: Path) -> None:
    def fail(done: int, total: int) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        export_archive(cut, tmp_path / "dump", progress=fail)
    with pytest.raises(ReplayTimeout, match=r"the export was not done within 0 s \(\d+ of \d+"):
        export_archive(cut, tmp_path / "dump", timeout_s=0)
    assert list(tmp_path.iterdir()) == []
    export_archive(cut, tmp_path / "dump", extra={"config.yaml": b"a: 1\n"})
    assert (tmp_path / "dump/config.yaml").read_bytes() == b"a: 1\n"
    with pytest.raises(ReplayConfigError, match="dump already holds an archive"):
        export_archive(cut, tmp_path / "dump")
    (tmp_path / "new.partial").mkdir()
    with pytest.raises(ReplayConfigError, match=r"new.partial is there: another export"):
        export_archive(cut, tmp_path / "new")
    with pytest.raises(ReplayConfigError, match="there is no directory"):
        export_archive(cut, tmp_path / "nowhere" / "dump")


def test_nothing_and_damaged_chunks_are_not_exported(
    client: ReplayClient, server: EmbeddedServer, tmp_path: Path
) -> None:
    client.create(SCHEMA, UNBOUNDED)
    with pytest.raises(ReplayEmpty, match="nothing to export"):
        export_archive(client, tmp_path / "dump")
    insert_many(client, 0, 4)
    with redis.Redis.from_url(server.url) as raw:
        raw.delete("{rp0}:c:s0@1:2")
    with pytest.raises(ReplayError, match="chunk 2 of s0@1 or one before it is missing"):
        export_archive(client, tmp_path / "dump")
    assert insert(client, renamed(chunk(0, 5), first_step=99)) == "OK"
    client.evict(24, 2**27)
    with pytest.raises(ReplayError, match="records are missing before this chunk"):
        export_archive(client, tmp_path / "dump")
    assert list(tmp_path.iterdir()) == []


def test_eviction_that_overtakes_an_export_is_told(
    client: ReplayClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("replay_service.admin._FETCH_BYTES", 1)
    client.create(SCHEMA, UNBOUNDED)
    insert_many(client, 0, 12)

    def evict(done: int, total: int) -> None:
        client.evict(16, 2**27)

    with pytest.raises(ReplayError, match="evicts faster than it can be exported"):
        export_archive(client, tmp_path / "dump", progress=evict)
    made = export_archive(client, tmp_path / "dump")
    assert made.steps == 16 and check_archive(made).ok


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("file", ["columns/02-reward.npy", "chunks/first_step.npy"])
def test_flipped_bit_is_found_and_never_imported(
    cut: ReplayClient, other: ReplayClient, tmp_path: Path, file: str
) -> None:
    made = export_archive(cut, tmp_path / "dump")
    flip(tmp_path / "dump" / file, -3)
    damaged = Archive(tmp_path / "dump")
    told = [str(violation) for violation in check_archive(damaged).violations]
    assert f"{file} is not the file that was exported" in told
    assert any("contents are not those that the manifest names" in line for line in told)
    create_like(other, made)
    with pytest.raises(ReplayError, match=rf"damaged: the contents of {file} are not"):
        import_archive(other, damaged)
    assert other.stats().chunks == 0


def edit(directory: Path, **changes: object) -> None:
    manifest = json.loads((directory / MANIFEST).read_text())
    (directory / MANIFEST).write_text(json.dumps(manifest | changes))


@pytest.mark.parametrize(
    ("damage", "want"),
    [
        (lambda d: (d / MANIFEST).unlink(), "no archive in"),
        (lambda d: (d / MANIFEST).write_text("{"), "cannot read"),
        (lambda d: (d / MANIFEST).write_text("[]"), "not that of a dreamfleet-replay archive"),
        (lambda d: edit(d, format="other"), "not that of a dreamfleet-replay archive"),
        (lambda d: edit(d, version=2), "archive of version 2, this program reads 1"),
        (lambda d: edit(d, steps=7), "expected uint8"),
        (lambda d: edit(d, streams="x"), "lacks or garbles"),
        (lambda d: edit(d, streams=[]), "table of chunks contradicts itself"),
        (lambda d: edit(d, schema_hash="00"), "schema is not the one that its hash"),
        (lambda d: (d / "columns/02-reward.npy").unlink(), "reward.npy cannot be read"),
        (lambda d: (d / "columns/02-reward.npy").write_bytes(b"x"), "reward.npy cannot be read"),
        (
            lambda d: np.save(d / "columns/02-reward.npy", np.array([{}])),
            "reward.npy cannot be read",
        ),
        (lambda d: np.save(d / "chunks/row.npy", np.zeros(25, np.int64)), "chunks"),
        (lambda d: np.save(d / "chunks/seq.npy", np.float32(1)), r"seq.npy holds float32\[\]"),
        (lambda d: np.save(d / "episodes/end.npy", np.full(9, 9, np.uint8)), "unknown way"),
        (lambda d: np.save(d / "episodes/chunk.npy", np.arange(9)[::-1].copy()), "table of epis"),
    ],
)
def test_archive_of_another_form_is_refused_with_the_reason(
    cut: ReplayClient, tmp_path: Path, damage: Callable[[Path], object], want: str
) -> None:
    made = export_archive(cut, tmp_path / "dump")
    assert (made.chunks, len(made.episode_table["end"])) == (25, 9)
    damage(tmp_path / "dump")
    with pytest.raises((ReplayError, ReplayConfigError), match=want):
        Archive(tmp_path / "dump")


def test_archive_that_does_not_fit_is_refused_before_anything_is_written(
    cut: ReplayClient, other: ReplayClient, tmp_path: Path
) -> None:
    made = export_archive(cut, tmp_path / "dump")
    other.create(SCHEMA, Limits(capacity_steps=190, capacity_bytes=2**27))
    with pytest.raises(ReplayConfigError, match="holds 0 of 190 steps .* would add 200"):
        import_archive(other, made)
    other.create(SCHEMA, Limits(capacity_steps=300, capacity_bytes=2000))
    with pytest.raises(ReplayConfigError, match="2000 bytes are full after"):
        import_archive(other, made)
    other.create(SCHEMA, Limits(capacity_steps=300, capacity_bytes=2**27, max_chunk_steps=4))
    with pytest.raises(ReplayConfigError, match="chunks of at most 4 steps"):
        import_archive(other, made)
    assert check_server(other).ok and other.stats().evicted_steps == 0


def test_other_columns_are_refused_by_name(
    cut: ReplayClient, other: ReplayClient, tmp_path: Path
) -> None:
    made = export_archive(cut, tmp_path / "dump")
    wider = Schema((*SCHEMA.columns, Column("extra", "int32")))
    other.create(wider, UNBOUNDED)
    with pytest.raises(ReplaySchemaError, match=r"extra: int32\[\] is missing"):
        import_archive(other, made)


def test_streams_of_another_run_are_told_apart_unless_they_get_a_prefix(
    cut: ReplayClient, other: ReplayClient, tmp_path: Path
) -> None:
    made = export_archive(cut, tmp_path / "dump")
    first = made.chunk_table["seq"][0]
    other.create(SCHEMA, UNBOUNDED)
    insert_many(other, 0, 2)
    with pytest.raises(ReplayConfigError, match=rf"s0@1 ends at chunk 2 .* begins at {first}"):
        import_archive(other, made)
    for seq in range(1, 4):
        values = columns(1, (seq - 1) * 8, 8)
        values["reward"] = values["reward"] + 1
        assert insert(other, renamed(chunk(1, seq, incarnation=4), columns=values)) == "OK"
    other.evict(24, 2**27)
    with redis.Redis.from_url(other.url) as raw:
        raw.hdel("{rp0}:seq", "s0@1")
    with pytest.raises(ReplayConfigError, match="chunk 1 of stream s1@4 is another one"):
        import_archive(other, made)
    result = import_archive(other, made, prefix="old/")
    assert result.chunks == made.chunks
    assert {"old/s0@1", "old/s1@4", "s1@4"} <= check_server(other).streams.keys()
    with pytest.raises(ReplayConfigError, match="longer than 200 characters"):
        import_archive(other, made, prefix="x" * 200)


def test_import_waits_for_training_and_then_says_so(
    cut: ReplayClient, other: ReplayClient, tmp_path: Path
) -> None:
    made = export_archive(cut, tmp_path / "dump")
    other.create(SCHEMA, Limits(capacity_steps=300, capacity_bytes=2**27, budget_steps=40))
    with pytest.raises(ReplayTimeout, match=r"no more inserts \(40 of 40 steps\)"):
        import_archive(other, made, patience_s=0)
    other.settle(other.acquire_fence(), 0, 10**6)
    assert import_archive(other, made, patience_s=0).present_chunks == 5
    assert check_server(other).contents_sha256 == made.contents_sha256


def test_forged_archive_whose_hashes_are_right_stays_out(
    cut: ReplayClient, other: ReplayClient, tmp_path: Path
) -> None:
    export_archive(cut, tmp_path / "dump")
    file = tmp_path / "dump/columns/02-reward.npy"
    rewards = np.load(file)
    rewards[3] = np.nan
    np.save(file, rewards)
    files = json.loads((tmp_path / "dump" / MANIFEST).read_text())["files"]
    files["columns/02-reward.npy"]["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    edit(tmp_path / "dump", files=files)
    forged = Archive(tmp_path / "dump")
    assert forged.damaged_files() == []
    create_like(other, forged)
    with pytest.raises(ReplayError, match="in the archive is not valid: .*'reward'.*not finite"):
        import_archive(other, forged)
    assert other.stats().chunks == 0


def test_noise_of_every_type_survives(client: ReplayClient, tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    client.create(SCHEMA, UNBOUNDED)
    made = chunk(0, 1, 40)
    values = {name: value.copy() for name, value in made.columns.items()}
    values["image"] = random.integers(0, 256, values["image"].shape, np.uint8)
    values["vector"] = random.normal(size=values["vector"].shape).astype(np.float32)
    values["deter"] = random.normal(size=values["deter"].shape).astype(np.float16)
    values["step"] = random.integers(-(2**62), 2**62, 40)
    blob = encode_chunk(renamed(made, columns=values), SCHEMA)
    assert client.insert(SCHEMA, made.sid, 1, 40, blob).code == "OK"
    (_, back), *_ = export_archive(client, tmp_path / "dump").entries()
    assert all(np.array_equal(back.columns[name], value) for name, value in values.items())
