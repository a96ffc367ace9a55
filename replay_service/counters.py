"""The counters of one replay server, as it keeps them and as they are called here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from replay_service.errors import ReplayError

_NUMBER = re.compile(rb"-?[0-9]{1,19}")
_STATS_FIELDS = {
    "inserted_steps": "inserted",
    "size_steps": "size",
    "size_bytes": "bytes",
    "chunks": "chunks",
    "evicted_steps": "evicted",
    "committed_chunks": "committed",
    "replayed_steps": "sampled",
    "budget_steps": "budget",
    "fence": "fence",
    "epoch": "epoch",
    "capacity_steps": "cap_steps",
    "capacity_bytes": "cap_bytes",
    "min_size_steps": "min_size",
}
_LATER_FIELDS = {
    "inserted_bytes": "inserted_bytes",
    "duplicates": "dups",
    "gaps": "gaps",
    "waits": "waits",
    "born": "born",
}
"""Counters that appear with what they count."""


@dataclass(frozen=True, kw_only=True)
class ReplayStats:
    """Counters of one server, read at one instant."""

    inserted_steps: int
    size_steps: int
    size_bytes: int
    chunks: int
    evicted_steps: int
    committed_chunks: int
    replayed_steps: int
    budget_steps: int
    fence: int
    epoch: int
    capacity_steps: int
    capacity_bytes: int
    min_size_steps: int
    inserted_bytes: int
    """Of committed chunks, as they are stored."""
    duplicates: int
    """Inserts of chunks that were there already."""
    gaps: int
    """Inserts refused because an earlier chunk of the stream was missing."""
    waits: int
    """Inserts put off because the train ratio admitted no more."""
    born: int
    """Epoch in which the replay was created; a replay that was lost and made anew has another."""

    @classmethod
    def of(cls, values: Mapping[str, bytes]) -> ReplayStats:
        """Return what the fields of a replay's hash say. Raises ReplayError if one is no number."""
        return cls(
            **{name: _count(key, values.get(key, b"")) for name, key in _STATS_FIELDS.items()},
            **{name: _count(key, values.get(key, b"0")) for name, key in _LATER_FIELDS.items()},
        )

    @classmethod
    def together(cls, found: Sequence[ReplayStats]) -> ReplayStats:
        """Return the counters of several servers added up; fence and epochs are the newest."""
        newest = ("fence", "epoch", "born", "replayed_steps")
        return cls(
            **{
                name: (max if name in newest else sum)(getattr(one, name) for one in found)
                for name in cls.__dataclass_fields__
            }
        )

    @property
    def insert_credit_steps(self) -> int | None:
        """Steps that may still be inserted, or None below the minimum size (no bound yet)."""
        if self.size_steps < self.min_size_steps:
            return None
        return max(self.budget_steps - self.inserted_steps, 0)


def highest_incarnation(values: Mapping[str, bytes]) -> int:
    """Return an incarnation that no stream of a replay exceeds, 0 if there is none."""
    found = (
        _count(name, value) for name, value in values.items() if name.startswith("incarnation")
    )
    return max(found, default=0)


def _count(name: str, value: bytes) -> int:
    if not _NUMBER.fullmatch(value):
        raise ReplayError(
            f"the counters of the replay are damaged, {name} is {value[:40]!r}: if the learner "
            "still runs, end it, empty the server, and start it again from its checkpoint"
        )
    return int(value)
