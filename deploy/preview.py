"""The dashboards without Grafana: one HTML page with every panel, drawn from a live Prometheus.

`python -m deploy.preview --prometheus http://127.0.0.1:9090` reads the JSON files that Grafana is
given, asks their queries and lays the panels out as they stand there. The page needs no server.
"""

from __future__ import annotations

import argparse
import html
import io
import json
import math
import re
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MultipleLocator

from deploy.progress import console

DIRECTORY = Path(__file__).parent / "grafana" / "provisioning" / "dashboards"
POINTS = 240
"""Values per curve."""
TIMEOUT_S = 10.0
MOST_IN_LEGEND = 8
COLUMN_PX, ROW_PX, TITLE_PX = 60, 28, 26
PX_PER_INCH = 100
_STEPS = ((1e9, "G"), (1e6, "M"), (1e3, "k"))
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
_STYLE = """
body { background: #111217; color: #ccccdc; font: 14px system-ui, sans-serif; margin: 24px; }
h1 { font-size: 20px; margin: 32px 0 8px; }
.grid { display: grid; grid-template-columns: repeat(24, 1fr); gap: 8px; width: 1440px; }
.panel { background: #181b1f; border: 1px solid #2c3235; border-radius: 3px; padding: 4px 6px; }
.panel h2 { font-size: 13px; font-weight: 500; margin: 2px 0; height: 18px; overflow: hidden; }
.panel svg { width: 100%; height: auto; }
"""


class PreviewError(RuntimeError):
    """The page cannot be made; the message says what to do."""


@dataclass(frozen=True)
class Curve:
    """One series: its name in the legend, times in seconds since the epoch, and values."""

    name: str
    times: list[float]
    values: list[float]


@dataclass(frozen=True)
class Source:
    """A Prometheus, and the time that is looked at."""

    url: str
    start: float
    end: float
    run: str

    @property
    def step_s(self) -> float:
        """Seconds between two values of a curve."""
        return max((self.end - self.start) / POINTS, 1.0)

    def beginnings(self, times: list[float]) -> list[float]:
        """Return the times that no other comes right before: where something began."""
        last = [-math.inf, *times]
        return [
            when
            for before, when in zip(last, times, strict=False)
            if when - before > 2 * self.step_s
        ]

    def ask(self, query: str) -> list[dict[str, Any]]:
        """Return what a query gives over that time. Blocks for at most ten seconds.

        Raises:
            PreviewError: Prometheus does not answer, or refuses the query.
        """
        asked = {
            "query": query.replace("$run", self.run),
            "start": self.start,
            "end": self.end,
            "step": self.step_s,
        }
        url = f"{self.url}/api/v1/query_range?{urllib.parse.urlencode(asked)}"
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
                found: list[dict[str, Any]] = json.load(answer)["data"]["result"]
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")[:200]
            raise PreviewError(f"Prometheus refuses {query!r}: {said}") from error
        except (OSError, ValueError) as error:
            raise PreviewError(
                f"no Prometheus answers at {self.url} ({error}): start one that scrapes a run, as "
                "docker compose does, and give its address as --prometheus http://host:port"
            ) from error
        return found

    def curves(self, target: Mapping[str, Any]) -> Iterator[Curve]:
        """Yield the curves of one query of a panel."""
        for series in self.ask(target["expr"]):
            name = legend(target["legendFormat"], series["metric"])
            times, values = list[float](), list[float]()
            for when, value in series["values"]:
                if times and float(when) - times[-1] > 2 * self.step_s:
                    times.append(times[-1] + self.step_s)  # a gap is not a straight line
                    values.append(math.nan)
                times.append(float(when))
                values.append(float(value))
            yield Curve(name, times, values)


def legend(template: str, labels: Mapping[str, str]) -> str:
    """Return a name with every {{label}} filled in; what a series has no label for stays empty."""
    return re.sub(r"{{\s*(\w+)\s*}}", lambda found: labels.get(found[1], ""), template)


def number(value: float, unit: str) -> str:
    """Return a value as Grafana shows it in a unit of its own names."""
    if unit in ("percent", "percentunit"):
        return f"{value * (100 if unit == 'percentunit' else 1):.3g}%"
    if unit == "s" and value and abs(value) < 1:
        return f"{value * 1e3:.3g} ms" if abs(value) >= 1e-3 else f"{value * 1e6:.3g} µs"
    if unit == "decmbytes":
        value, unit = value * 1e6, "bytes"
    end = {"s": " s", "ops": "/s", "bytes": "B", "Bps": "B/s"}.get(unit, "")
    for size, letter in _STEPS:
        if abs(value) >= size:
            return f"{value / size:.3g} {letter}{end.strip()}"
    return f"{value:.3g}{end}"


def draw(panel: Mapping[str, Any], source: Source, marks: list[tuple[float, str]]) -> str:
    """Return one panel as SVG: its curves, or that there is no data."""
    place, custom = panel["gridPos"], panel["fieldConfig"]["defaults"].get("custom", {})
    figure = Figure(
        figsize=(
            place["w"] * COLUMN_PX / PX_PER_INCH,
            (place["h"] * ROW_PX - TITLE_PX) / PX_PER_INCH,
        ),
        facecolor="none",
        layout="constrained",
    )
    axes = figure.add_subplot(facecolor="none")
    curves = [curve for target in panel["targets"] for curve in source.curves(target)]
    shown = [curve for curve in curves if any(map(math.isfinite, curve.values))]
    if shown and custom.get("stacking", {}).get("mode") == "normal":
        _stack(axes, shown)
    else:
        for curve in shown:
            axes.plot(curve.times, curve.values, linewidth=1.2, label=curve.name)
    for when, colour in marks:
        axes.axvline(when, color=colour, linewidth=1, linestyle="--")
    _dress(axes, panel["fieldConfig"]["defaults"].get("unit", "none"), source, shown)
    out = io.StringIO()
    # Text stays text, and nothing of the file says when and with what it was made.
    with rc_context({"svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(out, format="svg", transparent=True, metadata=_NO_METADATA)
    return out.getvalue()[out.getvalue().index("<svg") :]


def _stack(axes: Axes, curves: list[Curve]) -> None:
    times = sorted({when for curve in curves for when in curve.times})
    rows = []
    curves = sorted(curves, key=lambda curve: np.nansum(curve.values), reverse=True)
    for curve in curves:
        known = dict(zip(curve.times, np.nan_to_num(curve.values), strict=True))
        rows.append([known.get(when, 0.0) for when in times])
    axes.stackplot(times, rows, labels=[curve.name for curve in curves], alpha=0.75)


def _dress(axes: Axes, unit: str, source: Source, curves: list[Curve]) -> None:
    grey = "#8e8e9c"
    axes.set_xlim(source.start, source.end)
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda x, _: time.strftime("%H:%M", time.localtime(x)))
    )
    axes.xaxis.set_major_locator(_every(source))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: number(y, unit)))
    axes.tick_params(colors=grey, labelsize=8, length=0)
    axes.grid(color="#2c3235", linewidth=0.6)
    axes.spines[:].set_visible(False)
    if not curves:
        axes.set_yticks([])
        axes.text(0.5, 0.5, "no data", color=grey, ha="center", transform=axes.transAxes)
        return
    if min(np.nanmin(curve.values) for curve in curves) >= 0:
        highest = max(np.nanmax(curve.values) for curve in curves)
        axes.set_ylim(bottom=0, top=None if highest else 1)
    handles, names = axes.get_legend_handles_labels()
    axes.legend(
        handles[:MOST_IN_LEGEND],
        names[:MOST_IN_LEGEND],
        fontsize=7,
        labelcolor="#ccccdc",
        frameon=False,
        ncols=2,
        loc="best",
    )


def _every(source: Source) -> MultipleLocator:
    minutes = max(1, round((source.end - source.start) / 60 / 5))
    return MultipleLocator(60 * minutes)


def page(board: Mapping[str, Any], source: Source) -> str:
    """Return one dashboard as HTML: its title and panels in their places."""
    marks = [
        (when, note["iconColor"])
        for note in board["annotations"]["list"]
        for series in source.ask(note["expr"])
        for when in source.beginnings([float(point[0]) for point in series["values"]])
    ]
    cells = []
    for panel in board["panels"]:
        place = panel["gridPos"]
        area = (
            f"grid-column: {place['x'] + 1} / span {place['w']}; "
            f"grid-row: {place['y'] + 1} / span {place['h']}"
        )
        title = html.escape(panel["title"])
        cells.append(
            f'<div class="panel" style="{area}"><h2>{title}</h2>{draw(panel, source, marks)}</div>'
        )
    title = html.escape(board["title"])
    return (
        f'<h1 id="{board["uid"]}">{title}</h1>\n<div class="grid">\n' + "\n".join(cells) + "</div>"
    )


def preview(source: Source) -> str:
    """Return all dashboards as one page."""
    boards = [json.loads(path.read_text()) for path in sorted(DIRECTORY.glob("*.json"))]
    boards.sort(key=lambda board: "overview" not in board["uid"])
    body = "\n".join(page(board, source) for board in boards)
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>dreamfleet dashboards</title>'
        f"<style>{_STYLE}</style>\n<body>{body}</body></html>\n"
    )


def main(arguments: list[str] | None = None) -> int:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090", help="its address")
    parser.add_argument("--minutes", type=float, default=60.0, help="how far back to look")
    parser.add_argument("--run", default=".*", help="runs to show, a regular expression")
    parser.add_argument("--out", type=Path, default=Path("dashboards.html"), help="file to write")
    asked = parser.parse_args(arguments)
    end = time.time()
    source = Source(asked.prometheus.rstrip("/"), end - 60 * asked.minutes, end, asked.run)
    try:
        asked.out.write_text(preview(source))
    except PreviewError as error:
        console().print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        return 1
    console().print(f"written {asked.out}", markup=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
