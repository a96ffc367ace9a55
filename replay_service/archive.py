"""A replay as plain files: one .npy array per column, and a manifest that says what is in them.

::

    <archive>/
      manifest.json            format, schema, streams, ranges, and size and sha256 of every file
      columns/00-image.npy     (steps, *shape) in the dtype of the schema, in the order of the log
      columns/01-reward.npy    …
      chunks/<field>.npy       one row per chunk: stream, seq, first_step, steps, row, position, …
      episodes/<field>.npy     one row per episode that ended: chunk, ret, length, end

Why not Parquet: records are images and float16 latents, which it has no type for; .npy is exact for
every dtype here, is memory-mapped without being read, needs no dependency, and becomes a pandas or
pyarrow column with one call.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from functools import cached_property
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import Any, get_args

import numpy as np

from replay_service.admin import Deadline, ReplayAdmin
from replay_service.audit import Findings, LogAudit
from replay_service.chunk import (
    MAX_CHUNK_STEPS,
    Chunk,
    EpisodeEnd,
    EpisodeSummary,
    decode_chunk,
    stream_id,
)
from replay_service.client import ReplayClient
from replay_service.counters import ReplayStats
from replay_service.entries import LogEntry
from replay_service.errors import (
    ReplayConfigError,
    ReplayEmpty,
    ReplayError,
    ReplayUnavailable,
)
from replay_service.schema import Schema

log = logging.getLogger(__name__)

FORMAT, FORMAT_VERSION = "dreamfleet-replay", 1
MANIFEST = "manifest.json"
CHUNK_FIELDS: dict[str, tuple[str, tuple[int, ...]]] = {
    "stream": ("int32", ()),
    "seq": ("int64", ()),
    "first_step": ("int64", ()),
    "steps": ("int32", ()),
    "row": ("int64", ()),
    "number": ("int64", ()),
    "position": ("int64", ()),
    "version_min": ("int64", (2,)),
    "version_max": ("int64", (2,)),
}
EPISODE_FIELDS: dict[str, tuple[str, tuple[int, ...]]] = {
    "chunk": ("int64", ()),
    "ret": ("float64", ()),
    "length": ("int64", ()),
    "end": ("uint8", ()),
}
ENDS = get_args(EpisodeEnd)
Progress = Callable[[int, int], None]


class Archive:
    """An exported replay, opened for reading.

    Guarantees:
        1. Nothing is unpickled, and no path comes from the manifest.
        2. Opening checks the manifest and the form of every array; `damaged_files` checks their
           bytes.
        3. Columns are memory-mapped: opening an archive of any size costs little memory.

    Args:
        directory: of the archive.

    Raises:
        ReplayConfigError: if there is no archive, or of another version.
        ReplayError: if a file is missing, or is not the array that the manifest describes.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        self.manifest = _read_manifest(self.directory)
        try:
            self.schema = Schema.from_dict(self.manifest["schema"])
            self.steps, self.chunks = int(self.manifest["steps"]), int(self.manifest["chunks"])
            self.streams = [(str(s["stream"]), int(s["incarnation"])) for s in self._streams]
            self.contents_sha256 = str(self.manifest["contents_sha256"])
            self._hashes = {str(k): str(v["sha256"]) for k, v in self.manifest["files"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self._broken(f"{MANIFEST} lacks or garbles {error}") from error
        if self.schema.hash.hex() != self.manifest.get("schema_hash"):
            raise self._broken("the schema is not the one that its hash stands for")
        self.columns = {
            column.name: self._array(file, column.dtype, column.shape, self.steps, "r")
            for column, file in zip(self.schema.columns, column_files(self.schema), strict=True)
        }
        self.chunk_table = self._table("chunks", CHUNK_FIELDS, self.chunks)
        self.episode_table = self._table("episodes", EPISODE_FIELDS, None)
        self._require_consistent()

    @property
    def _streams(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.manifest["streams"]
        return found

    @property
    def source_stats(self) -> Mapping[str, int]:
        """Counters and limits of the server that it came from, see `ReplayStats`."""
        found: Mapping[str, int] = self.manifest["server"]
        return found

    def damaged_files(self) -> list[str]:
        """Return the files whose bytes are not those that were exported. Reads all of them."""
        return [
            name
            for name, expected in self._hashes.items()
            if not _inside(name) or _sha256(self.directory / name) != expected
        ]

    def sid(self, number: int) -> str:
        """Return stream and incarnation of stream number `number` of the archive."""
        return stream_id(*self.streams[number])

    def entries(self) -> Iterator[tuple[LogEntry, Chunk]]:
        """Yield every chunk in the order of the log."""
        return map(self.entry, range(self.chunks))

    def entry(self, at: int) -> tuple[LogEntry, Chunk]:
        """Return chunk number `at`, from 0, of the log; its columns are not read yet."""
        table = self.chunk_table
        values = {name: int(table[name][at]) for name in CHUNK_FIELDS if table[name].ndim == 1}
        stream, incarnation = self.streams[values["stream"]]
        rows = slice(values["row"], values["row"] + values["steps"])
        chunk = Chunk(
            stream=stream,
            incarnation=incarnation,
            seq=values["seq"],
            first_step=values["first_step"],
            columns={name: np.asarray(array[rows]) for name, array in self.columns.items()},
            version_min=_pair(table["version_min"][at]),
            version_max=_pair(table["version_max"][at]),
            episodes=self._episodes(at),
        )
        entry = LogEntry(
            entry_id=f"0-{values['number']}",
            key="",
            steps=chunk.steps,
            size_bytes=sum(v.nbytes for v in chunk.columns.values()),
            sid=chunk.sid,
            seq=chunk.seq,
            position=values["position"],
        )
        return entry, chunk

    @cached_property
    def _episode_bounds(self) -> np.ndarray:
        return np.searchsorted(self.episode_table["chunk"], np.arange(self.chunks + 1))

    def _episodes(self, chunk: int) -> tuple[EpisodeSummary, ...]:
        table = self.episode_table
        return tuple(
            EpisodeSummary(
                float(table["ret"][at]), int(table["length"][at]), ENDS[int(table["end"][at])]
            )
            for at in range(*self._episode_bounds[chunk : chunk + 2])
        )

    def _table(
        self, folder: str, fields: dict[str, tuple[str, tuple[int, ...]]], rows: int | None
    ) -> dict[str, np.ndarray]:
        table = {}
        for name, (dtype, shape) in fields.items():
            table[name] = self._array(f"{folder}/{name}.npy", dtype, shape, rows, None)
            rows = len(table[name])
        return table

    def _array(
        self, file: str, dtype: str, shape: tuple[int, ...], rows: int | None, mode: Any
    ) -> np.ndarray:
        try:
            array: np.ndarray = np.load(self.directory / file, mmap_mode=mode, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise self._broken(f"{file} cannot be read: {error}") from error
        expected = (len(array) if rows is None and array.ndim else rows, *shape)
        if array.dtype != dtype or array.shape != expected:
            raise self._broken(
                f"{file} holds {array.dtype}{list(array.shape)}, expected {dtype}{list(expected)}"
            )
        return array

    def _require_consistent(self) -> None:
        table, episodes = self.chunk_table, self.episode_table
        steps, stream = table["steps"], table["stream"]
        if self.chunks and not (
            np.all((steps >= 1) & (steps <= MAX_CHUNK_STEPS))
            and np.array_equal(table["row"], np.cumsum(steps, dtype=np.int64) - steps)
            and np.all((stream >= 0) & (stream < len(self.streams)))
        ):
            raise self._broken("the table of chunks contradicts itself")
        if int(steps.sum()) != self.steps:
            raise self._broken(f"its chunks hold {int(steps.sum())} of {self.steps} steps")
        chunk = episodes["chunk"]
        if np.any(np.diff(chunk) < 0) or np.any((chunk < 0) | (chunk >= self.chunks)):
            raise self._broken("the table of episodes names chunks that are not there")
        if np.any(episodes["end"] >= len(ENDS)):
            raise self._broken("an episode ends in an unknown way")

    def _broken(self, why: str) -> ReplayError:
        return ReplayError(
            f"the archive {self.directory} is damaged: {why}; export it again, or use a copy"
        )


def export_archive(
    client: ReplayClient,
    target: Path,
    *,
    extra: Mapping[str, bytes] | None = None,
    timeout_s: float = 3600.0,
    progress: Progress | None = None,
) -> Archive:
    """Write everything that a replay retains to a new archive; the replay is not changed.

    The archive appears at `target` complete, or not at all: it is written beside it, synced, and
    renamed. What is inserted during the export is left out. Memory is bounded by 8 MiB of chunks.

    Args:
        client: names the server; a connection of its own is used.
        target: directory to make; its parent must exist and have room for all steps uncompressed.
        extra: further files, name → content, for example the configuration of the run.
        timeout_s: after which it gives up.
        progress: called with the chunks written and their total.

    Raises:
        ReplayConfigError: if the target exists or has no room.
        ReplayEmpty: if there is nothing to export.
        ReplayError: if the replay breaks its promises, or evicts faster than it can be read.
    """
    target = Path(target).absolute()
    partial = target.with_name(f"{target.name}.partial")
    deadline = Deadline(timeout_s, "the export")
    with ReplayAdmin.like(client) as admin:
        _require_free(target, partial, admin.schema(), admin.stats())
        partial.mkdir()
        try:
            _write_all(admin, partial, extra or {}, deadline, progress or (lambda a, b: None))
            os.rename(partial, target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    _sync(target.parent)
    return Archive(target)


def column_files(schema: Schema) -> list[str]:
    """Return the path of each column's array within an archive, in the order of the schema."""
    safe = (re.sub(r"[^\w.-]", "_", column.name) for column in schema.columns)
    return [f"columns/{at:02d}-{name}.npy" for at, name in enumerate(safe)]


class _Table:
    """Arrays of equally many rows that grow together."""

    def __init__(self, root: Path, files: dict[str, tuple[str, str, tuple[int, ...]]]) -> None:
        self.arrays = {
            name: _GrowingArray(root / file, dtype, shape)
            for name, (file, dtype, shape) in files.items()
        }

    def __enter__(self) -> _Table:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for array in self.arrays.values():
            array.close()

    @property
    def rows(self) -> int:
        """Rows so far."""
        return next(iter(self.arrays.values())).rows

    def add(self, **values: Any) -> None:
        """Append one row."""
        self.extend({name: np.asarray([value]) for name, value in values.items()})

    def extend(self, columns: Mapping[str, np.ndarray]) -> None:
        """Append rows; every column must be given."""
        assert columns.keys() == self.arrays.keys(), (columns.keys(), self.arrays.keys())
        for name, values in columns.items():
            self.arrays[name].extend(values)


class _GrowingArray:
    """A .npy file to which rows are appended; its header is put right when it is closed."""

    def __init__(self, path: Path, dtype: str, shape: tuple[int, ...]) -> None:
        path.parent.mkdir(exist_ok=True)
        self.rows = 0
        self._dtype, self._shape = np.dtype(dtype), shape
        self._file = path.open("xb")
        self._file.write(self._header())

    def extend(self, values: np.ndarray) -> None:
        """Append rows of the array's dtype, or of one that it holds exactly."""
        rows = np.ascontiguousarray(values, self._dtype)
        assert rows.shape[1:] == self._shape, (rows.shape, self._shape)
        self._file.write(rows.reshape(-1).view(np.uint8).data)
        self.rows += len(rows)

    def close(self) -> None:
        """Write the number of rows into the header, and sync."""
        self._file.seek(0)
        self._file.write(self._header())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def _header(self) -> bytes:
        # The format leaves room for any number of rows, so the length never changes.
        header = BytesIO()
        description = np.lib.format.dtype_to_descr(self._dtype)
        shape = (self.rows, *self._shape)
        np.lib.format.write_array_header_1_0(
            header, {"descr": description, "fortran_order": False, "shape": shape}
        )
        return header.getvalue()


def _write_all(
    admin: ReplayAdmin,
    root: Path,
    extra: Mapping[str, bytes],
    deadline: Deadline,
    progress: Progress,
) -> None:
    schema, before = admin.schema(), admin.stats()
    findings = Findings()
    audit, streams = LogAudit(findings), dict[str, tuple[int, str, int]]()
    files = {
        column.name: (file, column.dtype, column.shape)
        for column, file in zip(schema.columns, column_files(schema), strict=True)
    }
    with ExitStack() as stack:
        columns = stack.enter_context(_Table(root, files))
        chunks = stack.enter_context(_Table(root, _files("chunks", CHUNK_FIELDS)))
        episodes = stack.enter_context(_Table(root, _files("episodes", EPISODE_FIELDS)))
        for page in admin.pages(before.committed_chunks, schema):
            for entry, blob in zip(page, admin.fetch(page), strict=True):
                if entry.flaw:
                    log.warning("entry_left_out id=%s flaw=%s", entry.entry_id, entry.flaw)
                    continue
                if _evicted(admin, audit, entry, blob):
                    continue
                assert blob is not None
                chunk = decode_chunk(blob, schema, MAX_CHUNK_STEPS)
                audit.enter(entry)
                audit.read(entry, chunk)
                _require_sound(admin, findings)
                _write_chunk(chunk, entry, streams, columns, chunks, episodes)
            progress(chunks.rows, before.chunks)
            deadline.check(f"{chunks.rows} of {before.chunks} chunks")
        if not chunks.rows:
            raise ReplayEmpty(f"the replay at {admin.address} holds nothing to export")
    if admin.stats().epoch != before.epoch:
        raise ReplayUnavailable(f"the server at {admin.address} restarted; export again")
    for name, content in extra.items():
        (root / name).write_bytes(content)
    _write_manifest(root, schema, before, audit, streams)


def _write_chunk(
    chunk: Chunk,
    entry: LogEntry,
    streams: dict[str, tuple[int, str, int]],
    columns: _Table,
    chunks: _Table,
    episodes: _Table,
) -> None:
    number, *_ = streams.setdefault(chunk.sid, (len(streams), chunk.stream, chunk.incarnation))
    for end in chunk.episodes:
        kind = ENDS.index(end.end)
        episodes.add(chunk=chunks.rows, ret=end.ret, length=end.length, end=kind)
    chunks.add(
        stream=number,
        seq=chunk.seq,
        first_step=chunk.first_step,
        steps=chunk.steps,
        row=columns.rows,
        number=entry.number,
        position=entry.position,
        version_min=chunk.version_min,
        version_max=chunk.version_max,
    )
    columns.extend(chunk.columns)


def _evicted(admin: ReplayAdmin, audit: LogAudit, entry: LogEntry, blob: bytes | None) -> bool:
    """Whether a chunk may be left out because it was evicted before the first one was written.

    Raises:
        ReplayError: if it is missing for another reason, or would leave a hole.
    """
    jumped = audit.last is not None and entry.number > audit.last.number + 1
    if blob is not None and not jumped:
        return False
    if admin.stats().evicted_steps < entry.position + (entry.steps if blob is None else 0):
        raise ReplayError(
            f"chunk {entry.seq} of {entry.sid} or one before it is missing from the replay at "
            f"{admin.address}: see `dreamfleet replay check`"
        )
    if audit.last is None:
        return True
    raise ReplayError(
        f"the replay at {admin.address} evicts faster than it can be exported: stop its actors, "
        "or raise capacity_steps"
    )


def _require_sound(admin: ReplayAdmin, findings: Findings) -> None:
    if findings.found:
        raise ReplayError(
            f"the replay at {admin.address} cannot be exported: {findings.violations[0]} (all: "
            "`dreamfleet replay check`)"
        )


def _require_free(target: Path, partial: Path, schema: Schema, stats: ReplayStats) -> None:
    if target.exists():
        what = "an archive" if (target / MANIFEST).exists() else "something"
        raise ReplayConfigError(f"{target} already holds {what}; choose another name or remove it")
    if partial.exists():
        raise ReplayConfigError(
            f"{partial} is there: another export is running, or one was killed; in that case "
            "remove it"
        )
    if not target.parent.is_dir():
        raise ReplayConfigError(f"there is no directory {target.parent} to export into")
    need, free = stats.size_steps * schema.step_bytes, shutil.disk_usage(target.parent).free
    if need > free:
        raise ReplayConfigError(
            f"{stats.size_steps} steps of {schema.step_bytes} bytes need {need} bytes and "
            f"{target.parent} has {free} free; export to another disk"
        )


def _write_manifest(
    root: Path,
    schema: Schema,
    stats: ReplayStats,
    audit: LogAudit,
    streams: dict[str, tuple[int, str, int]],
) -> None:
    assert audit.first is not None and audit.last is not None
    summaries = audit.summaries()
    files = sorted(path for path in root.rglob("*") if path.is_file())
    manifest = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "schema": schema.to_dict(),
        "schema_hash": schema.hash.hex(),
        "steps": audit.steps,
        "chunks": audit.chunks,
        "positions": [audit.first.position, audit.last.position + audit.last.steps],
        "contents_sha256": audit.contents_sha256(),
        "server": asdict(stats),
        "streams": [
            {"stream": stream, "incarnation": incarnation, **asdict(summaries[sid])}
            for sid, (_, stream, incarnation) in streams.items()
        ],
        "files": {
            path.relative_to(root).as_posix(): {
                "bytes": path.stat().st_size,
                "sha256": _sha256(path),
            }
            for path in files
        },
    }
    with (root / MANIFEST).open("x") as file:
        json.dump(manifest, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    for folder in (*{path.parent for path in files}, root):
        _sync(folder)


def _read_manifest(directory: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
    except FileNotFoundError as error:
        raise ReplayConfigError(
            f"there is no archive in {directory} (no {MANIFEST}); make one with "
            "`dreamfleet replay export`"
        ) from error
    except (OSError, ValueError) as error:
        raise ReplayError(f"cannot read {directory / MANIFEST}: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ReplayConfigError(f"{directory / MANIFEST} is not that of a {FORMAT} archive")
    if manifest.get("version") != FORMAT_VERSION:
        raise ReplayConfigError(
            f"{directory} is an archive of version {manifest.get('version')!r:.20}, this program "
            f"reads {FORMAT_VERSION}; use the release that made it"
        )
    return manifest


def _files(
    folder: str, fields: dict[str, tuple[str, tuple[int, ...]]]
) -> dict[str, tuple[str, str, tuple[int, ...]]]:
    return {name: (f"{folder}/{name}.npy", *form) for name, form in fields.items()}


def _inside(name: str) -> bool:
    path = Path(name)
    return not path.is_absolute() and ".." not in path.parts


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""


def _pair(values: np.ndarray) -> tuple[int, int]:
    return int(values[0]), int(values[1])


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
