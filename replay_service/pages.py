"""Which rows of a paged ring hold which stream, and where whole windows may start.

Rows come in pages of equal size. A stream fills its current page and links it to its next one;
pages are taken, and later given up, in the order of a ring::

    pages      0        1        2        3        4        5
            ┌────────┬────────┬────────┬────────┬────────┬────────┐
            │ a a a a│ b b b b│ a a a a│ a a · ·│ b b b ·│  free  │
            └────────┴────────┴────────┴────────┴────────┴────────┘
    next       2        4        3       -1       -1       -1
    valid      4        3        2        0        0        0      (windows of 5 records)

The starts of whole windows are always a prefix of a page, so one count per page describes them.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np

NO_PAGE = -1
_NEVER = 2**62


def page_count(capacity_steps: int, page_steps: int) -> int:
    """Return the pages for a capacity: enough for the steps, and some for half-filled pages."""
    pages = -(-capacity_steps // page_steps)
    return pages + max(32, pages // 32)


@dataclass(eq=False)
class Segment:
    """A gapless stretch of one stream."""

    sid: str
    first_step: int
    pages: deque[int] = field(default_factory=deque)
    dropped_pages: int = 0
    length: int = 0
    windows: int = 0
    episode: int = 0
    """Record at which the episode begins that is not complete yet."""
    covered: int = 0
    """Records, from the first on, that some whole window holds."""


class PageIndex:
    """Book-keeping of the ring. Pure numpy; the arrays may be views into a device's buffers.

    Args:
        pages, page_steps: size of the ring.
        window_steps: records of one window.
        capacity_steps: above this many records whole oldest pages are given up.
        next_page, valid_cumsum: (pages,) int64, kept up to date in place.

    `prev_page` is the reverse of `next_page`, `valid` the starts of each page, `generation` the
    number of pages taken so far, and `born` its value when a page was taken: what was read from a
    page at a generation below `born` is no longer there.
    """

    def __init__(
        self,
        *,
        pages: int,
        page_steps: int,
        window_steps: int,
        capacity_steps: int,
        next_page: np.ndarray,
        valid_cumsum: np.ndarray,
    ) -> None:
        assert next_page.shape == valid_cumsum.shape == (pages,)
        self.page_steps = page_steps
        self.window_steps = window_steps
        self.capacity_steps = capacity_steps
        self.next_page = next_page
        self.valid_cumsum = valid_cumsum
        self.next_page.fill(NO_PAGE)
        self.valid_cumsum.fill(0)
        self.size_steps = 0
        self._pages = pages
        self.prev_page = np.full(pages, NO_PAGE, np.int64)
        self.valid = np.zeros(pages, np.int64)
        self.born = np.full(pages, _NEVER, np.int64)
        self.generation = 0
        self._evicted: list[int] = []
        self._fill = np.zeros(pages, np.int64)
        self._owner: list[Segment | None] = [None] * pages
        self._head = 0
        self._live = 0
        self._segments: dict[str, Segment] = {}
        self._last_seq: dict[str, int] = {}

    @property
    def valid_starts(self) -> int:
        """Number of rows at which a whole window starts, as of the last `refresh`."""
        return int(self.valid_cumsum[-1])

    @property
    def newest_start(self) -> int:
        """Position of the newest valid start among all, in the order of their rows."""
        return int(self.valid_cumsum[self._head - 1]) - 1

    def last_seq(self, sid: str) -> int:
        """Return the newest chunk of a stream that was placed, 0 for none."""
        return self._last_seq.get(sid, 0)

    def newest_chunks(self) -> dict[str, int]:
        """Return the newest chunk that was placed of every stream there was."""
        return dict(self._last_seq)

    def place(self, sid: str, seq: int, first_step: int, steps: int) -> list[tuple[int, int]]:
        """Find rows for the next chunk of a stream.

        A chunk that does not follow its predecessor, or whose stream has lost all its pages, starts
        a new segment, so that no window is ever stitched over the gap. A chunk that was placed
        before gets no rows.

        Returns:
            (first row, count) of each piece, in the order of the records.
        """
        last = self.last_seq(sid)
        if seq <= last:
            return []
        segment = self._segments.get(sid)
        if segment is None or seq != last + 1 or not segment.pages:
            segment = self._segments[sid] = Segment(sid, first_step)
        self._last_seq[sid] = seq
        pieces = self._extend(segment, steps)
        self._update_valid(segment)
        while self.size_steps > self.capacity_steps:
            self._evict_oldest()
        return pieces

    def segment(self, sid: str) -> Segment:
        """Return the newest stretch of a stream that has one."""
        return self._segments[sid]

    def take_evicted(self) -> np.ndarray:
        """Return (n,) int64 pages that were given up since the last call."""
        pages = np.array(self._evicted, np.int64)
        self._evicted.clear()
        return pages

    def refresh(self) -> None:
        """Bring `valid_cumsum` up to date after one or more calls of `place`."""
        np.cumsum(self.valid, out=self.valid_cumsum)

    def new_windows(self, sid: str) -> list[tuple[Segment, int]]:
        """Return the non-overlapping windows of a stream completed since the last call."""
        segment = self._segments[sid]
        done = segment.length // self.window_steps
        fresh = [(segment, i * self.window_steps) for i in range(segment.windows, done)]
        segment.windows = done
        return fresh

    def row_of(self, segment: Segment, offset: int) -> int:
        """Return the row of a record of a segment, or -1 if it has been given up."""
        page = offset // self.page_steps - segment.dropped_pages
        if not 0 <= page < len(segment.pages):
            return NO_PAGE
        return segment.pages[page] * self.page_steps + offset % self.page_steps

    def find(self, sid: str, step: int) -> tuple[Segment, int] | None:
        """Return segment and offset of a step of a stream, or None if it is not held."""
        segment = self._segments.get(sid)
        if segment is None or not 0 <= step - segment.first_step < segment.length:
            return None
        return segment, step - segment.first_step

    def segments(self) -> list[Segment]:
        """Return every stretch that still holds records, in the order of their oldest page."""
        pages = ((self._head - self._live + at) % self._pages for at in range(self._live))
        return list(dict.fromkeys(owner for page in pages if (owner := self._owner[page])))

    def rows(self, segment: Segment, begin: int = 0, end: int | None = None) -> np.ndarray:
        """Return (n,) int64 rows of the records of a stretch from `begin` to before `end`.

        Those that were given up are left out.
        """
        size, dropped = self.page_steps, segment.dropped_pages
        begin = max(begin, dropped * size)
        end = max(begin, segment.length if end is None else min(end, segment.length))
        first, last = begin // size - dropped, -(-end // size) - dropped
        # An index into a deque is found from its nearer end: a few pages cost little anywhere.
        whole = last - first == len(segment.pages)
        held = segment.pages if whole else [segment.pages[at] for at in range(first, last)]
        starts = np.array(held, np.int64) * size
        rows = (starts[:, None] + np.arange(size)).reshape(-1)
        return rows[begin % size : begin % size + end - begin]

    def _extend(self, segment: Segment, steps: int) -> list[tuple[int, int]]:
        pieces = []
        while steps:
            page = segment.pages[-1] if segment.pages else NO_PAGE
            if page == NO_PAGE or self._fill[page] == self.page_steps:
                page = self._take_page(segment)
            fill = int(self._fill[page])
            count = min(steps, self.page_steps - fill)
            pieces.append((page * self.page_steps + fill, count))
            self._fill[page] += count
            self.size_steps += count
            segment.length += count
            steps -= count
        return pieces

    def _take_page(self, segment: Segment) -> int:
        if self._live == self._pages:
            self._evict_oldest()
        page = self._head
        self._head = (page + 1) % self._pages
        self._live += 1
        self._owner[page] = segment
        self.generation += 1
        self.born[page] = self.generation
        self.prev_page[page] = NO_PAGE
        if segment.pages:
            self.next_page[segment.pages[-1]] = page
            self.prev_page[page] = segment.pages[-1]
        segment.pages.append(page)
        return page

    def _evict_oldest(self) -> None:
        page = (self._head - self._live) % self._pages
        segment = self._owner[page]
        assert segment is not None and segment.pages[0] == page
        segment.pages.popleft()
        segment.dropped_pages += 1
        self.size_steps -= int(self._fill[page])
        self._fill[page] = self.valid[page] = 0
        if self.next_page[page] != NO_PAGE:
            self.prev_page[self.next_page[page]] = NO_PAGE
        self.next_page[page] = NO_PAGE
        self.born[page] = _NEVER
        self._owner[page] = None
        self._evicted.append(page)
        self._live -= 1

    def _update_valid(self, segment: Segment) -> None:
        records = 0
        for page in reversed(segment.pages):
            if self.valid[page] == self.page_steps:
                break
            records += int(self._fill[page])
            self.valid[page] = min(max(records - self.window_steps + 1, 0), self.page_steps)
