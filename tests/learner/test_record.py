from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from learner.files import read_rows
from learner.record import Recorder


@pytest.fixture
def recorder(tmp_path: Path) -> Iterator[Recorder]:
    made = Recorder(tmp_path, action_repeat=2)
    yield made
    made.close()


def evaluator(*numbers: int, life: int = 0) -> dict[str, Any]:
    scores = [
        {"number": n, "return": 10.0 * n, "length": 5, "end": "terminated", "version": [1, n]}
        for n in numbers
    ]
    return {"slot": 0, "life": life, "state": "acting", "split": "eval", "scores": scores}


def test_scores_of_evaluations_are_written_once_at_the_steps_of_their_weights(
    recorder: Recorder, tmp_path: Path
) -> None:
    for update in range(4):
        recorder.note_published((1, update), 100 * update)
    for numbers in ((1,), (1, 2), (1, 2)):
        recorder.note_actors([evaluator(*numbers)])
    recorder.note_actors([evaluator(1, life=1)])
    rows = read_rows(tmp_path / "scores.jsonl")
    assert [(row["env_steps"], row["env_frames"], row["return"], row["actor"]) for row in rows] == [
        (100, 200, 10.0, "eval-0-0"),
        (200, 400, 20.0, "eval-0-0"),
        (100, 200, 10.0, "eval-0-1"),
    ]
    assert {row["split"] for row in rows} == {"eval"}
    assert recorder.eval_mean == pytest.approx(40 / 3)
    assert "scores" not in recorder.actors[0]
    assert recorder.return_mean is None and recorder.episodes == 0


def test_evaluations_neither_hide_training_episodes_nor_count_as_acting(tmp_path: Path) -> None:
    first = Recorder(tmp_path)
    first.note_published((1, 1), 5000)
    first.note_actors([evaluator(1)])
    assert first.actor_times.recent().acting == 0
    first.close()
    again = Recorder(tmp_path)
    event = SimpleNamespace(
        env_steps=40, ret=1.0, length=3, end="truncated", stream="a", version=(1, 0)
    )
    again.score([event])
    again.score([event])
    again.close()
    assert again.eval_mean == 10.0 and again.return_mean == 1.0 and again.episodes == 1
    assert [row["split"] for row in read_rows(tmp_path / "scores.jsonl")] == ["eval", "train"]
