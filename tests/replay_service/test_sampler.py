"""What is drawn, against the plainest enumeration of what should be."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from replay_service import ReplayConfig, ReplayConfigError, SamplingConfig
from replay_service.pages import PageIndex, page_count
from replay_service.sampler import FLOOR_NATS, Sampler
from replay_service.storage import window_rows

WINDOW, PAGE, BATCH = 5, 4, 64


class Stand:
    """An index with a sampler, filled with episodes whose records know where they belong."""

    def __init__(self, capacity: int = 400, **sampling: Any) -> None:
        pages = page_count(capacity, PAGE)
        self.index = PageIndex(
            pages=pages,
            page_steps=PAGE,
            window_steps=WINDOW,
            capacity_steps=capacity,
            next_page=np.zeros(pages, np.int64),
            valid_cumsum=np.zeros(pages, np.int64),
        )
        self.sampler = Sampler(self.index, SamplingConfig(**sampling))
        self.content = np.full((pages * PAGE, 3), -1)
        """(stream, episode, step) of every row."""
        self._seq: Counter[int] = Counter()
        self._step: Counter[int] = Counter()
        self._episode: Counter[int] = Counter()

    def episode(self, stream: int, length: int, *, chunk: int = 3, last: bool = True) -> None:
        """Insert an episode in chunks; without ``last`` only the next one says that it ended."""
        self._episode[stream] += 1
        first, ends = np.zeros(length, bool), np.zeros(length, bool)
        first[0], ends[-1] = True, last
        for begin in range(0, length, chunk):
            part = slice(begin, begin + chunk)
            self._insert(stream, first[part], ends[part])

    def _insert(self, stream: int, first: np.ndarray, last: np.ndarray) -> None:
        self._seq[stream] += 1
        sid, step = f"s{stream}", self._step[stream]
        for row, count in self.index.place(sid, self._seq[stream], step, len(first)):
            for i in range(count):
                self.content[row + i] = (stream, self._episode[stream], self._step[stream])
                self._step[stream] += 1
        self.sampler.follow(self.index.segment(sid), first, last)
        self.index.refresh()

    def draw(self, update: int, fresh: np.ndarray | None = None, batch: int = BATCH) -> np.ndarray:
        """Return (B, WINDOW, 3): the content of the windows of one batch."""
        rng = np.random.Generator(np.random.Philox(key=[7, update]))
        uniforms = rng.random(batch)
        nothing = np.full(batch, -1)
        chosen = self.sampler.draw(rng, uniforms, nothing if fresh is None else fresh)
        rows = window_rows(
            *(torch.from_numpy(part) for part in chosen),
            torch.from_numpy(self.index.valid_cumsum),
            torch.from_numpy(self.index.next_page),
            PAGE,
            WINDOW,
        )
        found: np.ndarray = self.content[rows.numpy()]
        assert (found[..., 0] == found[:, :1, 0]).all(), "a window holds two streams"
        assert (np.diff(found[..., 2]) == 1).all(), "a window has a gap"
        return found

    def counts(self, updates: int) -> Counter[tuple[int, int]]:
        """Return how often each (stream, first step) was drawn."""
        drawn = [self.draw(update)[:, 0] for update in range(updates)]
        return Counter((int(s), int(t)) for s, _, t in np.concatenate(drawn))


def chi_square(counts: Counter[Any], expected: dict[Any, float]) -> float:
    """Return χ² per degree of freedom of counts against probabilities."""
    assert set(counts) <= set(expected), set(counts) - set(expected)
    n = counts.total()
    terms = [(counts[key] - n * p) ** 2 / (n * p) for key, p in expected.items()]
    return float(sum(terms)) / (len(terms) - 1)


def test_any_window_is_drawn_alike_and_crosses_episodes() -> None:
    stand = Stand()
    for _ in range(4):
        stand.episode(0, 7)
        stand.episode(1, 12)
    expected = {(s, t): 1.0 for s, n in ((0, 28), (1, 48)) for t in range(n - WINDOW + 1)}
    expected = {key: 1 / len(expected) for key in expected}
    assert 0.6 < chi_square(stand.counts(200), expected) < 1.5


def test_within_episodes_an_episode_is_drawn_evenly_and_then_a_start() -> None:
    stand = Stand(windows="episodes")
    lengths = {0: [7, 3, 12, 5], 1: [9, 20]}
    for stream, episodes in lengths.items():
        for length in episodes:
            stand.episode(stream, length, last=length != 12)
        stand.episode(stream, 6, chunk=4, last=False)  # goes on, and is left out
    expected = {}
    for stream, episodes in lengths.items():
        begin = 0
        for length in episodes:
            count = length - WINDOW + 1
            for start in range(count):  # none for the one of three steps
                expected[stream, begin + start] = 1 / 5 / count
            begin += length
    assert 0.6 < chi_square(stand.counts(200), expected) < 1.5
    windows = stand.draw(0)
    assert (windows[..., 1] == windows[:, :1, 1]).all(), "a window holds two episodes"


def test_ends_are_drawn_as_if_starts_beyond_the_last_were_moved_back() -> None:
    stand = Stand(windows="episodes", ends=True)
    stand.episode(0, 12)
    starts = 12 - WINDOW + 1
    drawn = Counter((0, min(start, starts - 1)) for start in range(starts + WINDOW))
    expected = {key: count / drawn.total() for key, count in drawn.items()}
    assert expected[0, starts - 1] == (WINDOW + 1) / (starts + WINDOW)
    assert 0.2 < chi_square(stand.counts(200), expected) < 2.5


def test_any_window_is_drawn_until_an_episode_is_complete() -> None:
    stand = Stand(windows="episodes")
    stand.episode(0, 30, last=False)
    assert len(stand.counts(20)) == 30 - WINDOW + 1
    stand.episode(0, 6, last=False)
    assert set(stand.counts(20)) == {(0, start) for start in range(30 - WINDOW + 1)}


def test_evicted_episodes_are_not_drawn() -> None:
    stand = Stand(capacity=60, windows="episodes", prioritised=0.5)
    for number in range(40):
        stand.episode(number % 2, 5 + number % 7)
        held = {tuple(row) for row in stand.content[live(stand.index)].tolist()}
        for window in stand.draw(number):
            assert {tuple(row) for row in window.tolist()} <= held
            assert len({episode for _, episode, _ in window.tolist()}) == 1


def live(index: PageIndex) -> np.ndarray:
    """Return the rows that hold records."""
    return np.concatenate([index.rows(segment) for segment in index.segments()])


def test_many_short_episodes_are_warned_about_once(caplog: pytest.LogCaptureFixture) -> None:
    stand = Stand(windows="episodes")
    for _ in range(60):
        stand.episode(0, 4)
    stand.episode(0, 8)
    said = [r.getMessage() for r in caplog.records if "short_episodes" in r.getMessage()]
    assert len(said) == 1 and "--replay.sampling.windows any" in said[0]


def test_recent_windows_are_drawn_by_age() -> None:
    mean, steps = 30.0, 200
    stand = Stand(recency=1.0, recency_steps=int(mean))
    stand.episode(0, steps, last=False)
    newest = steps - WINDOW
    ages = np.arange(newest + 1)
    weights = np.exp(-ages / mean)
    expected = {(0, newest - a): w for a, w in zip(ages, weights / weights.sum(), strict=True)}
    likely = {key: p for key, p in expected.items() if p > 1e-3}
    counts = stand.counts(400)
    assert set(counts) <= set(expected)
    kept = Counter({key: counts[key] for key in likely})
    total = sum(likely.values())
    assert 0.6 < chi_square(kept, {k: p / total for k, p in likely.items()}) < 1.5


def test_the_age_follows_the_ring_when_it_wraps() -> None:
    stand = Stand(capacity=60, recency=1.0, recency_steps=3)
    for _ in range(20):
        stand.episode(0, 11)
    newest = 20 * 11 - WINDOW
    starts = [step for _, step in stand.counts(20)]
    assert max(starts) == newest and min(starts) > newest - 45


def test_shares_of_a_batch_are_kept_in_every_batch() -> None:
    stand = Stand(recency=0.25, recency_steps=1, prioritised=0.5)
    stand.episode(0, 300, last=False)
    rows = stand.index.rows(stand.index.segment("s0"))
    losses = np.zeros(300)
    losses[100] = 1e6  # of prioritised draws nearly all are around it
    stand.sampler.write_priorities(rows[None], losses[None], stand.index.generation)
    for update in range(50):
        steps = stand.draw(update, batch=16)[:, 0, 2]
        around = ((steps > 100 - WINDOW) & (steps <= 100)).sum()
        assert 7 <= around <= 10 and 3 <= (steps > 280).sum() <= 6


def test_steps_are_drawn_by_their_loss_and_anywhere_in_their_window() -> None:
    stand = Stand(prioritised=1.0, priority_exponent=0.7)
    stand.episode(0, 40, last=False)
    rows = stand.index.rows(stand.index.segment("s0"))
    losses = np.random.default_rng(0).exponential(1.0, 40)
    assert stand.sampler.write_priorities(rows[None], losses[None], stand.index.generation) == 40
    weights = (losses - losses.min() + FLOOR_NATS) ** 0.7
    expected = dict.fromkeys([(0, start) for start in range(40 - WINDOW + 1)], 0.0)
    for step, weight in enumerate(weights / weights.sum()):
        held_by = [s for s in range(step - WINDOW + 1, step + 1) if 0 <= s <= 40 - WINDOW]
        for start in held_by:
            expected[0, start] += weight / len(held_by)
    assert 0.6 < chi_square(stand.counts(300), expected) < 1.5


def test_new_steps_have_the_greatest_priority_of_the_last_batch() -> None:
    stand = Stand(prioritised=1.0, priority_exponent=1.0)
    stand.episode(0, 20, last=False)
    rows = stand.index.rows(stand.index.segment("s0"))
    stand.sampler.write_priorities(rows[None], np.arange(20.0)[None], stand.index.generation)
    stand.episode(0, 20, last=False)
    found = stand.sampler.state()["held"][0][2]
    np.testing.assert_allclose(found[:20], np.arange(20.0) + FLOOR_NATS, rtol=1e-6)
    np.testing.assert_allclose(found[20:], 19.0 + FLOOR_NATS, rtol=1e-6)


def test_losses_of_replaced_records_and_infinite_ones_are_left_out() -> None:
    stand = Stand(capacity=40, prioritised=1.0)
    stand.episode(0, 36, last=False)
    rows, generation = stand.index.rows(stand.index.segment("s0")), stand.index.generation
    losses = np.ones(36)
    losses[20] = np.nan
    for _ in range(20):  # goes round the whole ring once
        stand.episode(1, 10, last=False)
    before = stand.sampler.state()
    assert stand.sampler.write_priorities(rows[None], losses[None], generation) == 0
    np.testing.assert_equal(stand.sampler.state(), before)
    rows = stand.index.rows(stand.index.segment("s1"))
    losses = np.full(len(rows), np.inf)
    losses[0] = 1.0
    written = stand.sampler.write_priorities(rows[None], losses[None], stand.index.generation)
    assert written == 1


def test_priorities_survive_a_restart_by_stream_and_step() -> None:
    old, new = Stand(prioritised=1.0), Stand(prioritised=1.0)
    old.episode(0, 20, last=False)
    rows = old.index.rows(old.index.segment("s0"))
    losses = np.random.default_rng(0).random((1, 20))
    old.sampler.write_priorities(rows[None], losses, old.index.generation)
    new.episode(1, 9, last=False)
    new.episode(0, 24, last=False)
    new.sampler.restore(old.sampler.state())
    held = {sid: values for sid, _, values in new.sampler.state()["held"]}
    np.testing.assert_array_equal(held["s0"][:20], old.sampler.state()["held"][0][2])
    assert (held["s1"] == 1.0).all()


def test_equal_logs_give_equal_draws_however_they_arrived() -> None:
    sampling: dict[str, Any] = {"windows": "episodes", "ends": True, "prioritised": 0.4}
    whole, bits = Stand(**sampling), Stand(**sampling)
    for length in (9, 14, 6, 31):
        whole.episode(0, length, chunk=3)
        bits.episode(0, length, chunk=3)
        bits.draw(length)  # the trees are brought up to date at other moments
    for update in range(5):
        np.testing.assert_array_equal(whole.draw(update), bits.draw(update))
    assert not np.array_equal(whole.draw(0), whole.draw(1))


def test_new_windows_keep_their_places() -> None:
    stand = Stand(prioritised=0.5, recency=0.5)
    stand.episode(0, 100, last=False)
    fresh = np.full(BATCH, -1)
    fresh[:3] = stand.index.rows(stand.index.segment("s0"))[[40, 41, 42]]
    assert stand.draw(0, fresh)[:3, 0, 2].tolist() == [40, 41, 42]


@pytest.mark.parametrize(
    ("sampling", "hint"),
    [
        ({"recency": 0.6, "prioritised": 0.5}, "more than the whole batch"),
        ({"online": 1.5}, "share of 0 to 1"),
        ({"ends": True}, "set it to episodes"),
        ({"windows": "episodes", "recency": 0.5}, "set it to any"),
        ({"priority_exponent": -1.0}, "expected 0 to 10"),
        ({"recency_steps": 0}, "recency_steps is 0"),
    ],
)
def test_combinations_that_cannot_be_kept_are_refused(sampling: dict[str, Any], hint: str) -> None:
    with pytest.raises(ReplayConfigError, match=hint):
        SamplingConfig(**sampling)


def test_new_windows_are_refused_within_episodes() -> None:
    with pytest.raises(ReplayConfigError, match="--replay.no-online"):
        ReplayConfig(sampling=SamplingConfig(windows="episodes"))
    ReplayConfig(online=False, sampling=SamplingConfig(windows="episodes"))
