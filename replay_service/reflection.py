"""Whether a mirror shows what its log says: invariants A, B and C on the learner's copy."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from replay_service.admin import Deadline, ReplayAdmin
from replay_service.audit import Violation
from replay_service.chunk import MAX_CHUNK_STEPS, Chunk, decode_chunk
from replay_service.client import ReplayClient
from replay_service.entries import LogEntry
from replay_service.errors import ChunkError
from replay_service.invariants import CheckReport
from replay_service.mirror import Mirror

_FAULTS = "needs a test that causes the fault"
_ELSEWHERE = "see the check of the server"


@dataclass
class _Stretch:
    first_step: int
    rows: np.ndarray

    @property
    def end_step(self) -> int:
        return self.first_step + len(self.rows)


def check_mirror(
    mirror: Mirror, client: ReplayClient, *, complete: bool = False, timeout_s: float = 600.0
) -> CheckReport:
    """Compare a mirror with the log that it follows. Call it from the thread that absorbs.

    What the mirror has not absorbed yet is left out. Memory is bounded by 8 MiB of chunks and one
    byte for each row of the mirror.

    Args:
        mirror: nobody may absorb meanwhile.
        client: the server it follows; a connection of its own is used.
        complete: whether everything retained must be there, because the mirror has room for it and
            has followed all the time; else what is absent is only noted.
        timeout_s: after which it gives up.

    Raises:
        ReplayTimeout, ReplayUnavailable: as for `check_server`.
    """
    begin, deadline = time.monotonic(), Deadline(timeout_s, "the check of the mirror")
    scope = {"A": "stretches and records", "B": "rows and stretches", "C": "against the log"}
    scope |= {"D": _ELSEWHERE, "E": _ELSEWHERE, "F": _FAULTS, "G": _FAULTS}
    report = CheckReport(source=f"mirror of {client.address}", scope=scope)
    check = _MirrorCheck(mirror, report)
    check.stretches()
    with ReplayAdmin.like(client) as admin:
        for page in admin.pages(admin.stats().committed_chunks, mirror.schema):
            for entry, blob in zip(page, admin.fetch(page), strict=True):
                if blob is not None and entry.position + entry.steps <= mirror.inserted_steps:
                    check.compare(entry, blob)
            deadline.check(f"{report.chunks} chunks")
    if check.absent_steps:
        problem = f"{check.absent_steps} retained steps are not in the mirror"
        if complete:
            report.findings.add(Violation(invariant="C", problem=problem))
        else:
            report.notes.append(f"{problem}: given up for its capacity, or missed")
    if mirror.missed_steps:
        report.notes.append(f"the mirror has missed {mirror.missed_steps} steps")
    report.seconds = time.monotonic() - begin
    return report


class _MirrorCheck:
    """One comparison."""

    def __init__(self, mirror: Mirror, report: CheckReport) -> None:
        self.absent_steps = 0
        self._mirror, self._report = mirror, report
        self._stretches: dict[str, list[_Stretch]] = {}

    def stretches(self) -> None:
        """Check what the mirror holds in itself: no row and no step twice, nothing torn."""
        taken = np.zeros(len(self._mirror.columns["is_first"]), bool)
        for sid, first_step, rows in self._mirror.held():
            if taken[rows].any():
                self._add(Violation(invariant="B", problem="a row belongs to two streams", sid=sid))
            taken[rows] = True
            fresh = _Stretch(first_step, rows)
            for known in self._stretches.setdefault(sid, []):
                if known.first_step < fresh.end_step and fresh.first_step < known.end_step:
                    step = max(known.first_step, fresh.first_step)
                    problem = "records are held twice"
                    self._add(Violation(invariant="B", problem=problem, sid=sid, step=step))
            self._stretches[sid].append(fresh)
            self._require_whole_episodes(sid, fresh)
            self._report.steps += len(rows)
        if self._report.steps != self._mirror.size_steps:
            self._add(
                Violation(
                    invariant="C",
                    problem="the mirror's size is not what it holds",
                    got=str(self._mirror.size_steps),
                    expected=str(self._report.steps),
                )
            )

    def compare(self, entry: LogEntry, blob: bytes) -> None:
        """Compare one chunk of the log with the rows that hold it."""
        try:
            chunk = decode_chunk(blob, self._mirror.schema, MAX_CHUNK_STEPS)
        except ChunkError:
            # The mirror has left it out and counted it; the check of the server reports it.
            return
        self._report.chunks += 1
        self._report.size_bytes += entry.size_bytes
        found = 0
        for stretch in self._stretches.get(entry.sid, []):
            begin = max(chunk.first_step, stretch.first_step)
            end = min(chunk.first_step + chunk.steps, stretch.end_step)
            if begin < end:
                found += end - begin
                self._compare_rows(chunk, stretch, begin, end)
        self.absent_steps += chunk.steps - found

    def _compare_rows(self, chunk: Chunk, stretch: _Stretch, begin: int, end: int) -> None:
        rows = stretch.rows[begin - stretch.first_step : end - stretch.first_step]
        part = slice(begin - chunk.first_step, end - chunk.first_step)
        for name in self._mirror.columns:
            held, sent = self._column(name, rows), chunk.columns[name][part]
            differs = (held != sent).reshape(len(rows), -1).any(axis=1)
            if differs.any():
                self._add(
                    Violation(
                        invariant="C",
                        problem=f"column {name!r} differs from the log",
                        sid=chunk.sid,
                        seq=chunk.seq,
                        step=begin + int(np.argmax(differs)),
                    )
                )

    def _require_whole_episodes(self, sid: str, stretch: _Stretch) -> None:
        first, last = (self._column(name, stretch.rows) for name in ("is_first", "is_last"))
        torn = np.flatnonzero(last[:-1] & ~first[1:])
        if torn.size:
            step = stretch.first_step + int(torn[0]) + 1
            problem = "the record after the end of an episode does not start one"
            self._add(Violation(invariant="A", problem=problem, sid=sid, step=step))

    def _column(self, name: str, rows: np.ndarray) -> np.ndarray:
        values: np.ndarray = self._mirror.columns[name][rows].cpu().numpy()
        return values

    def _add(self, violation: Violation) -> None:
        self._report.findings.add(violation)
