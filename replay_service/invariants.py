"""One checker for what the replay promises, against a live server, a mirror, or an archive.

==  ============================================  ===========  ===========  ===========
    invariant                                     live server  mirror       archive
==  ============================================  ===========  ===========  ===========
A   every stream is contiguous, no window torn    yes          yes          yes
B   no step is there twice                        yes          yes          yes
C   log = stored chunks = counters                yes          against the  against its
                                                               server       manifest
D   the train ratio's account is in its band, or  needs the    no           no
    only the offending side waits                 account
E   what was acknowledged is there, or evicted,   needs the    no           needs the
    or listed as lost                             writers'                  writers'
                                                  record                    record
F   recovery within the stated time               no           no           no
G   one log line and one metric for each fault    no           no           no
==  ============================================  ===========  ===========  ===========

`check_server` and `check_archive` are here, `check_mirror` is in `replay_service.reflection`.
F and G are about what happened, not about what is there: a test that causes the fault measures
them, with `CheckReport.ok` as the sign that the replay has recovered.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from replay_service.admin import Deadline, ReplayAdmin, StreamState
from replay_service.archive import Archive
from replay_service.audit import Findings, Invariant, LogAudit, StreamSummary, Violation
from replay_service.chunk import MAX_CHUNK_STEPS, decode_chunk
from replay_service.client import ReplayClient
from replay_service.config import UNLIMITED_BUDGET
from replay_service.counters import ReplayStats
from replay_service.entries import LogEntry
from replay_service.errors import ChunkError, ReplayUnavailable

if TYPE_CHECKING:
    from replay_service.limiter import CreditLimiter

NAMES = {
    "A": "every stream is contiguous",
    "B": "no step is there twice",
    "C": "log, stored chunks and counters agree",
    "D": "the train ratio's account is in its band",
    "E": "acknowledged chunks are there",
    "F": "recovery takes no longer than stated",
    "G": "each fault leaves one log line and one metric",
}
ATTEMPTS = 3
Progress = Callable[[int, int], None]
"""Called with the chunks checked so far and their total."""


@dataclass
class CheckReport:
    """What a check found.

    Attributes:
        source: what was checked.
        scope: invariant → how far it was checked, or why it was not.
        findings: violations.
        notes: what is worth knowing and no violation.
        chunks, steps, size_bytes: what is retained.
        streams: what is retained of each stream.
        contents_sha256: equal for equal contents, whatever the order of the log; empty if not all
            of it was read.
        seconds: how long it took.
    """

    source: str
    scope: dict[str, str]
    findings: Findings = field(default_factory=Findings)
    notes: list[str] = field(default_factory=list)
    chunks: int = 0
    steps: int = 0
    size_bytes: int = 0
    streams: dict[str, StreamSummary] = field(default_factory=dict)
    contents_sha256: str = ""
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether nothing contradicts what the replay promises."""
        return not self.findings.found

    @property
    def violations(self) -> list[Violation]:
        """The violations in detail; up to 100 of each invariant."""
        return self.findings.violations

    def take(self, audit: LogAudit) -> None:
        """Copy the totals of an audit."""
        self.chunks, self.steps, self.size_bytes = audit.chunks, audit.steps, audit.size_bytes
        self.streams, self.contents_sha256 = audit.summaries(), audit.contents_sha256()


def check_server(
    client: ReplayClient,
    *,
    contents: bool = True,
    account: CreditLimiter | None = None,
    acknowledged: Mapping[str, int] | None = None,
    excused: Collection[str] = (),
    timeout_s: float = 600.0,
    progress: Progress | None = None,
) -> CheckReport:
    """Check a live replay without changing it or stopping anybody.

    While others write, counters are compared as bounds; on a replay at rest they must be exact.
    Memory is bounded by 8 MiB of chunks and a few hundred bytes per stream.

    Args:
        client: names the server; a connection of its own is used.
        contents: fetch, decode and hash every chunk; else only its stored size is looked at.
        account: the train ratio's account, for D.
        acknowledged: stream with incarnation → newest chunk whose writer got an OK, for E.
        excused: streams whose loss was reported, or that were closed and have been evicted.
        timeout_s: after which it gives up.
        progress: told how far it is.

    Raises:
        ReplayTimeout: when the time is up. ReplayUnavailable: no server, no replay on it, or one
            that restarts again and again. Others as in `ReplayClient.check`.
    """
    deadline = Deadline(timeout_s, "the check")
    with ReplayAdmin.like(client) as admin:
        for _ in range(ATTEMPTS):
            check = _ServerCheck(admin, deadline, contents=contents, progress=progress)
            report = check.run(account, acknowledged, excused)
            if report is not None:
                return report
    raise ReplayUnavailable(
        f"the server at {client.address} restarted or was emptied during each of {ATTEMPTS} "
        "checks; check it again when it is stable"
    )


def check_archive(
    archive: Archive,
    *,
    acknowledged: Mapping[str, int] | None = None,
    excused: Collection[str] = (),
    timeout_s: float = 600.0,
    progress: Progress | None = None,
) -> CheckReport:
    """Check an archive: its files' hashes, and A, B, C and E on every chunk and record.

    Args:
        archive: opened, so that its form is known to be right.
        acknowledged, excused, timeout_s, progress: see `check_server`.

    Raises:
        ReplayTimeout: when the time is up.
    """
    begin, deadline = time.monotonic(), Deadline(timeout_s, "the check")
    findings = Findings()
    audit = LogAudit(findings)
    for name in archive.damaged_files():
        problem = f"{name} is not the file that was exported"
        findings.add(Violation(invariant="C", problem=problem))
    for done, (entry, chunk) in enumerate(archive.entries(), 1):
        audit.enter(entry)
        audit.read(entry, chunk)
        if progress is not None:
            progress(done, archive.chunks)
        deadline.check(f"{done} of {archive.chunks} chunks")
    if (contents := audit.contents_sha256()) != archive.contents_sha256:
        problem = "the contents are not those that the manifest names"
        findings.add(
            Violation(
                invariant="C", problem=problem, got=contents, expected=archive.contents_sha256
            )
        )
    for sid, seq in (acknowledged or {}).items():
        known = audit.known(sid)
        if sid not in excused and (known is None or known[1] < seq):
            findings.add(_lost(sid, seq, known[1] if known else 0))
    faults, live = "needs a test that causes the fault", "needs a live server"
    scope = {"A": "chunks and records", "B": "chunks and records", "C": "files and manifest"}
    scope |= {"D": live, "E": _record(acknowledged), "F": faults, "G": faults}
    report = CheckReport(source=str(archive.directory), scope=scope, findings=findings)
    report.take(audit)
    report.seconds = time.monotonic() - begin
    return report


def judge_account(
    account: CreditLimiter, before: ReplayStats, after: ReplayStats, findings: Findings
) -> list[str]:
    """Check D on two readings of one server, and return notes.

    The account leaves its band only when a counter itself moves back (a learner resumed from an
    older checkpoint, a server that lost its end). Then only the offending side has to wait, so
    what is wrong is an offending side that may go on, or that did between the readings.
    """
    ratio, offset = account.train_ratio, account.i0
    drift = (after.inserted_steps - offset) * ratio - after.replayed_steps
    if after.replayed_steps == 0 and after.budget_steps >= UNLIMITED_BUDGET:
        return ["no train ratio is enforced: no learner has settled yet"]
    credit = offset + int((after.replayed_steps + account.tol_i) // ratio)
    if after.budget_steps > credit:
        findings.add(
            Violation(
                invariant="D",
                problem="more inserts are admitted than the train ratio pays for",
                got=f"budget {after.budget_steps}",
                expected=f"at most {credit}",
            )
        )
    band = f"[{-account.tol_s}, {account.tol_i}]"
    same_lineage = (before.fence, before.epoch) == (after.fence, after.epoch)
    moved = same_lineage and after.replayed_steps > before.replayed_steps
    if drift < -account.tol_s and moved:
        findings.add(
            Violation(
                invariant="D",
                problem="updates went on outside the band",
                got=f"drift {float(drift):.0f}",
                expected=band,
            )
        )
    if -account.tol_s <= drift <= account.tol_i:
        return [f"drift {float(drift):.0f} replayed steps, band {band}"]
    waiting = "updates wait for experience" if drift < 0 else "inserts wait for training"
    return [f"drift {float(drift):.0f} replayed steps is outside {band}: {waiting}"]


class _ServerCheck:
    """One pass over one server."""

    def __init__(
        self,
        admin: ReplayAdmin,
        deadline: Deadline,
        *,
        contents: bool,
        progress: Progress | None,
    ) -> None:
        self._admin, self._deadline, self._contents = admin, deadline, contents
        self._progress = progress or (lambda done, total: None)
        self._findings = Findings()
        self._doubtful = list[Violation]()
        self._audit = LogAudit(self._findings)
        self._schema = admin.schema()

    def run(
        self,
        account: CreditLimiter | None,
        acknowledged: Mapping[str, int] | None,
        excused: Collection[str],
    ) -> CheckReport | None:
        """Return the report, or None if the server was restarted or emptied meanwhile."""
        begin = time.monotonic()
        before = self._admin.stats()
        for page in self._admin.pages(before.committed_chunks, self._schema):
            self._check_page(page)
            self._progress(self._audit.chunks, before.chunks)
            self._deadline.check(f"{self._audit.chunks} of {before.chunks} chunks")
        notes = self._check_streams() + self._check_payloads()
        if acknowledged is not None:
            self._check_acknowledged(acknowledged, excused)
        newest = self._admin.last_log_id()
        after = self._admin.stats()
        if after.epoch != before.epoch or after.committed_chunks < before.committed_chunks:
            return None
        quiet = (after.committed_chunks, after.evicted_steps) == (
            before.committed_chunks,
            before.evicted_steps,
        )
        self._check_counters(before, after, quiet)
        if quiet:
            newest_number = int(newest.partition("-")[2]) if newest else 0
            if newest_number > before.committed_chunks:
                what = "committed chunks and the last log entry"
                self._same(what, before.committed_chunks, newest_number)
            for violation in self._doubtful:
                self._findings.add(violation)
        else:
            notes.append("the replay moved during the check: counters were compared as bounds")
        self._require_admission(before, after)
        if account is not None:
            notes += judge_account(account, before, after, self._findings)
        report = CheckReport(
            source=self._admin.address,
            scope=self._scope(account, acknowledged, quiet),
            findings=self._findings,
            notes=notes + self._quarantined(),
        )
        report.take(self._audit)
        report.seconds = time.monotonic() - begin
        return report

    def _scope(
        self, account: CreditLimiter | None, acknowledged: Mapping[str, int] | None, quiet: bool
    ) -> dict[str, str]:
        depth = "chunks and records" if self._contents else "chunks"
        faults = "needs a test that causes the fault"
        return {
            "A": depth,
            "B": depth,
            "C": "exactly" if quiet else "as bounds: it moved",
            "D": "account and admission" if account else "admission; the account needs a run",
            "E": _record(acknowledged),
            "F": faults,
            "G": faults,
        }

    def _check_page(self, page: list[LogEntry]) -> None:
        sound = [entry for entry in page if not entry.flaw]
        for entry in page:
            if entry.flaw:
                problem = f"entry {entry.entry_id} of the log is none of an insert's"
                self._findings.add(Violation(invariant="C", problem=problem, got=entry.flaw))
        keys = [entry.key for entry in sound]
        blobs = self._admin.fetch(sound) if self._contents else [None] * len(keys)
        sizes = (
            [len(blob) if blob else 0 for blob in blobs]
            if self._contents
            else self._admin.sizes(keys)
        )
        for entry, blob, size in zip(sound, blobs, sizes, strict=True):
            self._enter(entry)
            if size != entry.size_bytes:
                self._judge_size(entry, size)
                self._audit.skip(entry)
            elif blob is None:
                self._audit.skip(entry)
            else:
                self._read(entry, blob)

    def _enter(self, entry: LogEntry) -> None:
        last = self._audit.last
        jumped = last is not None and entry.number > last.number + 1
        gone = jumped and self._admin.stats().evicted_steps >= entry.position
        self._audit.enter(entry, evicted=gone)

    def _judge_size(self, entry: LogEntry, size: int) -> None:
        if not size and self._admin.stats().evicted_steps >= entry.position + entry.steps:
            return
        if size > entry.size_bytes:
            # No more of it was read than shows that it is larger.
            (size,) = self._admin.sizes([entry.key])
        problem = "the stored chunk has another size" if size else "the chunk is missing"
        self._note("C", problem, entry, f"{size} bytes", f"{entry.size_bytes} bytes")

    def _read(self, entry: LogEntry, blob: bytes) -> None:
        try:
            chunk = decode_chunk(blob, self._schema, MAX_CHUNK_STEPS)
        except ChunkError as error:
            self._note("C", "the chunk cannot be decoded", entry, error, "a valid chunk")
            self._audit.skip(entry)
            return
        self._audit.read(entry, chunk)

    def _check_streams(self) -> list[str]:
        """Compare what the server remembers of each stream with what its log holds."""
        unseen = self._audit.sids()
        stale = set()
        for state in self._admin.streams():
            self._deadline.check("all chunks, comparing streams")
            known = self._audit.known(state.sid)
            unseen.discard(state.sid)
            if state.flaw:
                problem = "what the server remembers of a stream makes no sense"
                self._findings.add(
                    Violation(invariant="C", problem=problem, sid=state.sid, got=state.flaw)
                )
            elif known is None:
                stale |= {state.sid} if state.closed else set()
            elif state.last_seq < known[1]:
                self._findings.add(_last_differs(state, known[1]))
            elif state.last_seq > known[1]:
                self._doubtful.append(_last_differs(state, known[1]))
        for sid in sorted(unseen):
            problem = "the log holds a stream that the server has forgotten"
            self._doubtful.append(Violation(invariant="C", problem=problem, sid=sid))
        if stale:
            return [f"{len(stale)} closed streams are still remembered though all is evicted"]
        return []

    def _check_payloads(self) -> list[str]:
        """Compare stored chunks with the log: none may be kept, or expire, without reason."""
        waiting = 0
        for payload in self._admin.payloads():
            self._deadline.check("all chunks, comparing stored ones")
            known = self._audit.known(payload.sid)
            if known is not None and known[0] <= payload.seq <= known[1]:
                if not payload.kept:
                    self._payload("a chunk of the log is going to expire", payload.sid, payload.seq)
            elif not payload.kept:
                waiting += 1
            else:
                problem = "a stored chunk is not in the log"
                sure = known is not None and payload.seq < known[0]
                self._payload(problem, payload.sid, payload.seq, sure=sure)
        return [f"{waiting} chunks were sent and wait for their commit"] if waiting else []

    def _payload(self, problem: str, sid: str, seq: int, *, sure: bool = False) -> None:
        violation = Violation(invariant="C", problem=problem, sid=sid, seq=seq)
        if sure:
            self._findings.add(violation)
        else:
            self._doubtful.append(violation)

    def _check_acknowledged(
        self, acknowledged: Mapping[str, int], excused: Collection[str]
    ) -> None:
        for sid, seq in acknowledged.items():
            if sid in excused:
                continue
            state = self._admin.stream(sid)
            last = state.last_seq if state else 0
            if last < seq:
                self._findings.add(_lost(sid, seq, last))

    def _check_counters(self, before: ReplayStats, after: ReplayStats, quiet: bool) -> None:
        """Compare the counters of one instant with each other and with the log."""
        audit, same = self._audit, self._same
        same("inserted and evicted + held", before.inserted_steps, _accounted(before))
        same("inserted and evicted + held", after.inserted_steps, _accounted(after))
        if audit.last is not None and (quiet or after.evicted_steps < before.inserted_steps):
            reach = audit.last.position + audit.last.steps
            same("inserted steps and the end of the log", before.inserted_steps, reach)
            same("committed chunks and the log", before.committed_chunks, audit.last.number)
        if not quiet:
            return
        same("steps held and the log", before.size_steps, audit.steps)
        same("bytes held and the log", before.size_bytes, audit.size_bytes)
        same("chunks held and the log", before.chunks, audit.chunks)
        if audit.first is not None:
            start = audit.first.position
            same("evicted steps and the start of the log", before.evicted_steps, start)

    def _same(self, what: str, counter: int, log: int) -> None:
        if counter != log:
            problem = f"counters contradict each other: {what}"
            self._findings.add(
                Violation(invariant="C", problem=problem, got=str(counter), expected=str(log))
            )

    def _require_admission(self, before: ReplayStats, after: ReplayStats) -> None:
        """Check the part of D that needs no account: nothing enters above the budget."""
        full = min(before.size_steps, after.size_steps) >= after.min_size_steps
        grew = after.inserted_steps > before.inserted_steps
        if before.fence == after.fence and full and grew:
            if after.inserted_steps > after.budget_steps:
                self._findings.add(
                    Violation(
                        invariant="D",
                        problem="inserts went on above the budget",
                        got=f"{after.inserted_steps} inserted",
                        expected=f"at most {after.budget_steps}",
                    )
                )

    def _quarantined(self) -> list[str]:
        rejected = self._admin.rejected()
        if not rejected:
            return []
        newest = rejected[-1]
        which = f"number {newest.seq} of {newest.sid}" if newest.sid else "none of an insert's"
        return [f"{len(rejected)} chunks are in quarantine, the newest is {which}: {newest.reason}"]

    def _note(
        self, invariant: Invariant, problem: str, entry: LogEntry, got: object, expected: object
    ) -> None:
        self._findings.add(
            Violation(
                invariant=invariant,
                problem=problem,
                sid=entry.sid,
                seq=entry.seq,
                got=str(got),
                expected=str(expected),
            )
        )


def _record(acknowledged: Mapping[str, int] | None) -> str:
    return "needs the writers' record" if acknowledged is None else f"{len(acknowledged)} streams"


def _lost(sid: str, acknowledged: int, committed: int) -> Violation:
    return Violation(
        invariant="E",
        problem="acknowledged chunks are lost",
        sid=sid,
        seq=committed + 1,
        got=f"{committed} committed",
        expected=f"{acknowledged} acknowledged",
    )


def _accounted(stats: ReplayStats) -> int:
    return stats.evicted_steps + stats.size_steps


def _last_differs(state: StreamState, logged: int) -> Violation:
    return Violation(
        invariant="C",
        problem="the server's newest chunk of a stream is not the log's",
        sid=state.sid,
        got=str(state.last_seq),
        expected=str(logged),
    )
