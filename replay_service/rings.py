"""What a writer process keeps of acknowledged chunks, in case the server forgets them."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass

from replay_service.budgets import ByteBudget


@dataclass(frozen=True)
class Sent:
    """One acknowledged chunk, encoded."""

    seq: int
    steps: int
    blob: bytes


class ResendRings:
    """The newest acknowledged chunks of every stream, bounded in chunks per stream and in bytes.

    Above the bytes the longest ring lets its oldest chunk go, so that streams share them evenly;
    each keeps at least one.

    Args:
        chunks: of each stream.
        limit_bytes: over all streams.
    """

    def __init__(self, chunks: int, limit_bytes: int) -> None:
        self.size_bytes = 0
        self._chunks, self._limit_bytes = chunks, limit_bytes
        self._rings: dict[Hashable, deque[Sent]] = {}
        self._budget = ByteBudget(
            "resend rings",
            "above it older chunks are let go, which a server that forgets them cannot get back: "
            "raise --replay.resend-bytes, or lower --replay.resend-chunks",
        )

    def add(self, stream: Hashable, sent: Sent) -> None:
        """Keep one more chunk of a stream."""
        ring = self._rings.setdefault(stream, deque())
        ring.append(sent)
        self.size_bytes += len(sent.blob)
        if len(ring) > self._chunks:
            self._let_go(ring)
        while self.size_bytes > self._limit_bytes:
            longest = max(self._rings.values(), key=len)
            if len(longest) == 1:
                break
            self._let_go(longest)
        self._budget.watch(self.size_bytes, self._limit_bytes)

    def after(self, stream: Hashable, last: int) -> list[Sent]:
        """Return the kept chunks of a stream that follow chunk `last`."""
        return [sent for sent in self._rings.get(stream, ()) if sent.seq > last]

    def drop(self, stream: Hashable, after: int = 0) -> None:
        """Forget the chunks of a stream that follow a chunk, or all."""
        ring = self._rings.pop(stream, deque())
        kept = deque(sent for sent in ring if sent.seq <= after)
        self.size_bytes -= sum(len(sent.blob) for sent in ring)
        self.size_bytes += sum(len(sent.blob) for sent in kept)
        if kept:
            self._rings[stream] = kept

    def _let_go(self, ring: deque[Sent]) -> None:
        self.size_bytes -= len(ring.popleft().blob)
