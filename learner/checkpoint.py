"""Checkpoints that survive a kill at any instruction.

A checkpoint is a directory ``<fence>-<update>-<env steps>`` with the tensors and a manifest that
holds their hash. It is written under another name, flushed to the disk, and renamed: what has a
final name is complete, and what is damaged later is found out by its hash. A learner that another
has replaced writes nothing there, and takes nothing away.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from replay_service import ReplayFenced

log = logging.getLogger(__name__)

FORMAT = 1
STATE, MANIFEST = "state.pt", "manifest.json"
PARTIAL = ".partial-"
_UNREADABLE = (OSError, KeyError, TypeError, ValueError, RuntimeError, pickle.UnpicklingError)


class CheckpointError(Exception):
    """A checkpoint cannot be written, is damaged, or belongs to another configuration."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One saved state: tensors and plain values under ``state``, their description beside it."""

    path: Path
    manifest: dict[str, Any]
    state: dict[str, Any]
    skipped: tuple[str, ...] = field(default=())


def save(
    directory: Path,
    state: Mapping[str, Any],
    *,
    fence: int,
    update: int,
    env_steps: int,
    keep: int,
    **facts: Any,
) -> Path:
    """Write a checkpoint atomically and drop all but the newest ``keep``.

    Args:
        directory: the run's ``checkpoints`` folder; made if it is missing.
        state: tensors, numbers, strings and containers of them.
        fence: of the learner, so that a later lineage always counts as newer.
        update: learner updates so far.
        env_steps: environment steps so far. A checkpoint with all three counters exists already
            only if nothing has happened since, and is left as it is.
        keep: checkpoints that stay, at least 1.
        facts: plain values for the manifest.

    Blocks until the bytes are on the disk.

    Raises:
        CheckpointError: the disk refused; earlier checkpoints are untouched.
        ReplayFenced: a learner with a newer fence saves here; nothing was touched.
    """
    _require_newest(directory, fence)
    final = directory / f"{fence:06d}-{update:010d}-{env_steps:012d}"
    if final.exists():
        return final
    partial = directory / f"{PARTIAL}{final.name}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _discard_partial(directory)
        partial.mkdir()
        with (partial / STATE).open("wb") as file:
            torch.save(dict(state), file)
            _flush(file)
        manifest = {
            "format": FORMAT,
            "fence": fence,
            "update": update,
            "env_steps": env_steps,
            "sha256": _sha256(partial / STATE),
            "bytes": (partial / STATE).stat().st_size,
            **facts,
        }
        with (partial / MANIFEST).open("w") as file:
            json.dump(manifest, file, indent=2)
            _flush(file)
        _flush_directory(partial)
        _require_newest(directory, fence)  # a large one takes its time to write
        os.replace(partial, final)
        _flush_directory(directory)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        raise CheckpointError(
            f"cannot write checkpoint {final}: {error}; free space or mend the permissions of "
            f"{directory}; earlier checkpoints are kept"
        ) from error
    for old in _names(directory)[keep:]:
        shutil.rmtree(directory / old, ignore_errors=True)
    return final


def newest_fence(directory: Path) -> int:
    """Return the highest fence of any checkpoint in a folder, valid or not; 0 without one."""
    return _highest_fence(path.name for path in directory.glob("[0-9]*-*"))


def _require_newest(directory: Path, fence: int) -> None:
    """Raise ReplayFenced if another learner has begun to save here: its files are not ours."""
    unfinished = (path.name.removeprefix(PARTIAL) for path in directory.glob(f"{PARTIAL}*"))
    newest = max(newest_fence(directory), _highest_fence(unfinished))
    if newest > fence:
        raise ReplayFenced(
            f"fence {fence} was replaced by {newest}, which saves in {directory}: another learner "
            "runs"
        )


def _highest_fence(names: Iterable[str]) -> int:
    fences = (name.partition("-")[0] for name in names)
    return max((int(fence) for fence in fences if fence.isdecimal()), default=0)


def load_newest(directory: Path, device: str = "cpu") -> Checkpoint | None:
    """Return the newest valid checkpoint, or None if there is none at all.

    Damaged ones are skipped, logged and named in ``skipped``. Tensors are loaded without running
    code from the file.

    Raises:
        CheckpointError: there are checkpoints, and every one is damaged.
    """
    skipped: list[str] = []
    for name in _names(directory):
        try:
            found = load(directory / name, device)
        except CheckpointError as error:
            log.warning("checkpoint skipped: %s", error)
            skipped.append(str(error))
            continue
        return Checkpoint(
            path=found.path, manifest=found.manifest, state=found.state, skipped=tuple(skipped)
        )
    if skipped:
        raise CheckpointError(
            f"all {len(skipped)} checkpoints in {directory} are damaged ({skipped[0]}); restore "
            "one from a backup, or start over with another --run-dir"
        )
    return None


def load(path: Path, device: str = "cpu") -> Checkpoint:
    """Return one checkpoint after checking its hash.

    Raises:
        CheckpointError: it is missing, damaged or of an unknown format; the message says which.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if manifest["format"] != FORMAT:
            raise CheckpointError(
                f"{path} has format {manifest['format']}, this version reads {FORMAT}"
            )
        digest = _sha256(path / STATE)
        if digest != manifest["sha256"]:
            raise CheckpointError(
                f"{path} is damaged: sha256 {digest[:12]}…, its manifest says "
                f"{manifest['sha256'][:12]}…"
            )
        state = torch.load(path / STATE, map_location=device, weights_only=True)
    except _UNREADABLE as error:
        # The name of a missing file is in an OSError's text alone, that of a key in its repr.
        said = str(error) if isinstance(error, OSError) else repr(error)
        raise CheckpointError(f"{path} cannot be read: {said}") from error
    return Checkpoint(path=path, manifest=manifest, state=state)


def _names(directory: Path) -> list[str]:
    """Return the names of finished checkpoints, newest first."""
    if not directory.is_dir():
        return []
    return sorted((p.name for p in directory.iterdir() if p.name[0].isdigit()), reverse=True)


def _discard_partial(directory: Path) -> None:
    """Remove what a killed writer left behind."""
    for left in directory.glob(f"{PARTIAL}*"):
        shutil.rmtree(left, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _flush_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
