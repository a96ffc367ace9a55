import pytest

from learner.bound import PHASES, PhaseClock, shares


class HandClock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_an_inner_phase_pauses_the_outer_one() -> None:
    hand = HandClock()
    clock = PhaseClock(hand)
    with clock.during("update"):
        hand.now = 3.0
        with clock.during("publish"):
            hand.now = 4.0
        hand.now = 6.0
    hand.now = 7.0
    totals = clock.totals()
    assert totals["update"] == pytest.approx(5.0)
    assert totals["publish"] == pytest.approx(1.0)
    assert totals["other"] == pytest.approx(1.0)


def test_a_phase_ends_with_its_block_even_if_that_raises() -> None:
    clock = PhaseClock()
    with pytest.raises(KeyError), clock.during("update"):
        raise KeyError
    assert clock.phase == "other"


def test_totals_include_the_current_phase() -> None:
    hand = HandClock()
    clock = PhaseClock(hand)
    with clock.during("environments"):
        hand.now = 2.0
        assert clock.totals()["environments"] == pytest.approx(2.0)


def test_shares_are_of_the_time_between_two_totals() -> None:
    before = dict.fromkeys(PHASES, 1.0)
    now = before | {"update": 4.0, "environments": 2.0}
    part = shares(now, before)
    assert part["update"] == pytest.approx(0.75)
    assert part["environments"] == pytest.approx(0.25)
    assert sum(part.values()) == pytest.approx(1.0)
