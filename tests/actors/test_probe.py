import math

import pytest

from actors.envs import EnvConfig, EnvError
from actors.probe import MOST_FAILURES, check_env
from actors.worker import EnvFailure

pytestmark = pytest.mark.integration


def test_good_environment_is_measured_and_passes() -> None:
    report = check_env("CartPole-v1", steps=150)
    assert report.ok and report.steps == 150
    assert report.bytes_per_step == 4 * 4 + 4 + 4 + 3
    assert set(report.episodes) == {"terminated"}
    assert 5 < report.length_mean < 150 and report.return_mean == report.length_mean
    assert report.steps_per_s > 100 and report.step_ms > 0 and report.reset_ms > 0
    assert not report.notes


def test_environment_that_never_ends_is_noted() -> None:
    report = check_env("Pendulum-v1", steps=30)
    assert report.ok and "no episode ended" in report.notes[0]
    assert math.isnan(report.length_mean)


def test_time_limit_truncates_in_the_report() -> None:
    report = check_env("Pendulum-v1", EnvConfig(time_limit=5), steps=30)
    assert report.episodes == {"truncated": 6}
    assert report.length_mean == 5.0


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("NanObservation", "not_finite", "nan"),
        ("OldStep", "api", "a tuple of 4"),
        ("OldReset", "api", "reset"),
        ("Exits", "exit", "exited with 3"),
        ("Raises", "crash", "lost its mind"),
    ],
)
def test_every_violation_is_listed_once_with_its_count(name: str, kind: str, words: str) -> None:
    report = check_env(f"zoo:{name}", steps=12)
    assert not report.ok
    assert [violation.kind for violation in report.violations] == [kind]
    assert words in report.violations[0].message
    assert 1 <= report.violations[0].count <= MOST_FAILURES


def test_environment_without_a_valid_step_ends_the_check() -> None:
    report = check_env("zoo:AlwaysNan", steps=1000)
    assert report.steps == 0 and report.violations[0].count == MOST_FAILURES


def test_hanging_environment_is_a_violation() -> None:
    report = check_env("zoo:Hangs", steps=3, hang_timeout_s=0.5)
    assert report.violations[0].kind == "hang"


def test_seed_that_is_ignored_is_noted() -> None:
    report = check_env("zoo:IgnoresSeed", steps=20)
    assert report.ok and any("same seed" in note for note in report.notes)


def test_environment_that_cannot_be_made_is_an_error_and_no_report() -> None:
    with pytest.raises(EnvError, match="did you mean"):
        check_env("CartPol-v1")
    with pytest.raises(EnvFailure, match="licence server"):
        check_env("zoo:FailsToStart")
