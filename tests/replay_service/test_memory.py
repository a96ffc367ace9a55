from __future__ import annotations

from dataclasses import replace

import pytest

from replay_service import (
    ReplayConfig,
    ReplayConfigError,
    SamplingConfig,
    Schema,
    estimate_memory,
)
from replay_service.memory import available_ram_bytes
from replay_service.schema import REQUIRED, Column
from replay_service.sumtree import SumTree, tree_bytes

ATARI = Schema((Column("image", "uint8", (64, 64, 3)), *(Column(*row) for row in REQUIRED)))
MIB = 2**20


def test_estimate_adds_up() -> None:
    config = ReplayConfig(capacity_steps=100_000, redis_memory_bytes=2**30)
    plan = estimate_memory(ATARI, config, streams=4)
    assert plan.step_bytes == 12_295
    assert plan.mirror_bytes == (1563 + 48) * 64 * 12_295
    assert plan.redis_bytes == 2**30
    assert 60_000 < plan.retained_steps < 66_000
    assert "retains" in plan.notes[0] and "12295 bytes a step" in plan.describe()


def test_small_replay_needs_less_than_the_servers_limit() -> None:
    plan = estimate_memory(ATARI, ReplayConfig(capacity_steps=2048), streams=1)
    assert plan.redis_bytes < 50 * MIB and plan.notes == ()


def test_plan_that_does_not_fit_is_refused_with_the_arithmetic() -> None:
    plan = estimate_memory(ATARI, ReplayConfig(capacity_steps=100_000), streams=4)
    with pytest.raises(ReplayConfigError, match=r"server .* \+ queue .* \+ mirror .* MiB of RAM"):
        plan.check({"ram": 2**30})
    with pytest.raises(ReplayConfigError, match="in cuda, which has 10 MiB free"):
        plan.check({"ram": 2**40, "cuda": 10 * MIB}, "cuda")
    plan.check({"ram": 2**40})
    plan.check(
        {
            "ram": plan.redis_bytes + plan.queue_bytes + plan.resend_bytes + plan.sampling_bytes,
            "disk": 2**40,
        },
        "disk",
    )


def test_sampling_and_resend_rings_are_in_the_plan() -> None:
    config = ReplayConfig(capacity_steps=100_000)
    plain = estimate_memory(ATARI, config, streams=4)
    rows = (1563 + 48) * 64
    for sampling, trees in (
        (SamplingConfig(recency=0.5), 0),
        (SamplingConfig(prioritised=0.5), 1),
        (SamplingConfig(prioritised=0.5, windows="episodes"), 2),
    ):
        plan = estimate_memory(ATARI, replace(config, sampling=sampling, online=False), streams=4)
        assert plan.sampling_bytes - plain.sampling_bytes == trees * tree_bytes(rows)
    assert tree_bytes(rows) == SumTree(rows).weights.base.nbytes == 2 * 2**17 * 8
    # Rings are bounded in chunks and in bytes, whichever is less.
    few = estimate_memory(ATARI, replace(config, resend_bytes=10 * MIB), streams=4, writers=2)
    assert plain.resend_bytes - few.resend_bytes == pytest.approx(
        4 * 32 * 788e3 - 20 * MIB, rel=0.1
    )
    with pytest.raises(ReplayConfigError, match=r"\+ sampling \d+ MiB"):
        plain.check({"ram": 2**20}, "ram")


def test_available_ram_is_what_the_system_reports() -> None:
    assert 2**20 < available_ram_bytes() < 2**50
