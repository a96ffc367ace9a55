"""Which shard a stream belongs to, and a budget that is shared out without ever being exceeded."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replay_service import (
    BudgetSplit,
    CreditLimiter,
    ReplayConfigError,
    shard_of,
    split_addresses,
)

ADDRESSES = [f"redis://shard-{number}:6379" for number in range(5)]
STREAMS = [f"run-a{slot}" for slot in range(2000)]


def test_addresses_are_split_where_the_next_one_begins() -> None:
    assert split_addresses("redis://a:1") == ("redis://a:1",)
    many = "redis://a:1,unix:///tmp/x,y;rediss://b:2"
    assert split_addresses(many) == ("redis://a:1", "unix:///tmp/x,y", "rediss://b:2")
    with pytest.raises(ReplayConfigError, match="redis://a:1 is named more than once"):
        split_addresses("redis://a:1,redis://b:1,redis://a:1")


def test_streams_are_spread_evenly() -> None:
    homes = [shard_of(stream, ADDRESSES) for stream in STREAMS]
    counts = [homes.count(address) for address in ADDRESSES]
    # 400 each, with a standard deviation of 18; which streams these are never changes.
    assert all(330 < count < 470 for count in counts), counts


def test_the_home_of_a_stream_is_the_same_in_every_process_and_version() -> None:
    homes = [ADDRESSES.index(shard_of(f"run-a{slot}", ADDRESSES)) for slot in range(8)]
    assert homes == [2, 0, 4, 1, 2, 0, 4, 1]


def test_order_does_not_matter_and_an_added_shard_takes_its_share_alone() -> None:
    before = {stream: shard_of(stream, ADDRESSES[:4]) for stream in STREAMS}
    after = {stream: shard_of(stream, ADDRESSES[::-1]) for stream in STREAMS}
    moved = [stream for stream in STREAMS if before[stream] != after[stream]]
    assert 330 < len(moved) < 470
    assert {after[stream] for stream in moved} == {ADDRESSES[4]}


@dataclass
class Shard:
    """A server: the budget in force, what it holds, and calls that it has not read yet."""

    budget: int = 0
    inserted: int = 0
    turn: int = 0
    late: list[tuple[int, int]] = field(default_factory=list)

    def take(self, turn: int, budget: int) -> None:
        # Calls without a number are those of a learner that has one server.
        if turn > self.turn or self.turn == 0:
            self.turn, self.budget = turn, budget

    def insert(self, steps: int) -> None:
        self.inserted = max(self.inserted, min(self.inserted + steps, self.budget))


@settings(max_examples=80, deadline=None)
@given(data=st.data(), count=st.integers(1, 4))
def test_budgets_never_exceed_the_total_whatever_is_lost_or_late(
    data: st.DataObject, count: int
) -> None:
    shards = [Shard() for _ in range(count)]
    share_out(data, shards, BudgetSplit([0] * count, [0] * count, chunk_steps=8), 0)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_a_server_that_was_alone_is_held_to_its_share_whatever_of_before_comes_late(
    data: st.DataObject,
) -> None:
    alone, total = Shard(), 0
    for _ in range(data.draw(st.integers(0, 8))):
        total += data.draw(st.integers(0, 100))
        fate = data.draw(st.sampled_from(["heard", "call lost", "call late"]))
        if fate == "call late":
            alone.late.append((0, total))
        elif fate == "heard":
            alone.take(0, total)
        alone.insert(data.draw(st.integers(0, 60)))
    # As `ShardedClient.of_one` does it: all that was ever sent may still come.
    split = BudgetSplit([alone.budget], [alone.inserted], chunk_steps=8)
    split.sent(0, total)
    split.join(0, 0)
    share_out(data, [alone, Shard()], split, total)


def share_out(data: st.DataObject, shards: list[Shard], split: BudgetSplit, total: int) -> None:
    """Settle for a while, with messages lost and late and shards that join."""
    fates = st.sampled_from(["heard", "heard", "heard", "answer lost", "call lost", "call late"])
    turn = 0

    def send(budgets: dict[int, int]) -> None:
        for at, budget in budgets.items():
            shard, fate = shards[at], data.draw(fates)
            split.sent(at, budget)
            if fate == "call late":
                shard.late.append((turn, budget))
            elif fate != "call lost":
                shard.take(turn, budget)
            if fate == "heard":
                split.heard(at, budget, shard.inserted)
            assert sum(max(one.budget, one.inserted) for one in shards) <= total

    for _ in range(data.draw(st.integers(1, 25))):
        total += data.draw(st.integers(0, 100))
        turn += 1
        if len(shards) < 6 and data.draw(st.integers(0, 9)) == 0:
            shards.append(Shard())
            split.join(0, 0)
        asked = data.draw(st.sets(st.sampled_from(range(len(shards)))))
        goals = split.goals(total, asked)
        lowered = split.lowered(goals)
        send(lowered)
        send(split.raised({at: goals[at] for at in goals.keys() - lowered.keys()}, total))
        for shard in shards:
            shard.insert(data.draw(st.integers(0, 60)))
            for call in shard.late:
                if data.draw(st.booleans()):
                    shard.take(*call)
        assert sum(max(one.budget, one.inserted) for one in shards) <= total


def settle(split: BudgetSplit, total: int, inserted: list[int]) -> dict[int, int]:
    """Share out, with every message answered."""
    goals = split.goals(total, range(len(inserted)))
    found = split.lowered(goals)
    for at, budget in found.items():
        split.sent(at, budget)
        split.heard(at, budget, inserted[at])
    rest = split.raised({at: goal for at, goal in goals.items() if at not in found}, total)
    for at, budget in rest.items():
        split.sent(at, budget)
        split.heard(at, budget, inserted[at])
    return found | rest


def test_what_is_not_used_is_kept_and_the_rest_goes_where_inserts_were() -> None:
    split = BudgetSplit([0, 0], [0, 0], chunk_steps=64)
    assert settle(split, 1000, [0, 0]) == {0: 500, 1: 500}
    settle(split, 1000, [400, 0])
    busy = settle(split, 2000, [400, 0])
    # Of 1600 that are free the idle one keeps its 500, and most of the rest goes to the other.
    assert busy[0] - 400 > 900 and 500 <= busy[1] < 700 and sum(busy.values()) == 2000
    for _ in range(100):
        idle = settle(split, 2000, [400, 0])
    assert abs(idle[1] - 800) < 64


@settings(max_examples=15, deadline=None)
@given(
    count=st.integers(2, 4),
    ratio=st.fractions(min_value=Fraction(1, 20), max_value=600, max_denominator=20),
    chunk=st.integers(1, 128),
    batch=st.integers(1, 1024),
    tolerance=st.none() | st.integers(0, 2**18),
    data=st.data(),
)
def test_an_accepted_account_never_stands_still_whichever_shards_are_written_to(
    count: int,
    ratio: Fraction,
    chunk: int,
    batch: int,
    tolerance: int | None,
    data: st.DataObject,
) -> None:
    try:
        limiter = CreditLimiter(
            train_ratio=ratio,
            batch_steps=batch,
            chunk_steps=chunk,
            min_size_steps=batch,
            capacity_steps=10**9,
            insert_tolerance=tolerance,
            sample_tolerance=tolerance,
            shards=count,
        )
    except ReplayConfigError:
        return
    split = BudgetSplit([0] * count, [0] * count, chunk_steps=chunk)
    inserted, updates, still = [0] * count, 0, 0
    for _ in range(4):
        written = data.draw(st.sets(st.sampled_from(range(count)), min_size=1))
        for _ in range(100):
            before = sum(inserted), updates
            given_ = settle(split, limiter.budget(updates), inserted)
            for at in written:
                if inserted[at] + chunk <= given_[at]:
                    inserted[at] += chunk
            while limiter.may_start_update(sum(inserted), sum(inserted), updates):
                updates += 1
            assert sum(inserted) <= limiter.budget(updates)
            still = still + 1 if (sum(inserted), updates) == before else 0
            # What is kept for the shards that were written to before fades within these rounds.
            assert still < 99, (inserted, given_, limiter.budget(updates), limiter.reason)


@pytest.mark.parametrize("count", [2, 3, 8])
def test_the_room_that_the_limiter_asks_for_gives_each_shard_a_chunk(count: int) -> None:
    chunk = 64
    split = BudgetSplit([0] * count, [0] * count, chunk_steps=chunk)
    inserted = [0] * count
    for _ in range(200):
        total = sum(inserted) + count * (chunk + 2)
        given = settle(split, total, inserted)
        inserted[0] += chunk if given[0] >= inserted[0] + chunk else 0
    # Only the first writes, and then the last one begins.
    for _ in range(200):
        given = settle(split, sum(inserted) + count * (chunk + 2), inserted)
    assert given[count - 1] >= chunk and given[0] >= inserted[0] + chunk


def test_a_shard_that_joins_gets_what_others_have_acknowledged_to_have_lost() -> None:
    split = BudgetSplit([500, 500], [100, 100], chunk_steps=64)
    split.join(0, 0)
    goals = split.goals(1000, range(3))
    assert set(split.lowered(goals)) == {0, 1} and goals[2] > 64
    # Nobody has acknowledged anything: all of the total may be in force.
    assert split.raised({2: goals[2]}, 1000) == {2: 0}
    split.sent(0, goals[0])
    assert split.raised({2: goals[2]}, 1000) == {2: 0}
    split.heard(0, goals[0], 100)
    assert split.raised({2: goals[2]}, 1000) == {2: 500 - goals[0]}
    split.sent(1, goals[1])
    split.heard(1, goals[1], 100)
    assert split.raised({2: goals[2]}, 1000) == {2: goals[2]}
    # A budget that it brings counts from the beginning.
    split.join(300, 0)
    assert split.reserved(3) == 300


@pytest.mark.parametrize("ratio", ["0.5", "4", "512"])
def test_an_account_over_more_servers_admits_all_that_it_did(ratio: str) -> None:
    one = CreditLimiter(
        train_ratio=ratio, batch_steps=256, chunk_steps=16, min_size_steps=512, capacity_steps=10**5
    )
    for count in (2, 3, 8):
        more = one.over(count)
        assert (more.shards, more.i0, more.train_ratio) == (count, one.i0, one.train_ratio)
        assert all(more.budget(updates) >= one.budget(updates) for updates in range(0, 5000, 7))
        assert more.tol_i >= one.tol_i and more.tol_s >= one.tol_s
        one = more


def test_tolerances_that_were_given_may_leave_no_room_for_more_servers() -> None:
    account = CreditLimiter(
        train_ratio=4,
        batch_steps=32,
        chunk_steps=8,
        min_size_steps=64,
        capacity_steps=10**5,
        insert_tolerance=100,
        sample_tolerance=100,
        shards=2,
    )
    with pytest.raises(ReplayConfigError, match="raise tolerance_steps or lower chunk_steps"):
        account.over(3)
    assert account.over(2).tol_i == 100


def test_a_total_that_falls_below_what_is_inserted_raises_nothing() -> None:
    split = BudgetSplit([900, 300], [800, 100], chunk_steps=8)
    assert settle(split, 500, [800, 100]) == {0: 800, 1: 100}
    assert settle(split, 1000, [800, 100]) == {0: 850, 1: 150}


def test_a_shard_that_is_away_keeps_what_it_may_have() -> None:
    split = BudgetSplit([500, 500], [400, 100], chunk_steps=64)
    goals = split.goals(1200, [1])
    given = split.raised(goals, 1200)
    assert split.reserved(0) == 500 and 500 < given[1] <= 700


@pytest.mark.parametrize("count", [2, 3, 6])
def test_a_shard_whose_writers_come_last_is_not_starved_where_training_is_the_limit(
    count: int,
) -> None:
    chunk, credit = 16, 16
    split = BudgetSplit([0] * count, [0] * count, chunk_steps=chunk)
    inserted, total = [0] * count, count * (chunk + 2)
    before = list(inserted)
    for round_ in range(3000):
        # The first shards write all the time, the last one from here on.
        late = round_ >= 1000
        if round_ == 2000:
            before = list(inserted)
        given_ = settle(split, total, inserted)
        for at in range(count if late else count - 1):
            while inserted[at] + chunk <= given_[at]:
                inserted[at] += chunk
        total += credit
    each = [now - then for now, then in zip(inserted, before, strict=True)]
    assert each[-1] > 0.8 * sum(each) / count, each
    assert sum(each) > 0.95 * 1000 * credit
