from __future__ import annotations

import threading
from concurrent.futures import CancelledError

import pytest

from learner.errands import Errands


def test_errands_run_in_order_in_the_thread_that_runs_them_and_bring_back_what_they_say() -> None:
    errands, ran = Errands(), list[int]()
    asked = threading.Thread(
        target=lambda: answers.extend(errands.ask(lambda at=at: note(at)) for at in range(3))
    )
    answers = []

    def note(at: int) -> int:
        ran.append(threading.get_ident())
        if at == 1:
            raise ValueError("this one cannot be done")
        return at

    asked.start()
    asked.join()
    assert answers[2].cancel() and not ran
    errands.run()
    errands.run()
    assert ran == [threading.get_ident()] * 2
    assert answers[0].result(0) == 0
    with pytest.raises(ValueError, match="cannot be done"):
        answers[1].result(0)


def test_nobody_waits_for_a_thread_that_has_ended() -> None:
    errands = Errands()
    before = errands.ask(lambda: 1)
    errands.close()
    after = errands.ask(lambda: 2)
    for answer in (before, after):
        with pytest.raises(CancelledError):
            answer.result(0)
    errands.run()
