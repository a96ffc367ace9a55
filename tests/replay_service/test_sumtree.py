from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from replay_service.sumtree import SumTree


@given(
    rows=st.integers(1, 70),
    changes=st.lists(
        st.lists(
            st.tuples(st.integers(0, 69), st.floats(0, 1e6, allow_subnormal=False)),
            min_size=1,
            max_size=9,
        ),
        max_size=12,
    ),
    uniform=st.floats(0, 1, exclude_max=True, allow_subnormal=False),
)
@settings(max_examples=200, deadline=None)
def test_finds_the_row_at_which_the_cumulative_weight_passes(
    rows: int, changes: list[list[tuple[int, float]]], uniform: float
) -> None:
    tree, plain = SumTree(rows), np.zeros(rows)
    for batch in changes:
        at = np.array([row % rows for row, _ in batch])
        weights = np.array([weight for _, weight in batch])
        tree.set(at, weights)
        plain[at] = weights
        np.testing.assert_allclose(tree.total, plain.sum(), rtol=1e-12)
    np.testing.assert_array_equal(tree.weights, plain)
    if not plain.sum() > 0:
        return
    [found] = tree.find(np.array([uniform]))
    assert plain[found] > 0
    cumulative, want = plain.cumsum(), uniform * plain.sum()
    slack = 1e-9 * plain.sum()
    assert cumulative[found] - plain[found] <= want + slack
    assert want <= cumulative[found] + slack


def test_the_order_of_changes_does_not_matter() -> None:
    rng = np.random.default_rng(0)
    weights, few, many = rng.random(1000), SumTree(1000), SumTree(1000)
    few.set(np.arange(1000), weights)
    for row in rng.permutation(1000):
        many.set(np.array([row]), weights[[row]])
        assert many.total > 0
    uniforms = rng.random(5000)
    assert few.total == many.total
    np.testing.assert_array_equal(few.find(uniforms), many.find(uniforms))


def test_rows_are_found_in_proportion_to_their_weights() -> None:
    tree = SumTree(6)
    tree.set(np.arange(6), np.array([0.0, 1.0, 2.0, 0.0, 3.0, 4.0]))
    draws = 100_000
    counts = np.bincount(tree.find(np.random.default_rng(1).random(draws)), minlength=6)
    # Five standard deviations of a binomial are at most 0.8 % of the draws.
    assert (np.abs(counts / draws - np.array([0, 0.1, 0.2, 0, 0.3, 0.4])) < 0.008).all()
    assert counts[0] == counts[3] == 0
