"""Which windows an update trains on: new ones, any, within episodes, recent, or badly predicted."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from replay_service.config import SamplingConfig
from replay_service.pages import NO_PAGE, PageIndex, Segment
from replay_service.sumtree import SumTree

log = logging.getLogger(__name__)

FLOOR_NATS = 0.01
"""Added to the loss of a step before it becomes a priority: no step is left out for ever."""
_WORTH_A_WARNING = 20
"""Windows' worth of complete episodes after which skipped ones are warned about."""


class Sampler:
    """Chooses the first row of every window of a batch.

    Guarantees:
        1. The choice is a function of (seed, update number, log) and, for prioritised draws, of
           the losses that were written back.
        2. Cost per batch does not grow with the replay, except by the depth of a tree.
        3. With ``windows="episodes"`` no window holds records of two episodes, once there is a
           complete episode that is long enough; until then any window is drawn.

    Args:
        index: rows of the mirror, which says what to follow.
        config: what to draw.
    """

    def __init__(self, index: PageIndex, config: SamplingConfig) -> None:
        self._index, self._config = index, config
        rows = len(index.next_page) * index.page_steps
        whole = config.windows == "episodes"
        self._episodes = _EpisodeStarts(index, rows, ends=config.ends) if whole else None
        self._priorities = (
            _Priorities(index, rows, config.priority_exponent) if config.prioritised else None
        )

    def follow(self, segment: Segment, is_first: np.ndarray, is_last: np.ndarray) -> None:
        """Take note of records that were just placed at the end of a segment."""
        evicted, index = self._index.take_evicted(), self._index
        gone = (evicted[:, None] * index.page_steps + np.arange(index.page_steps)).reshape(-1)
        for tree in self._trees():
            if len(gone):
                tree.set(gone, 0.0)
        if self._episodes is not None:
            stretches = self._episodes.follow(segment, is_first, is_last)
        elif segment.length >= index.window_steps:
            stretches = [(segment.covered, segment.length)]
            segment.covered = segment.length
        else:
            stretches = []
        if self._priorities is not None:
            for begin, end in stretches:
                self._priorities.admit(index.rows(segment, begin, end))

    def draw(
        self, rng: np.random.Generator, uniforms: np.ndarray, fresh: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Choose the windows of one batch.

        Args:
            rng: for what the uniforms do not decide.
            uniforms: (B,) float64 in [0, 1).
            fresh: (B,) int64 rows of new windows, or -1 where there are no more.

        Returns:
            (B,) uniforms and (B,) rows as `storage.window_rows` takes them: a window begins at the
            row, or where that is -1, at the start that the uniform number selects.
        """
        slots, steps = rng.random((2, len(uniforms)))
        uniforms, starts = uniforms.copy(), fresh.copy()
        free = np.flatnonzero(starts < 0)
        # One random offset for the whole batch: every share gets its number of windows, give or
        # take one, and exactly its share on average.
        where = (np.arange(len(free)) + slots[0]) / max(len(free), 1)
        config = self._config
        by_priority = free[where < config.prioritised]
        recent = free[where >= 1.0 - config.recency]
        if self._priorities is not None and len(by_priority) and self._priorities.tree.total > 0:
            found = self._priorities.tree.find(uniforms[by_priority])
            starts[by_priority] = self._start_around(found, steps[by_priority])
        if len(recent):
            uniforms[recent] = self._aged(uniforms[recent])
        rest = np.setdiff1d(np.flatnonzero(starts < 0), recent)
        if self._episodes is not None and len(rest) and self._episodes.tree.total > 0:
            starts[rest] = self._episodes.tree.find(uniforms[rest])
        return uniforms, starts

    def write_priorities(self, rows: np.ndarray, losses: np.ndarray, generation: int) -> int:
        """Set priorities by the losses of steps that were trained on.

        Args:
            rows: (B, T) int64 of the steps.
            losses: (B, T) in nats; steps whose loss is not finite keep their priority.
            generation: of the index when the windows were drawn. Rows that were given to other
                records since then are left alone.

        Returns:
            Steps whose priority was set.
        """
        if self._priorities is None:
            return 0
        return self._priorities.write(rows.reshape(-1), losses.reshape(-1), generation)

    def state(self) -> dict[str, Any]:
        """Return the priorities by stream and step, for `restore`; {} where there are none.

        ``held`` lists (stream, first step, (n,) float32) for each gapless stretch.
        """
        if self._priorities is None:
            return {}
        held = []
        for segment in self._index.segments():
            first = segment.first_step + segment.dropped_pages * self._index.page_steps
            values = self._priorities.tree.weights[self._index.rows(segment)].astype(np.float32)
            held.append((segment.sid, first, values))
        return {
            "held": held,
            "lowest": self._priorities.lowest,
            "newest": self._priorities.newest,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Put back the priorities of the steps that are still held."""
        if self._priorities is None or not state:
            return
        self._priorities.lowest = float(state["lowest"])
        self._priorities.newest = float(state["newest"])
        held: dict[str, list[Segment]] = {}
        for segment in self._index.segments():
            held.setdefault(segment.sid, []).append(segment)
        for sid, first, values in state["held"]:
            for segment in held.get(sid, ()):
                begin = max(first, segment.first_step)
                end = min(first + len(values), segment.first_step + segment.length)
                if begin < end:
                    self._priorities.put_back(segment, begin, values[begin - first : end - first])

    def _trees(self) -> list[SumTree]:
        return [part.tree for part in (self._episodes, self._priorities) if part is not None]

    def _aged(self, uniforms: np.ndarray) -> np.ndarray:
        """Turn uniform numbers into those that select starts of exponentially distributed age."""
        total = self._index.valid_starts
        if not total:
            return uniforms
        mean = self._config.recency_steps
        age = -mean * np.log1p(uniforms * np.expm1(-total / mean))
        newest = self._index.newest_start
        at: np.ndarray = (newest - np.minimum(age.astype(np.int64), total - 1)) % total
        return (at + 0.5) / total

    def _start_around(self, rows: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
        """Return for each row the start of one of the windows that hold it, -1 if there is none."""
        index = self._index
        size, length = index.page_steps, index.window_steps
        chain = [rows // size]
        for _ in range((length - 2 + size) // size):
            before = np.where(chain[-1] >= 0, index.prev_page[chain[-1]], NO_PAGE)
            chain.append(before)
        steps = (rows % size)[:, None] - np.arange(length)
        pages = np.take_along_axis(np.stack(chain, 1), -(steps // size), 1)
        starts = pages * size + steps % size
        if self._episodes is not None:
            allowed = self._episodes.tree.weights[np.maximum(starts, 0)] > 0
        else:
            allowed = steps % size < index.valid[np.maximum(pages, 0)]
        allowed &= pages >= 0
        order = allowed.cumsum(1)
        choice = np.floor(uniforms * order[:, -1]).astype(np.int64) + 1
        at = (allowed & (order == choice[:, None])).argmax(1)
        found = starts[np.arange(len(rows)), at]
        return np.where(order[:, -1] > 0, found, NO_PAGE)


class _EpisodeStarts:
    """Starts of windows inside complete episodes: an episode evenly, then a start within it."""

    def __init__(self, index: PageIndex, rows: int, *, ends: bool) -> None:
        self.tree = SumTree(rows)
        self._index, self._ends = index, ends
        self._complete_steps = self._skipped_steps = 0
        self._warned = False

    def follow(
        self, segment: Segment, is_first: np.ndarray, is_last: np.ndarray
    ) -> list[tuple[int, int]]:
        """Return the (begin, end) of episodes that were completed, if a window fits into them."""
        begin = segment.length - len(is_first)
        # An episode ends behind its last record, or before the first one of the next.
        cuts = np.union1d(begin + np.flatnonzero(is_last) + 1, begin + np.flatnonzero(is_first))
        found = []
        for cut in cuts[cuts > segment.episode].tolist():
            if self._admit(segment, segment.episode, cut):
                found.append((segment.episode, cut))
            segment.episode = cut
        return found

    def _admit(self, segment: Segment, begin: int, end: int) -> bool:
        window = self._index.window_steps
        count = end - begin - window + 1
        self._complete_steps += end - begin
        if count < 1:
            self._skipped_steps += end - begin
            self._warn_if_many()
            return False
        weights = np.ones(count)
        if self._ends:
            weights[-1] += window
        rows = self._index.rows(segment, begin, begin + count)
        self.tree.set(rows, (weights / weights.sum())[count - len(rows) :])
        return True

    def _warn_if_many(self) -> None:
        window, skipped, steps = self._index.window_steps, self._skipped_steps, self._complete_steps
        if self._warned or steps < _WORTH_A_WARNING * window or 2 * skipped < steps:
            return
        self._warned = True
        log.warning(
            "sampling_skips_short_episodes share=%.2f: episodes of fewer than %d steps hold no "
            "window, and replay.sampling.windows is episodes; use --replay.sampling.windows any, "
            "or a smaller --learner.batch-length",
            skipped / steps,
            window,
        )


class _Priorities:
    """A weight for every step: the loss with which it was last trained on, to a power."""

    def __init__(self, index: PageIndex, rows: int, exponent: float) -> None:
        self.tree = SumTree(rows)
        self.lowest = np.inf
        self.newest = 1.0
        self._index, self._exponent = index, exponent

    def admit(self, rows: np.ndarray) -> None:
        """Give steps that were never trained on the greatest priority of the last batch."""
        self.tree.set(rows, self.newest)

    def write(self, rows: np.ndarray, losses: np.ndarray, generation: int) -> int:
        """See `Sampler.write_priorities`."""
        same = self._index.born[rows // self._index.page_steps] <= generation
        keep = same & np.isfinite(losses)
        rows, losses = rows[keep], losses[keep].astype(np.float64)
        if not len(rows):
            return 0
        # Losses hold constants, such as those of a normal density: only differences count.
        self.lowest = min(self.lowest, float(losses.min()))
        priorities = (losses - self.lowest + FLOOR_NATS) ** self._exponent
        # A checkpoint holds them in single precision, and a resumed run must draw the same.
        priorities = priorities.astype(np.float32).astype(np.float64)
        self.newest = float(priorities.max())
        self.tree.set(rows, priorities)
        return len(rows)

    def put_back(self, segment: Segment, first_step: int, values: np.ndarray) -> None:
        """Set the priorities of consecutive steps of a segment that have one already."""
        begin = first_step - segment.first_step
        rows = self._index.rows(segment, begin, begin + len(values))
        values = values[len(values) - len(rows) :]
        known = (self.tree.weights[rows] > 0) & (values > 0)
        self.tree.set(rows[known], values[known])
