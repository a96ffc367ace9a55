from __future__ import annotations

import pytest

from replay_service import ReplayConfig, ReplayConfigError, Schema, estimate_memory
from replay_service.memory import available_ram_bytes
from replay_service.schema import REQUIRED, Column

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
        {"ram": plan.redis_bytes + plan.queue_bytes + plan.resend_bytes, "disk": 2**40}, "disk"
    )


def test_available_ram_is_what_the_system_reports() -> None:
    assert 2**20 < available_ram_bytes() < 2**50
