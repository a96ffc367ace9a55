"""Entries of the log: what they say, as far as it can be true.

Whoever may insert can also add to the log by other ways, so an entry is as little trusted as the
chunk that it names: an odd one is told by `LogEntry.flaw`, and nothing is fetched for it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from replay_service.chunk import MAX_CHUNK_STEPS, MAX_STREAM_CHARS, brief, max_blob_bytes
from replay_service.schema import Schema

_FIELDS = [b"k", b"n", b"b", b"s", b"q", b"g"]
_NUMBER = re.compile(rb"0|[1-9][0-9]{0,15}")
_MOST = 2**53
_MOST_EPOCH = _MOST - 2**20
"""Epochs from here on leave no higher one for inserts, see functions.lua."""
_SID = re.compile(r"(.+)@(0|[1-9][0-9]{0,15})")
_SHOWN = 300


class LogEntry(NamedTuple):
    """One committed chunk as the log lists it."""

    entry_id: str
    key: str
    steps: int
    size_bytes: int
    sid: str
    seq: int
    position: int
    """Steps that had been inserted before this chunk."""
    flaw: str = ""
    """Why no insert can have made this entry, whose fields are then empty; else empty."""

    @property
    def number(self) -> int:
        """Ordinal of the chunk among all that were committed."""
        return int(self.entry_id.partition("-")[2])

    def judged(self, schema: Schema) -> LogEntry:
        """Return the entry, with a flaw if no chunk of the schema can be as large as it says."""
        if self.flaw or self.size_bytes <= max_blob_bytes(schema, self.steps):
            return self
        most = f"{max_blob_bytes(schema, self.steps)} bytes of {self.steps} steps"
        return flawed(self.entry_id, f"b is {self.size_bytes}, more than the {most}")


def flawed(entry_id: str, flaw: str) -> LogEntry:
    """Return what is passed on of an entry that no insert can have made."""
    return LogEntry(entry_id, "", 0, 0, "", 0, 0, flaw)


def parse_entry(entry_id: bytes, fields: Sequence[bytes], prefix: str) -> LogEntry:
    """Return what an entry says, or its flaw; never raises.

    Args:
        entry_id: given by the server.
        fields: names and values by turns; they may come from anybody.
        prefix: hash tag of the shard, with which the chunk's key has to begin.
    """
    number = entry_id.decode()
    try:
        return _parse(number, fields, prefix)
    except ValueError as error:
        return flawed(number, str(error))


def _parse(entry_id: str, fields: Sequence[bytes], prefix: str) -> LogEntry:
    if int(entry_id.partition("-")[0]) >= _MOST_EPOCH:
        raise ValueError(
            "its id leaves no higher one for inserts, which wait until it is mended: see "
            "docs/security.md, A log that takes no more"
        )
    if list(fields[::2]) != _FIELDS or len(fields) != 2 * len(_FIELDS):
        shown = ", ".join(brief(word) for word in fields[:14])
        raise ValueError(f"fields are {shown:.{_SHOWN}}, expected k, n, b, s, q, g")
    key, steps, size, name, seq, position = fields[1::2]
    sid = name.decode(errors="replace")
    found = _SID.fullmatch(sid)
    if found is None or not sid.isprintable() or len(found[1]) > MAX_STREAM_CHARS:
        raise ValueError(f"s is {brief(name)}, expected stream@incarnation")
    entry = LogEntry(
        entry_id=entry_id,
        key=f"{prefix}:c:{sid}:{seq.decode(errors='replace')}",
        steps=_number("n", steps, 1, MAX_CHUNK_STEPS),
        size_bytes=_number("b", size, 1, _MOST),
        sid=sid,
        seq=_number("q", seq, 1, _MOST),
        position=_number("g", position, 0, _MOST),
    )
    if entry.key.encode() != key:
        raise ValueError(f"k is {brief(key)}, expected {entry.key}")
    return entry


def _number(name: str, value: bytes, low: int, high: int) -> int:
    # The pattern also keeps a million digits from being turned into a number.
    if not _NUMBER.fullmatch(value) or not low <= int(value) <= high:
        raise ValueError(f"{name} is {brief(value)}, expected an integer in [{low}, {high}]")
    return int(value)
