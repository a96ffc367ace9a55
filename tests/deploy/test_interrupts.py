import importlib
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from deploy.interrupts import Interrupted, Interrupts


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_before_training_ends_the_run_at_once(number: signal.Signals) -> None:
    reached = False
    with Interrupts() as interrupts:
        with pytest.raises(Interrupted, match=number.name):
            send(number)
        reached = True
    assert reached
    assert interrupts.exit_code == 128 + number


def test_leaving_ends_an_interruption_but_no_other_error() -> None:
    with Interrupts() as interrupts:
        send(signal.SIGTERM)
    assert interrupts.exit_code == 143
    with pytest.raises(KeyError), Interrupts():
        raise KeyError


def test_the_first_signal_in_training_asks_and_the_second_ends() -> None:
    asked = []
    with Interrupts() as interrupts:
        with pytest.raises(Interrupted), interrupts.graceful(lambda: asked.append(1)):
            send(signal.SIGINT)
            assert asked == [1]
            send(signal.SIGINT)
        assert asked == [1]
        assert interrupts.exit_code == 130


def test_signals_while_closing_change_nothing() -> None:
    with Interrupts() as interrupts:
        with interrupts.graceful(lambda: None):
            send(signal.SIGTERM)
        send(signal.SIGTERM)
        send(signal.SIGINT)
        assert interrupts.exit_code == 128 + signal.SIGTERM


def test_handlers_are_given_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Interrupts():
        assert signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) == before


def test_a_signal_in_the_middle_of_an_import_waits_for_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sends = "import os, signal, time; os.kill(os.getpid(), signal.SIGTERM)"
    (tmp_path / "imported_slowly.py").write_text(f"{sends}\ntime.sleep(0.3)\nwhole = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    with Interrupts() as interrupts:
        with pytest.raises(Interrupted, match="SIGTERM"):
            importlib.import_module("imported_slowly")
            time.sleep(5.0)
    assert sys.modules.pop("imported_slowly").whole == 1
    assert interrupts.exit_code == 143


def test_a_signal_that_a_library_swallowed_ends_the_run_before_training() -> None:
    trained = False
    with Interrupts() as interrupts:
        with pytest.raises(Interrupted):
            send(signal.SIGTERM)
        with interrupts.graceful(lambda: None):
            trained = True
    assert not trained and interrupts.exit_code == 143
