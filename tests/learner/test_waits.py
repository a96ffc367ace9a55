import time

from learner.waits import Standstill, lasting


def test_a_standstill_lasts_until_the_counter_moves_or_the_reason_is_gone() -> None:
    still = Standstill()
    assert still.seconds("because", 5) == 0.0
    time.sleep(0.02)
    assert still.seconds("because", 5) >= 0.02
    assert still.seconds("because", 6) == 0.0
    time.sleep(0.02)
    assert still.seconds("", 6) == 0.0 and still.seconds("because", 6) == 0.0


def test_a_reason_is_said_with_its_duration() -> None:
    assert lasting("inserts wait", 13.7) == "inserts wait for 14 s"
    assert lasting("", 3.0) == ""
