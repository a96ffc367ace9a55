from pathlib import Path

import pytest
from PIL import Image

from learner.files import JsonLines
from learner.report import running_mean, write_curve


def score(steps: int, value: float, split: str = "train", end: str = "terminated") -> dict:
    return {"env_steps": steps, "return": value, "split": split, "end": end}


def test_the_running_mean_takes_what_there_is() -> None:
    assert running_mean([1.0, 2.0, 3.0, 4.0], window=2) == pytest.approx([1.0, 1.5, 2.5, 3.5])


def test_a_curve_is_drawn_from_the_scores(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "scores.jsonl")
    for index in range(40):
        lines.write(score(index * 100, float(index)))
    lines.write(score(4000, 50.0, "eval"))
    lines.close()
    assert write_curve(tmp_path / "scores.jsonl", tmp_path / "curve.png", "CartPole-v1")
    with Image.open(tmp_path / "curve.png") as picture:
        assert picture.size[0] > 400


def test_no_finished_episode_draws_nothing(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "scores.jsonl")
    lines.write(score(10, 1.0, end="abandoned"))
    lines.close()
    assert not write_curve(tmp_path / "scores.jsonl", tmp_path / "curve.png")
    assert not (tmp_path / "curve.png").exists()
