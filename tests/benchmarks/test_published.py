import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.published import PublishedOptions, binned_returns, compare, published_bins


def scores(path: Path) -> Path:
    rows = [
        {"env_frames": 500, "return": 1.0, "end": "truncated", "split": "train"},
        {"env_frames": 1000, "return": 3.0, "end": "terminated", "split": "train"},
        {"env_frames": 1001, "return": 9.0, "end": "truncated", "split": "train"},
        {"env_frames": 1500, "return": 99.0, "end": "abandoned", "split": "train"},
        {"env_frames": 1500, "return": 77.0, "end": "truncated", "split": "eval"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def published(path: Path) -> Path:
    content = {
        "bin_right_edges": [1000, 2000, 3000, 4000],
        "tasks": {"cartpole": [[1.0, 2.0, 3.0], [3.0, 4.0, 5.0], [2.0, 9.0, 4.0]]},
    }
    path.write_text(json.dumps(content))
    return path


def test_episodes_are_counted_in_the_bin_in_which_they_end(tmp_path: Path) -> None:
    means = binned_returns(scores(tmp_path / "scores.jsonl"), np.array([1000.0, 2000.0, 3000.0]))
    assert means[:2].tolist() == [2.0, 9.0] and np.isnan(means[2])


def test_published_curves_end_with_the_comparison_or_the_shortest_seed(tmp_path: Path) -> None:
    path = published(tmp_path / "published.json")
    edges, returns = published_bins(path, "cartpole", 2000)
    assert edges.tolist() == [1000, 2000] and returns.shape == (3, 2)
    assert published_bins(path, "cartpole", 10_000)[0].tolist() == [1000, 2000, 3000]
    with pytest.raises(ValueError, match="no task 'walker'.*it has cartpole"):
        published_bins(path, "walker", 2000)


def test_a_comparison_draws_and_returns_both_curves(tmp_path: Path) -> None:
    scores(tmp_path / "scores.jsonl")
    options = PublishedOptions(
        runs=(tmp_path,),
        scores=published(tmp_path / "published.json"),
        task="cartpole",
        out=tmp_path / "curve.png",
        frames=2000,
    )
    result = compare(options)
    assert result["published_median"] == [2.0, 4.0] and result["ours"] == [[2.0, 9.0]]
    with Image.open(tmp_path / "curve.png") as picture:
        assert picture.width >= 600 and len(picture.convert("RGB").getcolors(10**6) or []) > 3
