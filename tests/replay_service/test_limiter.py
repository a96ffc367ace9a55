from __future__ import annotations

import random
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replay_service import CreditLimiter, ReplayConfig, ReplayConfigError, plan_limits
from tests.replay_service.records import SCHEMA

USUAL: dict[str, Any] = {
    "train_ratio": 32,
    "batch_steps": 1024,
    "chunk_steps": 64,
    "min_size_steps": 1024,
    "capacity_steps": 100_000,
}


def test_default_tolerance_is_the_larger_of_four_batches_and_two_chunks() -> None:
    assert CreditLimiter(**USUAL).tol_i == 4096
    assert CreditLimiter(**{**USUAL, "train_ratio": 512}).tol_s == 65_536


def test_budget_and_drift_are_exact() -> None:
    limiter = CreditLimiter(**{**USUAL, "train_ratio": "0.3"})
    assert limiter.train_ratio == Fraction(3, 10)
    assert limiter.budget(0) == 1024 + 4096 * 10 // 3
    assert limiter.drift(1024 + 10, 1) == 3 - 1024


def test_a_float_ratio_means_its_decimal() -> None:
    assert CreditLimiter(**{**USUAL, "train_ratio": 0.1}).train_ratio == Fraction(1, 10)


def test_reason_says_what_is_waited_for() -> None:
    limiter = CreditLimiter(**USUAL)
    assert not limiter.may_start_update(1000, 1000, 0)
    assert limiter.reason == "updates wait for the first 1024 steps (1000 so far)"
    assert limiter.may_start_update(1024, 1024, 0) and limiter.reason == ""
    assert not limiter.may_start_update(1024, 1024, 4)
    assert "drift -4096 of [-4096, 4096] replayed steps at ratio 32" in limiter.reason


def test_both_sides_say_where_the_account_is_in_its_band() -> None:
    limiter = CreditLimiter(**USUAL)
    assert not limiter.may_start_update(5024, 5024, 129)
    want = "33.02 replayed steps per step, band 30.98–33.02"
    assert limiter.reason == f"updates wait for experience: {want}"
    assert limiter.why_inserts_wait(5024, 5024, 121) == (
        "inserts wait for training: 30.98 replayed steps per step, band 30.98–33.02"
    )
    assert limiter.why_inserts_wait(5024, 5024, 125) == ""
    assert limiter.why_inserts_wait(100, 100, 0) == ""


@pytest.mark.parametrize(
    ("change", "want"),
    [
        ({"train_ratio": 0}, "train_ratio is 0"),
        ({"train_ratio": -1}, "train_ratio is -1"),
        (
            {"train_ratio": 512, "insert_tolerance": 4096, "sample_tolerance": 4096},
            "64·512 \\+ 1024 = 33792",
        ),
        (
            {"insert_tolerance": 2000, "sample_tolerance": 9000},
            "chunk·ratio = 64·32 = 2048",
        ),
        (
            {"shards": 3, "insert_tolerance": 7000, "sample_tolerance": 0},
            "shards·\\(chunk \\+ 2\\)·ratio \\+ batch = 198·32 \\+ 1024 = 7360",
        ),
        ({"min_size_steps": 1023}, "below one batch, 1024"),
        ({"capacity_steps": 1080}, "1024 \\+ 64"),
    ],
)
def test_configuration_that_cannot_work_is_refused_with_the_arithmetic(
    change: dict[str, Any], want: str
) -> None:
    with pytest.raises(ReplayConfigError, match=want):
        CreditLimiter(**{**USUAL, **change})


@given(
    ratio=st.fractions(min_value=Fraction(1, 50), max_value=2000, max_denominator=50),
    chunk=st.integers(1, 256),
    batch=st.integers(1, 2048),
    tol_i=st.none() | st.integers(0, 2**20),
    tol_s=st.none() | st.integers(0, 2**20),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=200, deadline=None)
def test_accepted_configuration_never_deadlocks_nor_leaves_its_band(
    ratio: Fraction, chunk: int, batch: int, tol_i: int | None, tol_s: int | None, seed: int
) -> None:
    try:
        limiter = CreditLimiter(
            train_ratio=ratio,
            batch_steps=batch,
            chunk_steps=chunk,
            min_size_steps=batch,
            capacity_steps=10**9,
            insert_tolerance=tol_i,
            sample_tolerance=tol_s,
        )
    except ReplayConfigError:
        return
    draw = random.Random(seed)
    inserted = updates = 0
    for _ in range(300):
        steps = draw.randint(1, chunk)
        may_insert = inserted < batch or inserted + steps <= limiter.budget(updates)
        may_update = limiter.may_start_update(inserted, inserted, updates)
        whole = inserted < batch or inserted + chunk <= limiter.budget(updates)
        assert whole or may_update, "neither side may move"
        if may_insert and (not may_update or draw.random() < 0.5):
            inserted += steps
        elif may_update:
            updates += 1
        if inserted >= batch:
            assert -limiter.tol_s <= limiter.drift(inserted, updates) <= limiter.tol_i


def plan(config: ReplayConfig, **changes: Any) -> Any:
    usual = {"train_ratio": 32, "batch_size": 16, "batch_length": 64}
    return plan_limits(config, SCHEMA, **{**usual, "window_steps": 65, "streams": 4, **changes})


def test_plan_raises_the_minimum_until_some_stream_must_hold_a_window() -> None:
    limits, limiter = plan(ReplayConfig(), streams=40)
    assert limits.min_size_steps == limiter.min_size_steps == limiter.i0 == 40 * 65
    assert limits.budget_steps == limiter.budget(0) == 2600 + 4096 // 32


def test_plan_refuses_a_server_too_small_for_the_minimum() -> None:
    with pytest.raises(ReplayConfigError, match="set redis_memory_bytes to"):
        plan(ReplayConfig(redis_memory_bytes=2**20), streams=400)


def test_plan_refuses_a_capacity_below_the_minimum() -> None:
    with pytest.raises(ReplayConfigError, match="raise capacity_steps"):
        plan(ReplayConfig(capacity_steps=1100))


@pytest.mark.parametrize(
    ("change", "want"),
    [
        ({"capacity_steps": 0}, "capacity_steps is 0"),
        ({"chunk_steps": 2000}, "chunk_steps is 2000"),
        ({"flush_age_s": 0.0}, "flush_age_s is 0.0"),
        ({"tolerance_steps": 0}, "tolerance_steps is 0"),
        ({"min_size_steps": 2_000_000}, "min_size_steps is 2000000"),
    ],
)
def test_config_refuses(change: dict[str, Any], want: str) -> None:
    with pytest.raises(ReplayConfigError, match=want):
        ReplayConfig(**change)
