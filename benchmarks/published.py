"""Draw runs over a published learning curve: `python -m benchmarks.published RUN_DIR … --help`.

The published file is JSON: ``bin_right_edges`` in environment frames, and ``tasks``, where every
task has one list of mean returns per seed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from numpy.typing import NDArray

from learner.files import read_rows

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class PublishedOptions:
    """Compare the training episodes of runs with published ones, bin by bin."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run directories, one per seed."""
    scores: Path
    """JSON file of the published scores."""
    task: str
    """Task in that file."""
    out: Path
    """Picture to write."""
    frames: int
    """Environment frames at which the comparison ends."""


def published_bins(path: Path, task: str, frames: int) -> tuple[Floats, Floats]:
    """Return right edges (n,) in frames and returns (seeds, n), up to a number of frames.

    Raises:
        ValueError: no such task; those that there are are listed.
    """
    content = json.loads(path.read_text())
    if task not in content["tasks"]:
        raise ValueError(f"no task {task!r} in {path}; it has {', '.join(content['tasks'])}")
    seeds = content["tasks"][task]
    length = min(len(content["bin_right_edges"]), *(len(seed) for seed in seeds))
    edges = np.asarray(content["bin_right_edges"][:length], np.float64)
    kept = edges <= frames
    return edges[kept], np.asarray([seed[:length] for seed in seeds], np.float64)[:, kept]


def binned_returns(scores: Path, edges: Floats) -> Floats:
    """Return the mean return of the training episodes that end in each bin; NaN where none does."""
    rows = [row for row in read_rows(scores) if row["split"] == "train"]
    rows = [row for row in rows if row["end"] != "abandoned"]
    frames = np.asarray([row["env_frames"] for row in rows], np.float64)
    returns = np.asarray([row["return"] for row in rows], np.float64)
    begin = np.concatenate([[0.0], edges[:-1]])
    means = np.full(len(edges), np.nan)
    for i, (low, high) in enumerate(zip(begin, edges, strict=True)):
        inside = (frames > low) & (frames <= high)
        if inside.any():
            means[i] = returns[inside].mean()
    return means


def draw(edges: Floats, published: Floats, ours: Floats, title: str, out: Path) -> None:
    """Write the picture: the published median and range, and one line per run."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    low, high = published.min(0), published.max(0)
    seeds = f"{len(published)} seeds"
    axes.fill_between(
        edges, low, high, alpha=0.2, color="0.4", label=f"published, range of {seeds}"
    )
    axes.plot(edges, np.median(published, 0), "--", color="0.3", label="published, median")
    for i, line in enumerate(ours):
        axes.plot(edges, line, "o-", color=f"C{i}", label=f"ours, run {i}")
    axes.set(xlabel="environment frames", ylabel="mean return of the bin", title=title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    FigureCanvasAgg(figure).print_png(str(out))


def compare(options: PublishedOptions) -> dict[str, Any]:
    """Draw the comparison and return its numbers."""
    edges, published = published_bins(options.scores, options.task, options.frames)
    ours = np.stack([binned_returns(run / "scores.jsonl", edges) for run in options.runs])
    draw(edges, published, ours, options.task, options.out)
    return {
        "frames": edges.tolist(),
        "published_median": np.median(published, 0).tolist(),
        "ours": ours.tolist(),
    }


def main() -> None:
    """Run from the command line."""
    from rich.console import Console

    result = compare(tyro.cli(PublishedOptions, prog="python -m benchmarks.published"))
    Console(emoji=False).print_json(json.dumps(result))


if __name__ == "__main__":
    main()
