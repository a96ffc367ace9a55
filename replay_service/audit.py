"""Following a log entry by entry and noting whatever contradicts what the replay promises."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

import msgpack
import numpy as np

from replay_service.chunk import Chunk
from replay_service.entries import LogEntry

Invariant = Literal["A", "B", "C", "D", "E"]
MOST_KEPT = 100
"""Violations of one invariant that are kept with their details; the others are only counted."""


@dataclass(frozen=True, kw_only=True)
class Violation:
    """One contradiction.

    Attributes:
        invariant: letter, see `replay_service.invariants`.
        problem: what is wrong, in words.
        sid, seq, step: stream, chunk and record that it is about, where it is about one.
        got, expected: the two values that contradict each other.
    """

    invariant: Invariant
    problem: str
    sid: str = ""
    seq: int | None = None
    step: int | None = None
    got: str = ""
    expected: str = ""

    def __str__(self) -> str:
        place = {"stream": self.sid or None, "seq": self.seq, "step": self.step}
        where = " ".join(f"{key} {value}" for key, value in place.items() if value is not None)
        values = f"got {self.got}, expected {self.expected}" if self.expected else self.got
        return ": ".join(part for part in (where, self.problem, values) if part)


@dataclass(frozen=True)
class StreamSummary:
    """The retained part of one stream.

    Attributes:
        first_seq, last_seq: its oldest and newest chunk.
        first_step: records of the stream before the oldest chunk; None if contents were not read.
        steps: records retained.
        sha256: of everything in those chunks; empty if contents were not read.
    """

    first_seq: int
    last_seq: int
    first_step: int | None
    steps: int
    sha256: str


@dataclass
class Findings:
    """Violations with their details up to `MOST_KEPT` an invariant, and how many there are."""

    violations: list[Violation] = field(default_factory=list)
    found: Counter[str] = field(default_factory=Counter)

    def add(self, violation: Violation) -> None:
        """Note one violation."""
        self.found[violation.invariant] += 1
        if self.found[violation.invariant] <= MOST_KEPT:
            self.violations.append(violation)


@dataclass
class _Stream:
    first_seq: int
    last_seq: int
    life: int
    steps: int = 0
    first_step: int | None = None
    next_step: int | None = None
    ended: bool | None = None
    digest: Any = field(default_factory=hashlib.sha256)


class LogAudit:
    """Checks chunks in the order of their log: A (contiguous), B (nothing twice), C (adds up).

    Memory grows with the number of retained streams, never with the number of steps.

    Args:
        findings: where violations go.
    """

    def __init__(self, findings: Findings) -> None:
        self.chunks = self.steps = self.size_bytes = self.unread = 0
        self.first: LogEntry | None = None
        self.last: LogEntry | None = None
        self._findings = findings
        self._streams: dict[str, _Stream] = {}
        self._life = 0

    def enter(self, entry: LogEntry, *, evicted: bool = False) -> None:
        """Check where an entry stands: in the log, and in its stream.

        Args:
            entry: the next one of the log.
            evicted: everything between it and the one before was evicted before it was read.
        """
        if evicted:
            self._life += 1
        elif self.last is not None:
            self._require_successor(self.last, entry)
        self.first, self.last = self.first or entry, entry
        self.chunks += 1
        self.steps += entry.steps
        self.size_bytes += entry.size_bytes
        self._continue(entry)

    def read(self, entry: LogEntry, chunk: Chunk) -> None:
        """Check the contents of the entry just entered against entry and predecessor."""
        stream = self._streams[entry.sid]
        named, held = (entry.sid, entry.seq, entry.steps), (chunk.sid, chunk.seq, chunk.steps)
        if named != held:
            self._note("C", "the chunk is not the one that the log names", entry, held, named)
            self.skip(entry)
            return
        expected, step = stream.next_step, chunk.first_step
        if expected is not None and step != expected:
            torn = step > expected
            problem = "records are missing before this chunk" if torn else "records come twice"
            self._note("A" if torn else "B", problem, entry, step, expected, step=step)
        self._check_episodes(stream, entry, chunk)
        if stream.first_step is None:
            stream.first_step = step
        stream.next_step = step + chunk.steps
        _digest(stream.digest, chunk)

    def skip(self, entry: LogEntry) -> None:
        """Take note that the contents of the entry just entered cannot be looked at."""
        stream = self._streams[entry.sid]
        stream.next_step = stream.ended = None
        self.unread += 1

    def known(self, sid: str) -> tuple[int, int] | None:
        """Return the oldest and newest retained chunk of a stream, None if there is none."""
        stream = self._streams.get(sid)
        return (stream.first_seq, stream.last_seq) if stream else None

    def sids(self) -> set[str]:
        """Return the streams of which something is retained."""
        return set(self._streams)

    def summaries(self) -> dict[str, StreamSummary]:
        """Return what is retained of each stream."""
        return {
            sid: StreamSummary(
                s.first_seq,
                s.last_seq,
                s.first_step,
                s.steps,
                "" if s.first_step is None or self.unread else s.digest.hexdigest(),
            )
            for sid, s in self._streams.items()
        }

    def contents_sha256(self) -> str:
        """Return one hash of everything retained, empty unless all of it was read.

        It depends on streams, chunks and records, not on their order in the log or on limits.
        """
        streams = self.summaries()
        if self.unread or any(not summary.sha256 for summary in streams.values()):
            return ""
        rows = [[sid, s.first_seq, s.last_seq, s.sha256] for sid, s in sorted(streams.items())]
        return hashlib.sha256(msgpack.packb(rows)).hexdigest()

    def _require_successor(self, last: LogEntry, entry: LogEntry) -> None:
        number, position = last.number + 1, last.position + last.steps
        if entry.number != number:
            self._note("C", "the log skips or repeats a number", entry, entry.number, number)
        if entry.position != position:
            self._note("C", "inserted steps do not add up", entry, entry.position, position)

    def _continue(self, entry: LogEntry) -> None:
        stream = self._streams.get(entry.sid)
        if stream is None:
            stream = self._streams[entry.sid] = _Stream(entry.seq, entry.seq - 1, self._life)
        expected = stream.last_seq + 1
        if entry.seq < expected:
            self._note("B", "a chunk comes twice or out of order", entry, entry.seq, expected)
        elif entry.seq > expected and stream.life == self._life:
            self._note("A", "chunks are missing before this one", entry, entry.seq, expected)
        if entry.seq != expected:
            stream.next_step = stream.ended = None
        stream.last_seq, stream.life = max(entry.seq, stream.last_seq), self._life
        stream.steps += entry.steps

    def _check_episodes(self, stream: _Stream, entry: LogEntry, chunk: Chunk) -> None:
        first, last = chunk.columns["is_first"], chunk.columns["is_last"]
        ended = np.concatenate(([bool(stream.ended)], last[:-1]))
        wrong = np.flatnonzero(ended & ~first)
        if wrong.size:
            step = chunk.first_step + int(wrong[0])
            problem = "the record after the end of an episode does not start one"
            self._note("A", problem, entry, "is_first false", "is_first true", step=step)
        stream.ended = bool(last[-1])

    def _note(
        self,
        invariant: Invariant,
        problem: str,
        entry: LogEntry,
        got: object,
        expected: object,
        step: int | None = None,
    ) -> None:
        self._findings.add(
            Violation(
                invariant=invariant,
                problem=problem,
                sid=entry.sid,
                seq=entry.seq,
                step=step,
                got=str(got),
                expected=str(expected),
            )
        )


def _digest(digest: Any, chunk: Chunk) -> None:
    episodes = [[e.ret, e.length, e.end] for e in chunk.episodes]
    head = [chunk.seq, chunk.first_step, chunk.steps, chunk.version_min, chunk.version_max]
    digest.update(msgpack.packb([*head, episodes]))
    for name in sorted(chunk.columns):
        values = np.ascontiguousarray(chunk.columns[name])
        digest.update(f"{name} {values.dtype} {values.shape}".encode())
        digest.update(values.reshape(-1).view(np.uint8).data)
