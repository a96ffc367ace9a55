"""Whatever the bytes are, decoding them neither crashes nor hangs nor allocates without bound."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.replay_service.fuzz import Attacker, fuzz

ROOT = Path(__file__).parents[2]
HEADROOM = 4 * 2**20
"""Bytes that decoding may take in all, beside what was freed before: much less than a bomb."""
LIMITED = """
import sys, types
# A package of that name that somebody has installed would come first.
sys.modules["tests"] = types.ModuleType("tests")
sys.modules["tests"].__path__ = ["tests"]
from tests.replay_service.fuzz import fuzz_within
fuzz_within(int(sys.argv[1]), int(sys.argv[2]), seed=7)
"""


def test_twenty_thousand_hostile_inputs_do_no_harm() -> None:
    outcome = fuzz(20_000, seed=1, measure_every=4)
    kinds = set(Attacker(0).kinds)
    assert outcome.refused.keys() == kinds
    # An attacker who mends the checksum also gets through with values that are allowed.
    assert {"field", "column"} <= outcome.accepted.keys()
    assert outcome.accepted["noise"] == 0
    assert outcome.refused.total() + outcome.accepted.total() == 20_000
    assert outcome.peak_bytes > 0


def test_equal_seeds_attack_alike() -> None:
    first, again, other = Attacker(5), Attacker(5), Attacker(6)
    made = [first.next() for _ in range(50)]
    assert made == [again.next() for _ in range(50)]
    assert made != [other.next() for _ in range(50)]


def fuzz_in_a_limited_process(inputs: int, timeout_s: float) -> None:
    """Let a process with little memory decode hostile inputs; fails with what it says."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(HEADROOM), str(inputs)],
        cwd=ROOT,
        # Else the heap keeps room for a bomb, from where the bombs were made.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"},
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_no_library_allocates_beyond_a_hard_limit() -> None:
    fuzz_in_a_limited_process(10_000, timeout_s=300.0)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_library_allocates_beyond_a_hard_limit_for_long() -> None:
    fuzz_in_a_limited_process(200_000, timeout_s=1700.0)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_million_hostile_inputs_do_no_harm() -> None:
    outcome = fuzz(1_000_000, seed=2, measure_every=20)
    assert outcome.refused.total() + outcome.accepted.total() == 1_000_000
