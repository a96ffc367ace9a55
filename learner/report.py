"""The learning curve of a run as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from learner.files import read_rows

WINDOW = 20
"""Episodes in the running mean."""


def running_mean(values: Sequence[float], window: int = WINDOW) -> NDArray[np.float64]:
    """Return the mean of the last ``window`` values at each index, of all where there are fewer."""
    total = np.concatenate([[0.0], np.cumsum(np.asarray(values, np.float64))])
    end = np.arange(1, len(total))
    begin = np.maximum(0, end - window)
    return (total[end] - total[begin]) / (end - begin)


def write_curve(scores: Path, picture: Path, title: str = "") -> bool:
    """Draw return against environment steps from a scores file.

    Single training episodes are faint dots, the mean of the last 20 is a line; evaluation episodes
    are a line of their own. Returns False, and draws nothing, if there is no episode.
    """
    rows = [row for row in read_rows(scores) if row["end"] != "abandoned"]
    if not rows:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for split, colour in (("train", "tab:blue"), ("eval", "tab:orange")):
        _draw(axes, [row for row in rows if row["split"] == split], split, colour)
    axes.set(xlabel="environment steps", ylabel="episode return", title=title)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", frameon=False)
    FigureCanvasAgg(figure).print_png(str(picture))
    return True


def write_losses(metrics: Path, picture: Path, title: str = "") -> bool:
    """Draw every loss against updates from a metrics file, on a scale that takes any sign and size.

    Returns False, and draws nothing, if there is no row.
    """
    rows = read_rows(metrics)
    names = sorted({name for row in rows for name in row if name.startswith("loss/")})
    if not names:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name in names:
        points = [(row["updates"], row[name]) for row in rows if name in row]
        axes.plot(*zip(*points, strict=True), marker=".", label=name.removeprefix("loss/"))
    axes.set(xlabel="updates", ylabel="loss", yscale="symlog", title=title)
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    FigureCanvasAgg(figure).print_png(str(picture))
    return True


def _draw(axes: Any, rows: list[dict[str, Any]], split: str, colour: str) -> None:
    if not rows:
        return
    steps = [row["env_steps"] for row in rows]
    returns = [row["return"] for row in rows]
    axes.scatter(
        steps, returns, s=8, alpha=0.25, color=colour, linewidths=0, label=f"{split} episode"
    )
    axes.plot(steps, running_mean(returns), color=colour, label=f"{split}, mean of last {WINDOW}")
