from __future__ import annotations

from pathlib import Path

import pytest

from deploy.checkenv import CheckOptions, check_env
from deploy.cli import main

pytestmark = pytest.mark.integration

BROKEN = """
import gymnasium, numpy


class Leaky(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-1, 1, (3,), numpy.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        self.clock = 0
        return numpy.zeros(3, numpy.float32), {}

    def step(self, action):
        self.clock += 1
        value = numpy.nan if self.clock == 5 else 0.0
        return numpy.full(3, value, numpy.float32), 0.0, self.clock == 9, False, {}
"""


def test_good_environment_is_described_and_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert check_env(CheckOptions(env="CartPole-v1", steps=100)) == 0
    shown = capsys.readouterr().out
    for part in ("vector: vector, shape (4,)", "discrete, classes 2", "terminated", "fit for"):
        assert part in shown, shown


def test_violation_is_shown_with_its_count_and_is_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "leaky_env.py").write_text(BROKEN)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert check_env(CheckOptions(env="leaky_env:Leaky", steps=40)) == 1
    shown = capsys.readouterr().out
    assert "not_finite" in shown and "times)" in shown and "broken" in shown


def test_unknown_environment_is_one_line_with_the_nearest_name(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["check-env", "--env", "CartPol-v1"]) == 2
    said = capsys.readouterr().err
    assert "did you mean CartPole-v1?" in said and said.count("\n") == 1


def test_nothing_to_check_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check-env", "--steps", "0"]) == 2
    assert "--steps must be at least 1, got 0" in capsys.readouterr().err
