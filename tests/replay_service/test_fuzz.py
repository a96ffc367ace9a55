"""Whatever the bytes are, decoding them neither crashes nor hangs nor allocates without bound."""

from __future__ import annotations

import pytest

from tests.replay_service.fuzz import Attacker, fuzz


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


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_million_hostile_inputs_do_no_harm() -> None:
    outcome = fuzz(1_000_000, seed=2, measure_every=20)
    assert outcome.refused.total() + outcome.accepted.total() == 1_000_000
