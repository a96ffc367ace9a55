"""Environments that crash, hang or lie, in their processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from actors.config import ActorConfig
from actors.envs import EnvConfig, EnvError
from actors.worker import EnvFailure, EnvSlot, Observation, ProcessWorker
from dreamer.spaces import DiscreteAction, VectorSpec

ACTION = {"action": np.array(1, np.int32)}


def slot(name: str, **choices: Any) -> EnvSlot:
    """Return a slot for one of the zoo, with short timeouts unless told otherwise."""
    timeouts = {"hang_timeout_s": 20.0, "start_timeout_s": 30.0}
    return EnvSlot(f"zoo:{name}", EnvConfig(), ActorConfig(**(timeouts | choices)), 3)


def advance(place: EnvSlot, steps: int) -> list[Observation]:
    """Take steps and return the answers."""
    answers = []
    for _ in range(steps):
        place.send(ACTION)
        answers.append(place.receive())
    return answers


def begin(place: EnvSlot) -> Observation:
    place.send(None)
    return place.receive()


def process_id(place: EnvSlot) -> int:
    worker = place._worker
    assert isinstance(worker, ProcessWorker) and worker.process_id is not None
    return worker.process_id


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


@pytest.mark.integration
@pytest.mark.parametrize("isolation", ["process", "inline"])
def test_slot_steps_and_resets_a_good_environment(isolation: str) -> None:
    with slot("Counting", isolation=isolation) as place:
        place.open()
        assert place.obs_space == {"vector": VectorSpec(shape=(2,))}
        assert place.action_space == {"action": DiscreteAction(classes=2)}
        assert place.action_repeat == 1
        first = begin(place)
        assert (first.obs["vector"][0], first.reward) == (0.0, 0.0)
        answers = advance(place, 10)
        assert [answer.obs["vector"][0] for answer in answers] == list(range(1, 11))
        assert [answer.terminated for answer in answers] == [False] * 9 + [True]
        assert begin(place).obs["vector"][0] == 0.0


@pytest.mark.integration
@pytest.mark.parametrize(
    ("name", "label", "words"),
    [
        ("Raises", "crash", "the simulator lost its mind"),
        ("Exits", "exit", "exited with 3 during step"),
        ("Segfaults", "exit", "killed by SIGSEGV during step"),
    ],
)
def test_crash_is_reported_and_the_next_reset_goes_to_a_new_environment(
    name: str, label: str, words: str
) -> None:
    with slot(name) as place:
        place.open()
        old = process_id(place)
        begin(place)
        advance(place, 2)
        with pytest.raises(EnvFailure, match=words) as caught:
            advance(place, 1)
        assert (caught.value.reason, caught.value.label) == ("crash", label)
        assert begin(place).obs["vector"][0] == 0.0
        assert gone(old) and process_id(place) != old
        assert [answer.obs["vector"][0] for answer in advance(place, 2)] == [1.0, 2.0]


def test_exception_inline_is_reported_and_the_environment_made_again() -> None:
    with slot("Raises", isolation="inline") as place:
        place.open()
        begin(place)
        advance(place, 2)
        with pytest.raises(EnvFailure, match="lost its mind"):
            advance(place, 1)
        assert begin(place).obs["vector"][0] == 0.0


@pytest.mark.integration
def test_hanging_environment_is_killed_with_all_its_processes() -> None:
    with slot("HangsWithChild", hang_timeout_s=0.6) as place:
        place.open()
        child = int(begin(place).obs["vector"][0])
        worker = process_id(place)
        advance(place, 1)
        started = time.monotonic()
        with pytest.raises(EnvFailure, match=r"no answer to step within 0.6 s") as caught:
            advance(place, 1)
        assert caught.value.reason == "hang"
        assert 0.5 < time.monotonic() - started < 5.0
        until(lambda: gone(child) and gone(worker))
        assert begin(place).obs["vector"][0] != child


@pytest.mark.integration
def test_process_left_behind_by_an_environment_that_exits_is_killed() -> None:
    with slot("ExitsWithChild") as place:
        place.open()
        child = int(begin(place).obs["vector"][0])
        advance(place, 1)
        with pytest.raises(EnvFailure, match="exited with 0 during step"):
            advance(place, 1)
        until(lambda: gone(child))


@pytest.mark.integration
def test_stopped_process_counts_as_hanging() -> None:
    with slot("Counting", hang_timeout_s=0.5) as place:
        place.open()
        begin(place)
        os.kill(process_id(place), signal.SIGSTOP)
        with pytest.raises(EnvFailure) as caught:
            advance(place, 1)
        assert caught.value.reason == "hang"
        assert begin(place).obs["vector"][0] == 0.0


@pytest.mark.integration
def test_killed_process_is_replaced_even_between_two_steps() -> None:
    with slot("Counting") as place:
        place.open()
        begin(place)
        victim = process_id(place)
        os.kill(victim, signal.SIGKILL)
        until(lambda: gone(victim))
        with pytest.raises(EnvFailure, match="killed by SIGKILL"):
            advance(place, 1)
        assert begin(place).obs["vector"][0] == 0.0


REJECTED = {
    "NanObservation": "not_finite",
    "HugeObservation": "not_finite",
    "OutOfBounds": "bounds",
    "WrongShape": "shape",
    "Ragged": "shape",
    "NoneObservation": "dtype",
    "FloatImage": "dtype",
    "UnknownKey": "keys",
    "OutsideDiscrete": "bounds",
    "InfiniteReward": "reward",
    "TextReward": "reward",
    "VectorReward": "reward",
    "OldStep": "api",
    "FlagIsText": "api",
}


@pytest.mark.parametrize(("name", "label"), REJECTED.items())
def test_invalid_answer_never_comes_through_and_the_environment_is_kept(
    name: str, label: str
) -> None:
    with slot(name, isolation="inline") as place:
        place.open()
        begin(place)
        advance(place, 2)
        with pytest.raises(EnvFailure) as caught:
            advance(place, 1)
        assert (caught.value.reason, caught.value.label) == ("rejected", label)
        kept = place._worker._env  # type: ignore[attr-defined]
        begin(place)
        assert place._worker._env is kept  # type: ignore[attr-defined]
        advance(place, 2)


@pytest.mark.integration
def test_rejection_crosses_the_process_boundary_with_its_label() -> None:
    with slot("NanObservation") as place:
        place.open()
        pid = process_id(place)
        begin(place)
        advance(place, 2)
        with pytest.raises(EnvFailure, match="nan") as caught:
            advance(place, 1)
        assert (caught.value.reason, caught.value.label) == ("rejected", "not_finite")
        begin(place)
        assert process_id(place) == pid


def test_invalid_reset_is_rejected_every_time_it_is_asked_for() -> None:
    with slot("OldReset", isolation="inline") as place:
        place.open()
        for _ in range(3):
            place.send(None)
            with pytest.raises(EnvFailure, match=r"reset\(\) returned"):
                place.receive()


@pytest.mark.integration
def test_environment_of_an_unknown_name_is_final() -> None:
    with slot("NoSuchThing") as place, pytest.raises(EnvError, match="has no 'NoSuchThing'"):
        place.open()


@pytest.mark.integration
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("FailsToStart", "licence server is away"),
        ("ExitsAtStart", "exited with 7 during start"),
        ("HangsAtStart", "no answer to start within 1 s"),
    ],
)
def test_environment_that_cannot_start_says_why(name: str, words: str) -> None:
    with slot(name, start_timeout_s=1.0 if name == "HangsAtStart" else 30.0) as place:
        with pytest.raises(EnvFailure, match=words):
            place.open()


@pytest.mark.integration
def test_environments_start_side_by_side() -> None:
    places = [slot("SlowToStart") for _ in range(3)]
    try:
        for place in places:
            place.__enter__()
        for place in places:
            place.open()
        waits = [begin(place).seconds for place in places]
        assert len(waits) == 3
    finally:
        for place in places:
            place.__exit__(None, None, None)


def test_seeds_differ_between_slots_and_between_lives_of_one_slot() -> None:
    def first(seed: int, lives: int = 1) -> list[bytes]:
        place = EnvSlot("CartPole-v1", EnvConfig(), ActorConfig(isolation="inline"), seed)
        seen = []
        for _ in range(lives):
            place._start()
            place.open()
            seen.append(begin(place).obs["vector"].tobytes())
        place.__exit__(None, None, None)
        return seen

    assert first(1, 3) == first(1, 3)
    assert len({*first(1, 3), *first(2, 3)}) == 6


def test_process_ends_with_whoever_started_it() -> None:
    script = """
import sys, time
from actors.config import ActorConfig
from actors.envs import EnvConfig
from actors.worker import EnvSlot
with EnvSlot("zoo:Hangs", EnvConfig(), ActorConfig(), 0) as place:
    place.open()
    place.send(None)
    place.receive()
    print(place._worker.process_id, flush=True)
    time.sleep(60)
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
    )
    with parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert not gone(child)
        parent.kill()
    until(lambda: gone(child))


@pytest.mark.integration
def test_leaving_a_slot_leaves_no_process() -> None:
    with slot("Counting") as place:
        place.open()
        pid = process_id(place)
    assert gone(pid)


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"isolation": "thread"}, "process or inline"),
        ({"hang_timeout_s": 0.0}, "--actor.hang-timeout-s"),
        ({"start_timeout_s": -1.0}, "--actor.start-timeout-s"),
        ({"max_policy_age_s": 0.0}, "--actor.max-policy-age-s"),
        ({"max_failures": 0}, "--actor.max-failures"),
    ],
)
def test_bad_choice_is_refused(choices: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ActorConfig(**choices)
