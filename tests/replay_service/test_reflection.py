"""A mirror that shows its log passes; one that was changed is told where it differs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from replay_service import Limits, Mirror, ReplayClient, ReplayTimeout, check_mirror
from tests.replay_service.records import SCHEMA, absorb_until, insert_many


@pytest.fixture
def mirror(client: ReplayClient) -> Iterator[Mirror]:
    """A mirror of two streams of 48 records, written in turns."""
    client.create(SCHEMA, Limits(capacity_steps=96, capacity_bytes=2**27))
    for seq in range(1, 7):
        insert_many(client, 0, 1, start=seq)
        insert_many(client, 1, 1, start=seq)
    made = Mirror(
        client, SCHEMA, capacity_steps=1000, window_steps=8, page_steps=10, placement="ram"
    )
    made.start()
    absorb_until(made, lambda: made.inserted_steps == 96)
    yield made
    made.stop()


def told(mirror: Mirror, client: ReplayClient) -> list[tuple[str, str, int | None]]:
    report = check_mirror(mirror, client, complete=True, timeout_s=30)
    return [(v.invariant, v.sid, v.step) for v in report.violations]


def test_mirror_shows_its_log_also_when_the_log_has_moved_on(
    mirror: Mirror, client: ReplayClient
) -> None:
    report = check_mirror(mirror, client, complete=True)
    assert report.ok and (report.chunks, report.steps, report.notes) == (12, 96, [])
    insert_many(client, 0, 3, start=7)
    report = check_mirror(mirror, client, complete=True)
    assert report.ok and (report.chunks, report.steps) == (9, 96)
    absorb_until(mirror, lambda: mirror.inserted_steps == 120)
    assert told(mirror, client) == []


def test_what_a_small_mirror_has_given_up_is_noted(mirror: Mirror, client: ReplayClient) -> None:
    small = Mirror(
        client, SCHEMA, capacity_steps=40, window_steps=8, page_steps=10, placement="ram"
    )
    small.start()
    absorb_until(small, lambda: small.inserted_steps == 96)
    report = check_mirror(small, client)
    absent = 96 - small.size_steps
    assert report.ok and f"{absent} retained steps are not in the mirror" in report.notes[0]
    assert told(small, client) == [("C", "", None)]
    small.stop()


def test_changed_record_is_told_with_its_step(mirror: Mirror, client: ReplayClient) -> None:
    rows = {sid: rows for sid, _, rows in mirror.held()}
    mirror.columns["reward"][int(rows["s1@1"][21])] += 1
    mirror.columns["is_first"][int(rows["s0@1"][30])] = False
    assert told(mirror, client) == [("A", "s0@1", 30), ("C", "s1@1", 21), ("C", "s0@1", 30)]


def test_records_held_twice_and_rows_with_two_owners_are_told(
    mirror: Mirror, client: ReplayClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    stretches = list(mirror.held())
    (sid, _, rows), (other, _, _) = stretches
    monkeypatch.setattr(mirror, "held", lambda: iter([*stretches, (sid, 40, rows[40:])]))
    found = told(mirror, client)
    assert found[:2] == [("B", sid, None), ("B", sid, 40)]
    assert ("C", "", None) in found and other not in {place for _, place, _ in found}


def test_check_without_time_says_so(mirror: Mirror, client: ReplayClient) -> None:
    with pytest.raises(ReplayTimeout, match="check of the mirror was not done within 0 s"):
        check_mirror(mirror, client, timeout_s=0)
