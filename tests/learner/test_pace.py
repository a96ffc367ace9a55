from fractions import Fraction

from learner.pace import FreePace, LockstepPace
from replay_service import CreditLimiter


class Counts:
    """The numbers of a mirror, set by hand."""

    def __init__(self, inserted: int = 0) -> None:
        self.size_steps = self.inserted_steps = self.valid_starts = inserted
        self.waited = 0

    def wait(self, timeout_s: float) -> bool:
        self.waited += 1
        return True

    def receive(self, inserted: int) -> None:
        self.size_steps = self.inserted_steps = self.valid_starts = inserted


def limiter() -> CreditLimiter:
    return CreditLimiter(
        train_ratio=Fraction(2),
        batch_steps=16,
        chunk_steps=8,
        min_size_steps=32,
        capacity_steps=1000,
    )


def test_a_free_learner_may_run_ahead_by_the_tolerance_and_says_why_it_waits() -> None:
    mirror, credit = Counts(32), limiter()
    pace = FreePace(mirror, credit)
    ahead = 0
    while pace.may_update(ahead):
        ahead += 1
    assert ahead == credit.tol_s // credit.batch_steps
    assert "drift" in pace.reason
    mirror.valid_starts = 0
    assert not pace.may_update(0)
    assert "whole window" in pace.reason


def test_a_learner_in_lockstep_does_what_is_owed_and_no_more() -> None:
    mirror = Counts()
    rounds = iter([32, 48, 64])
    pace = LockstepPace(mirror, limiter(), collect=lambda updates: next(rounds), cut=lambda: None)
    assert not pace.may_update(0)
    pace.more(0, 0.1)
    mirror.receive(24)
    pace.more(0, 0.1)
    assert mirror.waited == 1, "the rest of a round is waited for, not collected again"
    mirror.receive(32)
    assert not pace.may_update(0), "the account begins at the minimum size"
    pace.more(0, 0.1)
    mirror.receive(48)
    done = 0
    while pace.may_update(done):
        done += 1
    assert done == (48 - 32) * 2 // 16
    assert pace.at_rest(done)


def test_lockstep_is_not_at_rest_while_a_round_is_on_its_way_or_updates_are_owed() -> None:
    mirror = Counts(32)
    pace = LockstepPace(mirror, limiter(), collect=lambda updates: 48, cut=lambda: None)
    pace.more(0, 0.1)
    assert not pace.at_rest(0)
    mirror.receive(48)
    assert not pace.at_rest(0)
    assert pace.at_rest(2)


def test_streams_are_cut_after_a_checkpoint_and_only_if_the_run_goes_on() -> None:
    cuts: list[int] = []
    pace = LockstepPace(
        Counts(32), limiter(), collect=lambda updates: 32, cut=lambda: cuts.append(1)
    )
    pace.saved()
    assert cuts == []
    pace.more(0, 0.1)
    pace.more(0, 0.1)
    assert cuts == [1]
