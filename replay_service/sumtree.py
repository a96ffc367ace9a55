"""Drawing rows in proportion to weights of which a few change at a time."""

from __future__ import annotations

import numpy as np

_REBUILD_SHARE = 8


def tree_bytes(rows: int) -> int:
    """Return the memory of a tree over so many rows."""
    return 16 * _leaves(rows)


def _leaves(rows: int) -> int:
    return 1 << max(1, (rows - 1).bit_length())


class SumTree:
    """A binary tree whose nodes are the sums of their two children, over the weights of all rows.

    Guarantees:
        1. What `find` returns depends on the weights alone, not on the order in which they were
           set: every node is computed from its children, never adjusted.
        2. A row of weight 0 is never found while another one has a weight.

    Changing k weights takes O(k log n), paid at the next draw, and a draw O(log n), whatever n.

    Args:
        rows: number of weights, all 0 at first.
    """

    def __init__(self, rows: int) -> None:
        self._first = _leaves(rows)
        self._nodes = np.zeros(2 * self._first)
        self._stale: list[np.ndarray] = []
        self.weights = self._nodes[self._first : self._first + rows]
        """(rows,) float64, to be read; `set` changes them."""

    @property
    def total(self) -> float:
        """Sum of all weights."""
        self._refresh()
        return float(self._nodes[1])

    def set(self, rows: np.ndarray, weights: np.ndarray | float) -> None:
        """Replace the weights of some rows; of a row that is given twice the last one counts.

        Args:
            rows: (n,) int64.
            weights: (n,) finite and not negative, or one for all.
        """
        self.weights[rows] = weights
        self._stale.append(rows)

    def find(self, uniforms: np.ndarray) -> np.ndarray:
        """Return (n,) int64 rows, drawn in proportion to their weights; the total must be above 0.

        Args:
            uniforms: (n,) float64 in [0, 1).
        """
        rest = uniforms * self.total
        node = np.ones(len(uniforms), np.int64)
        while node.size and node[0] < self._first:
            node *= 2
            left = self._nodes[node]
            # Rounding can leave a rest of the whole sum: it stays where there is weight.
            right = (rest >= left) & (self._nodes[node + 1] > 0)
            rest = np.where(right, rest - left, rest)
            node += right
        return node - self._first

    def _refresh(self) -> None:
        if not self._stale:
            return
        changed = np.concatenate(self._stale) + self._first
        self._stale.clear()
        if len(changed) * _REBUILD_SHARE > self._first:
            level = self._first
            while level > 1:
                children = self._nodes[level : 2 * level]
                np.add(children[::2], children[1::2], out=self._nodes[level // 2 : level])
                level //= 2
            return
        while changed[0] > 1:
            changed = np.unique(changed >> 1)
            self._nodes[changed] = self._nodes[2 * changed] + self._nodes[2 * changed + 1]
