from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replay_service.pages import PageIndex, page_count


class Reference:
    """Keeps every row's (stream, segment, step) in the plainest way."""

    def __init__(self, index: PageIndex, rows: int) -> None:
        self.index = index
        self.content: list[tuple[str, int, int] | None] = [None] * rows
        self.last: dict[str, int] = {}
        self.segment: dict[str, int] = {}

    def place(self, sid: str, seq: int, first: int, steps: int) -> None:
        if seq <= self.last.get(sid, 0):
            assert self.index.place(sid, seq, first, steps) == []
            return
        if seq != self.last.get(sid, 0) + 1:
            self.segment[sid] = self.segment.get(sid, 0) + 1
        self.last[sid] = seq
        done = 0
        for row, count in self.index.place(sid, seq, first, steps):
            for i in range(count):
                self.content[row + i] = (sid, self.segment.get(sid, 0), first + done + i)
            done += count
        assert done == steps

    def live(self) -> dict[int, tuple[str, int, int]]:
        size, fill = self.index.page_steps, self.index._fill
        rows = [page * size + i for page, n in enumerate(fill) for i in range(int(n))]
        return {row: found for row in rows if (found := self.content[row]) is not None}


def walk(index: PageIndex, row: int, length: int) -> list[int]:
    """Follow the page links from a row."""
    rows, page, offset = [], row // index.page_steps, row % index.page_steps
    for _ in range(length):
        rows.append(page * index.page_steps + offset)
        offset += 1
        if offset == index.page_steps:
            page, offset = int(index.next_page[page]), 0
    return rows


def make(pages: int, page_steps: int, window: int, capacity: int) -> PageIndex:
    return PageIndex(
        pages=pages,
        page_steps=page_steps,
        window_steps=window,
        capacity_steps=capacity,
        next_page=np.zeros(pages, np.int64),
        valid_cumsum=np.zeros(pages, np.int64),
    )


def starts(index: PageIndex) -> list[int]:
    index.refresh()
    counts = np.diff(index.valid_cumsum, prepend=0)
    return [p * index.page_steps + i for p, n in enumerate(counts) for i in range(int(n))]


@given(
    page_steps=st.integers(1, 6),
    window=st.integers(1, 12),
    capacity=st.integers(5, 60),
    inserts=st.lists(
        st.tuples(st.integers(0, 3), st.integers(1, 14), st.sampled_from([1, 1, 1, 1, 0, 2])),
        max_size=60,
    ),
)
@settings(max_examples=300, deadline=None)
def test_index_agrees_with_a_plain_reference(
    page_steps: int, window: int, capacity: int, inserts: list[tuple[int, int, int]]
) -> None:
    pages = capacity // page_steps + 5
    index = make(pages, page_steps, window, capacity)
    reference = Reference(index, pages * page_steps)
    position: dict[str, int] = {}
    for slot, steps, skip in inserts:
        sid = f"s{slot}"
        first = position.get(sid, 0) + 100 * (skip == 2)
        reference.place(sid, reference.last.get(sid, 0) + skip, first, steps)
        position[sid] = first + steps * (skip > 0)
        assert index.size_steps == len(reference.live()) <= capacity
    live = reference.live()
    valid = starts(index)
    assert index.valid_starts == len(valid)
    for row in valid:
        found = [live[at] for at in walk(index, row, window)]
        assert len({(sid, segment) for sid, segment, _ in found}) == 1
        assert [step for *_, step in found] == list(range(found[0][2], found[0][2] + window))
    held = set(live.values())
    complete = {
        (sid, seg, step)
        for sid, seg, step in held
        if all((sid, seg, step + i) in held for i in range(window))
    }
    assert {live[row] for row in valid} <= complete
    if index.size_steps + 4 * page_steps < capacity:
        assert {live[row] for row in valid} == complete


def test_every_complete_window_may_start_until_something_is_evicted() -> None:
    index = make(page_count(1000, 8), 8, 11, 1000)
    for seq in range(1, 21):
        for sid in ("a", "b", "c"):
            index.place(sid, seq, (seq - 1) * 10, 10)
    assert len(starts(index)) == 3 * (200 - 11 + 1)


def test_windows_are_reported_once_and_do_not_overlap() -> None:
    index = make(40, 4, 5, 100)
    seen = []
    for seq in range(1, 8):
        index.place("a", seq, (seq - 1) * 3, 3)
        seen += [offset for _, offset in index.new_windows("a")]
    assert seen == [0, 5, 10, 15]


def test_evicted_window_has_no_row() -> None:
    index = make(40, 4, 5, 12)
    index.place("a", 1, 0, 8)
    [(segment, offset)] = index.new_windows("a")
    assert index.row_of(segment, offset) == 0
    index.place("b", 1, 0, 12)
    assert index.row_of(segment, offset) == -1
    assert index.find("a", 99) is None and index.find("zzz", 0) is None


@pytest.mark.parametrize(("capacity", "page", "want"), [(64, 64, 33), (1_000_000, 64, 16113)])
def test_page_count_leaves_room_for_half_filled_pages(capacity: int, page: int, want: int) -> None:
    assert page_count(capacity, page) == want
