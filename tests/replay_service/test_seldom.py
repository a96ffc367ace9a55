from __future__ import annotations

import logging

import pytest

from replay_service.seldom import Seldom


def test_a_flood_is_told_once_and_then_every_ten_seconds(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    seldom = Seldom(logging.getLogger("flood"), logging.ERROR, lambda: now)
    for number in range(2500):
        now = number / 100
        seldom.say(f"odd entry {number}")
    assert caplog.messages == [
        "odd entry 0",
        "odd entry 999 (and 998 more since the last such line)",
        "odd entry 1999 (and 999 more since the last such line)",
    ]
    now = 29.0
    seldom.catch_up()
    assert len(caplog.messages) == 3
    now = 30.0
    seldom.catch_up()
    seldom.catch_up()
    assert caplog.messages[3:] == ["odd entry 2499 (and 499 more since the last such line)"]
    now = 45.0
    seldom.say("odd entry again")
    assert caplog.messages[4:] == ["odd entry again"]
