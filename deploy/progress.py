"""What a run is doing, for people: a live view, one line, and a summary at the end.

Everything here reads the plain snapshot that the learner also writes to ``status.json``; values
that are missing or None are shown as a dash.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import shlex
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.logging import RichHandler
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

Snapshot = Mapping[str, Any]
LINE_EVERY_S = 10.0
FRAMES_PER_S = 2.0
ENDED = ("finished", "stopped", "failed")
"""Phases of a run that is over."""
MOST_ACTORS = 16
_GOOD, _FAINT = "bold green", "dim"

log = logging.getLogger(__name__)


@functools.cache
def console() -> Console:
    """The one console that the live view, messages and logs share, so that they do not overlap."""
    return Console(highlight=False, emoji=False)


def log_handler() -> logging.Handler:
    """Return a handler that keeps out of the live view's way, plain where there is no terminal."""
    if console().is_terminal:
        return RichHandler(console=console(), show_path=False, markup=False, highlighter=None)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    return handler


@contextlib.contextmanager
def follow(read: Callable[[], Snapshot | None], title: str = "") -> Iterator[None]:
    """Show the snapshots of `read` while the block runs.

    On a terminal a live view, twice a second; elsewhere one line every ten seconds. `read` is
    called from another thread and may return None while there is nothing to show.
    """
    if console().is_terminal:
        with Live(
            get_renderable=lambda: view(read() or {}, title),
            console=console(),
            refresh_per_second=FRAMES_PER_S,
        ):
            yield
        return
    stop = threading.Event()
    thread = threading.Thread(target=_print_lines, args=(read, stop), name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def view(snapshot: Snapshot, title: str = "") -> RenderableType:
    """Return the whole picture of a snapshot: counters, losses, actors, what bounds the run."""
    if not snapshot:
        return Panel(Text("starting …", _FAINT), title=Text(title), title_align="left")
    parts: list[RenderableType] = [_facts(snapshot)]
    if snapshot.get("per_actor"):
        parts += [Text(""), _actors(snapshot["per_actor"])]
    return Panel(Group(*parts), title=Text(title), title_align="left")


def line(snapshot: Snapshot) -> str:
    """Return a snapshot as one line of words and numbers."""
    steps, target = snapshot.get("env_steps"), snapshot.get("target_steps")
    if offline(snapshot):
        of = f"{count(snapshot.get('updates'))}/{count(snapshot['target_updates'])}"
        unread = f" ({snapshot['inserts_wait']})" if snapshot.get("inserts_wait") else ""
        return (
            f"updates {of} ({rate(snapshot.get('updates_per_s'))}) | steps {count(steps)} in the "
            f"replay{unread} | {_losses(snapshot)} | left {duration(snapshot.get('eta_s'))}"
        )
    words = [
        f"steps {count(steps)}/{count(target)} ({rate(snapshot.get('env_steps_per_s'))})",
        f"updates {count(snapshot.get('updates'))} ({rate(snapshot.get('updates_per_s'))})",
        f"ratio {_ratio(snapshot)}",
        f"return {number(snapshot.get('return_mean20'))}{_evaluated(snapshot)}",
        f"episodes {count(snapshot.get('episodes'))}",
        f"weights {_version(snapshot)}",
        f"bound by {_bound(snapshot)}",
    ]
    waiting = snapshot.get("waiting_for")
    if waiting:
        words.append(f"waiting for {waiting}")
    words.append(f"left {duration(snapshot.get('eta_s'))}")
    return " | ".join(words)


def summary(directory: Path, snapshot: Snapshot, env: str = "") -> RenderableType:
    """Return the end of a run: how it went, where everything is, and what to try next."""
    steps = snapshot.get("env_steps")
    grid = _grid()
    grid.add_row("ended", Text(str(snapshot.get("phase") or "-"), _GOOD))
    grid.add_row("environment", env or "-")
    if offline(snapshot):
        _add_offline(grid, snapshot)
    else:
        grid.add_row("steps", f"{count(steps)} of {count(snapshot.get('target_steps'))}")
        grid.add_row("updates", count(snapshot.get("updates")))
        score = number(snapshot.get("return_mean20"))
        grid.add_row(
            "return",
            Text(score, _GOOD).append(
                f" mean of the last 20 of {count(snapshot.get('episodes'))} episodes"
                + _evaluated(snapshot),
                "",
            ),
        )
    grid.add_row("bound by", _bound(snapshot))
    grid.add_row("curve", _existing(directory / "curve.png"))
    grid.add_row("checkpoint", _existing(newest_checkpoint(directory)))
    videos = directory / "videos" / "index.html"
    if videos.exists():
        grid.add_row("videos", str(videos))
    # Outside the frame, so that they can be copied.
    commands = Text("\n".join(f"  {command}" for command in try_next(directory, snapshot)))
    commands.overflow = "fold"
    return Group(
        Panel(grid, title=Text(str(directory)), title_align="left"),
        Text("try next", _FAINT),
        commands,
    )


def offline(snapshot: Snapshot) -> bool:
    """Return whether a snapshot is that of a learner that only reads a replay."""
    return snapshot.get("target_updates") is not None


def _add_offline(grid: Table, snapshot: Snapshot) -> None:
    done, target = snapshot.get("updates"), snapshot["target_updates"]
    grid.add_row("updates", f"{count(done)} of {count(target)}")
    grid.add_row("replay", f"{count(snapshot.get('env_steps'))} steps, of others")
    grid.add_row("losses", _losses(snapshot))


def try_next(directory: Path, snapshot: Snapshot) -> list[str]:
    """Return commands that make sense after this run, as they can be typed here."""
    program, run = command_name(), shlex.quote(str(directory))
    length = "updates" if offline(snapshot) else "steps"
    target = int(snapshot.get(f"target_{length}") or 0)
    more = 2 * target if snapshot.get("phase") == "finished" else target
    board = shlex.quote(str(Path(program).with_name("tensorboard")))
    return [
        f"{program} eval {run} --episodes 20 --video",
        f"{program} train --run-dir {run}" + (f" --{length} {more}" if more > target else ""),
        f"{program} status {run}",
        f"{board} --logdir {run}",
    ]


def command_name() -> str:
    """Return how this program is called from here: its bare name, or its path where that fails."""
    if shutil.which("dreamfleet"):
        return "dreamfleet"
    path = Path(sys.argv[0])
    if path.name != "dreamfleet":
        return "dreamfleet"
    try:
        path = path.absolute().relative_to(Path.cwd())
    except ValueError:
        path = path.absolute()
    return shlex.quote(str(path))


def newest_checkpoint(directory: Path) -> Path | None:
    """Return the newest finished checkpoint of a run directory by name, unverified."""
    found = [path for path in (directory / "checkpoints").glob("[0-9]*") if path.is_dir()]
    return max(found, default=None, key=lambda path: path.name)


def count(value: float | None) -> str:
    """Return a whole number with thousands separators."""
    return "-" if value is None else f"{int(value):,}"


def number(value: float | None) -> str:
    """Return a number with four digits that matter."""
    return "-" if value is None else f"{value:,.1f}" if abs(value) >= 100 else f"{value:.4g}"


def rate(value: float | None) -> str:
    """Return something per second."""
    return "-" if value is None else f"{value:.1f}/s"


def duration(seconds: float | None) -> str:
    """Return a time as hours, minutes and seconds."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _print_lines(read: Callable[[], Snapshot | None], stop: threading.Event) -> None:
    while not stop.wait(LINE_EVERY_S):
        snapshot = read()
        if snapshot:
            console().print(line(snapshot), markup=False, soft_wrap=True)


def _grid() -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style=_FAINT, no_wrap=True)
    grid.add_column(overflow="fold")
    return grid


def _steps(snapshot: Snapshot) -> RenderableType:
    done, target = snapshot.get("env_steps") or 0, snapshot.get("target_steps") or 0
    over = snapshot.get("phase") in ENDED
    left = str(snapshot["phase"]) if over else f"{duration(snapshot.get('eta_s'))} left"
    row = Table.grid(padding=(0, 2))
    row.add_row(
        ProgressBar(total=max(target, 1), completed=min(done, target), width=24),
        f"{count(done)} of {count(target)} · {rate(snapshot.get('env_steps_per_s'))} · {left}",
    )
    return row


def _facts(snapshot: Snapshot) -> RenderableType:
    grid = _grid()
    if offline(snapshot):
        rate_now, left = rate(snapshot.get("updates_per_s")), duration(snapshot.get("eta_s"))
        _add_offline(grid, snapshot)
        if snapshot.get("inserts_wait"):
            grid.add_row("replay", str(snapshot["inserts_wait"]))
        grid.add_row("speed", f"{rate_now} · {left} left")
        grid.add_row("time goes to", _shares(snapshot))
        return grid
    grid.add_row("env steps", _steps(snapshot))
    grid.add_row(
        "updates", f"{count(snapshot.get('updates'))} · {rate(snapshot.get('updates_per_s'))}"
    )
    grid.add_row("train ratio", _ratio(snapshot))
    grid.add_row(
        "return",
        Text(number(snapshot.get("return_mean20")), _GOOD).append(
            f" mean of the last 20 · {count(snapshot.get('episodes'))} episodes"
            + _evaluated(snapshot),
            "",
        ),
    )
    grid.add_row("weights", _version(snapshot))
    grid.add_row("bound by", Text(_bound(snapshot), "bold"))
    if snapshot.get("waiting_for"):
        grid.add_row("waits for", str(snapshot["waiting_for"]))
    if snapshot.get("inserts_wait"):
        grid.add_row("actors", str(snapshot["inserts_wait"]))
    if servers := snapshot.get("replay_servers"):
        grid.add_row("replay", "\n".join(map(_server, servers)))
    grid.add_row("time goes to", _shares(snapshot))
    grid.add_row("losses", _losses(snapshot))
    return grid


def _server(server: Mapping[str, Any]) -> str:
    state = f" · away: {server['away']}" if server["away"] else ""
    return f"{server['address']} · {count(server['inserted_steps'])} steps inserted{state}"


def _ratio(snapshot: Snapshot) -> str:
    return f"{number(snapshot.get('ratio_actual'))} of {number(snapshot.get('ratio_target'))}"


def _evaluated(snapshot: Snapshot) -> str:
    mean = snapshot.get("eval_mean20")
    return "" if mean is None else f" · evaluation {number(mean)}"


def _bound(snapshot: Snapshot) -> str:
    """Return the verdict in one line."""
    advice = snapshot.get("advice")
    return str(snapshot.get("bound_by") or "-") + (f": {advice}" if advice else "")


def _version(snapshot: Snapshot) -> str:
    fence, update = snapshot.get("policy_version") or ("-", "-")
    age = snapshot.get("weights_age_s")
    return f"{fence}.{update}" + ("" if age is None else f", {age:.0f} s old")


def _shares(snapshot: Snapshot) -> str:
    found = [(part, name) for name, part in (snapshot.get("shares") or {}).items() if part >= 0.005]
    return " · ".join(f"{name} {part:.0%}" for part, name in sorted(found, reverse=True)) or "-"


def loss_names(names: Iterable[str]) -> list[str]:
    """Return the losses among the names of metrics, but not the parts of the reconstruction."""
    losses = (name for name in names if name.startswith("loss/"))
    return [name for name in losses if not name.startswith("loss/rec_")]


def _losses(snapshot: Snapshot) -> str:
    found = snapshot.get("losses") or {}
    shown = [f"{name.removeprefix('loss/')} {number(found[name])}" for name in loss_names(found)]
    return " · ".join(shown) or "-"


def _actors(actors: list[Mapping[str, Any]]) -> RenderableType:
    table = Table(box=None, header_style=_FAINT, pad_edge=False, padding=(0, 2, 0, 0), expand=True)
    for name in ("actor", "steps", "steps/s", "episodes", "weights", "restarts"):
        table.add_column(name, justify="left" if name == "actor" else "right", no_wrap=True)
    table.add_column("state", no_wrap=True, overflow="ellipsis", ratio=1)
    for actor in actors[:MOST_ACTORS]:
        version = actor.get("version")
        table.add_row(
            f"{'eval ' * (actor.get('split') == 'eval')}{actor.get('slot', '-')}",
            count(actor.get("env_steps")),
            rate(actor.get("env_steps_per_s")),
            count(actor.get("episodes")),
            ".".join(map(str, version)) if isinstance(version, list | tuple) else "-",
            count(actor.get("restarts")),
            _doing(actor),
        )
    if len(actors) > MOST_ACTORS:
        table.add_row(f"and {len(actors) - MOST_ACTORS} more", *[""] * 6)
    return table


def _doing(actor: Mapping[str, Any]) -> str:
    """Return an actor's state, with what holds it up."""
    state, blocked, trouble = (str(actor.get(k) or "") for k in ("state", "blocked", "trouble"))
    reason = " ".join((blocked if state in ("blocked", "acting") else trouble).split())
    return (f"{state}: {reason}" if reason else state) or "-"


def _existing(path: Path | None) -> str:
    return str(path) if path is not None and path.exists() else "-"
