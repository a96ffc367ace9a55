"""`dreamfleet report`: one HTML file about a run that opens without a server or a network."""

from __future__ import annotations

import base64
import html
import io
import json
import re
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from deploy.config import FILE_NAME, TrainConfig, load_config
from deploy.progress import console, count, loss_names, number
from deploy.runs import describe
from deploy.status import STATUS_FILE, require_run

REPORT_FILE = "report.html"
MOST_VIDEOS = 6
MOST_VIDEO_BYTES = 8 * 1024**2
"""A larger animation is named instead of shown."""
POINTS = 1000
"""Points that a line of a chart has at most."""


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Write one HTML file about a run: curves, verdict, videos, configuration."""

    run_dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")]
    """Run directory."""
    out: Path | None = None
    """The file; None is report.html in the run directory."""


def report(options: ReportOptions) -> int:
    """Write the report and say where it is. Works on runs that go on, too.

    Raises:
        ConfigError: there is no run in the directory.
        OSError: the file cannot be written.
    """
    from learner.files import write_atomically

    config = load_config(require_run(options.run_dir) / FILE_NAME)
    path = options.out or options.run_dir / REPORT_FILE
    page = render(options.run_dir, config)
    write_atomically(path, page.encode())
    console().print(f"{path} ({len(page) / 1e6:.1f} MB)", highlight=False, soft_wrap=True)
    return 0


def render(directory: Path, config: TrainConfig) -> str:
    """Return the page; every picture is inside it."""
    from learner.files import read_rows

    snapshot = _snapshot(directory)
    rows = read_rows(directory / "metrics.jsonl")
    losses, nats, imagined = measured(rows)
    sections = [
        ("How it went", _facts(directory, config, snapshot)),
        ("Return", _curve(directory, config)),
        ("Losses", _chart(rows, losses, "loss", log=True)),
        ("Posterior, prior and policy", _chart(rows, nats, "nats")),
        ("Returns and values in imagination", _chart(rows, imagined, "return")),
        ("Speed", _chart(rows, ["env_steps_per_s", "updates_per_s"], "per second")),
        ("Where the learner's time went", _chart(rows, _phases(rows), "share", stacked=True)),
        ("Videos", _videos(directory / "videos")),
        ("Last evaluation", _evaluation(directory / "eval.json")),
        ("Configuration", _fold((directory / FILE_NAME).read_text())),
    ]
    body = "\n".join(f"<h2>{title}</h2>\n{part}" for title, part in sections if part)
    made = time.strftime("%Y-%m-%d %H:%M")
    return _PAGE.format(title=html.escape(f"{config.env} · {directory}"), made=made, body=body)


def _snapshot(directory: Path) -> dict[str, Any]:
    path = directory / STATUS_FILE
    return dict(json.loads(path.read_text())) if path.exists() else {}


def _facts(directory: Path, config: TrainConfig, snapshot: Mapping[str, Any]) -> str:
    run = describe(directory)
    advice = snapshot.get("advice")
    facts = {
        "state": run["state"],
        "environment": config.env,
        "agent": f"{config.agent.name}, {config.size}",
        "preset": config.preset,
        "steps": f"{count(run['steps'])} of {count(run['target_steps'])}",
        "updates": count(run["updates"]),
        "return": f"{number(run['return'])}, mean of the last 20 episodes",
        "evaluation": f"{number(snapshot.get('eval_mean20'))}, mean of the last 20 episodes",
        "bound by": str(snapshot.get("bound_by") or "-") + (f": {advice}" if advice else ""),
        "actors": f"{config.actors} × {config.envs_per_actor} environments",
        "seed": str(config.seed),
    }
    if snapshot.get("eval_mean20") is None:
        del facts["evaluation"]
    cells = (f"<tr><th>{k}</th><td>{html.escape(v)}</td></tr>" for k, v in facts.items())
    return f"<table>{''.join(cells)}</table>"


def _curve(directory: Path, config: TrainConfig) -> str:
    from learner.report import write_curve

    with tempfile.TemporaryDirectory(prefix="report-") as folder:
        picture = Path(folder) / "curve.png"
        if not write_curve(directory / "scores.jsonl", picture, config.env):
            return "<p>No episode has ended yet.</p>"
        return _picture(picture.read_bytes(), "png", "return against environment steps")


def _chart(
    rows: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    label: str,
    *,
    log: bool = False,
    stacked: bool = False,
) -> str:
    """Return a picture of some columns of the metrics over environment steps."""
    rows = rows[:: max(1, -(-len(rows) // POINTS))]
    lines = {
        name: [(row["env_steps"], row[name]) for row in rows if row.get(name) is not None]
        for name in names
    }
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        return ""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    axes = figure.add_subplot()
    if stacked:
        steps = [row["env_steps"] for row in rows]
        parts = [[row.get(name) or 0.0 for row in rows] for name in lines]
        axes.stackplot(steps, parts, labels=[name.partition("/")[2] for name in lines])
    else:
        for name, points in lines.items():
            axes.plot(*zip(*points, strict=True), label=name.removeprefix("loss/"), linewidth=1)
    axes.set(xlabel="environment steps", ylabel=label)
    if log:
        axes.set_yscale("symlog", linthresh=0.1)
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return _picture(buffer.getvalue(), "png", label)


def measured(rows: Iterable[Mapping[str, Any]]) -> tuple[list[str], list[str], list[str]]:
    """Return the columns with losses, with nats, and with returns and values in imagination."""
    names = dict.fromkeys(name for row in rows for name in row)
    nats = [name for name in names if name.startswith(("entropy_nats", "kl_nats/"))]
    imagined = [name for name in names if name.startswith(("return_percentile/", "value_"))]
    return loss_names(names), nats, imagined


def _phases(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return sorted({name for row in rows for name in row if name.startswith("share/")})


def _videos(folder: Path) -> str:
    """Return the newest animation of each kind; their names end with the environment step."""
    from learner.gif import caption_of

    newest: dict[str, Path] = {}
    for path in sorted(folder.glob("*.gif")):
        newest[re.sub(r"-\d+$", "", path.stem)] = path
    shown = []
    for path in list(newest.values())[:MOST_VIDEOS]:
        if path.stat().st_size > MOST_VIDEO_BYTES:
            shown.append(f"<p>{html.escape(path.name)} is too large to be shown here.</p>")
        else:
            caption = f"{path.name}: {caption_of(path)}".removesuffix(": ")
            shown.append(_picture(path.read_bytes(), "gif", caption))
    return "\n".join(shown)


def _evaluation(path: Path) -> str:
    if not path.exists():
        return ""
    found = json.loads(path.read_text())
    spread = f"± {number(found['std'])}, {number(found['min'])} to {number(found['max'])}"
    episodes = f"over {len(found['episodes'])} episodes, {found['mode']}"
    text = f"{number(found['mean'])} {spread} {episodes}, checkpoint {found['checkpoint']}"
    return f"<p>{html.escape(text)}</p>"


def _fold(text: str) -> str:
    return f"<details><summary>config.yaml</summary><pre>{html.escape(text)}</pre></details>"


def _picture(data: bytes, kind: str, name: str) -> str:
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    caption = html.escape(name)
    picture = f'<img src="{source}" alt="{caption}">'
    return f"<figure>{picture}<figcaption>{caption}</figcaption></figure>"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 60em; padding: 0 1em;
  color: #222; background: #fff }}
h1 {{ font-size: 1.5em }} h2 {{ font-size: 1.15em; margin-top: 2em }}
th {{ text-align: left; font-weight: normal; color: #666; padding-right: 2em; vertical-align: top }}
img {{ max-width: 100% }} figure {{ margin: 0 0 1em }} figcaption, footer {{ color: #666 }}
pre {{ overflow-x: auto; background: #f6f6f6; padding: 1em }}
</style></head><body>
<h1>{title}</h1>
{body}
<footer><p>Written by dreamfleet on {made}.</p></footer>
</body></html>
"""
