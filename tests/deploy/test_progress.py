from __future__ import annotations

import io
import re
import threading
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, RenderableType

from deploy import progress
from learner.status import Snapshot

FULL: dict[str, Any] = {
    "env_steps": 4512,
    "target_steps": 12_000,
    "env_steps_per_s": 31.25,
    "updates": 123,
    "updates_per_s": 2.2,
    "ratio_actual": 63.1,
    "ratio_target": 64.0,
    "return_mean20": 123.4,
    "episodes": 41,
    "losses": {"loss/rec": 1.5, "loss/dyn": 3.25},
    "policy_version": [2, 120],
    "weights_age_s": 2.3,
    "bound_by": "learner (92 %)",
    "advice": "lower the train ratio",
    "shares": {"update": 0.92, "data_wait": 0.05, "log": 0.001},
    "eta_s": 432.1,
    "phase": "update",
    "waiting_for": "",
    "per_actor": [{"slot": 0, "env_steps": 4512, "env_steps_per_s": 31.25, "state": "acting"}],
}


def drawn(what: RenderableType, width: int = 100) -> str:
    """Return what a terminal of this width shows, without colours."""
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(what)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_view_shows_every_part_of_a_snapshot() -> None:
    shown = drawn(progress.view(FULL, "runs/a"))
    for part in (
        "runs/a", "4,512 of 12,000", "31.2/s", "7:12 left", "123 · 2.2/s", "63.1 of 64", "123.4",
        "41 episodes", "2.120, 2 s old", "learner (92 %): lower the train ratio", "update 92%",
        "rec 1.5 · dyn 3.25",
        "acting",
    ):  # fmt: skip
        assert part in shown, f"{part} in\n{shown}"
    assert "log" not in shown


def test_losses_of_every_agent_are_shown_whatever_their_names() -> None:
    losses = {"loss/rec_image": 9.0, "entropy_nats": 1.0, "loss/kl": 3.0, "loss/swav": 4.25}
    shown = drawn(progress.view({**FULL, "losses": losses}))
    assert "kl 3 · swav 4.25" in shown and "rec_image" not in shown
    shown = drawn(progress.view({**FULL, "losses": {"entropy_nats": 1.0}}))
    assert re.search(r"losses +- ", shown)


def test_names_of_runs_are_shown_as_they_are() -> None:
    for what in (progress.view(FULL, "runs/a:boom:[b]"), progress.view({}, "runs/a:boom:[b]")):
        assert "runs/a:boom:[b]" in drawn(what)
    assert "runs/a:boom:[b]" in drawn(progress.summary(Path("runs/a:boom:[b]"), FULL))


@pytest.mark.parametrize("missing", [*FULL, None])
def test_view_and_line_survive_what_is_not_known_yet(missing: str | None) -> None:
    known = {} if missing is None else {k: v for k, v in FULL.items() if k != missing}
    assert drawn(progress.view(known))
    assert "bound by" in progress.line(known)
    unknown = {**FULL, missing: None} if missing else {}
    assert drawn(progress.view(unknown), width=40)


def test_view_reads_what_the_learner_writes() -> None:
    assert set(FULL) - {"per_actor"} <= set(Snapshot.__dataclass_fields__)


def test_line_is_one_line_with_what_it_waits_for() -> None:
    text = progress.line({**FULL, "waiting_for": "1,024 steps to begin with"})
    assert "\n" not in text
    assert "steps 4,512/12,000 (31.2/s)" in text
    assert "waiting for 1,024 steps to begin with" in text


def test_many_actors_are_counted_instead_of_listed() -> None:
    actors = [{"slot": i, "env_steps": i} for i in range(50)]
    assert "and 34 more" in drawn(progress.view({**FULL, "per_actor": actors}))


@pytest.mark.parametrize(
    ("actor", "want"),
    [
        ({"slot": 1, "state": "blocked", "blocked": "budget spent"}, "blocked: budget spent"),
        (
            {"slot": 1, "state": "restarting", "trouble": "hung for 60 s"},
            "restarting: hung for 60 s",
        ),
        ({"slot": 1, "state": "acting", "trouble": "hung for 60 s"}, "acting"),
        ({"slot": 1, "state": "quarantined", "trouble": "x" * 500}, "xxx…"),
    ],
)
def test_actor_that_does_not_act_says_why(actor: dict[str, Any], want: str) -> None:
    shown = drawn(progress.view({**FULL, "per_actor": [actor]}), 140)
    assert want in shown and ("hung" in shown) == ("hung" in want)


def test_summary_names_files_that_exist_and_commands_to_try(tmp_path: Path) -> None:
    (tmp_path / "curve.png").write_bytes(b"png")
    (tmp_path / "checkpoints" / "000001-0000000001-000000000001").mkdir(parents=True)
    (tmp_path / "checkpoints" / ".partial-000002").mkdir()
    shown = drawn(progress.summary(tmp_path, {**FULL, "phase": "finished"}, "CartPole-v1"), 200)
    for part in ("finished", "CartPole-v1", "curve.png", "000001-0000000001", "eval", "--video"):
        assert part in shown, shown
    assert "--steps 24000" in shown and "tensorboard --logdir" in shown


def test_stopped_run_is_continued_by_its_directory_alone(tmp_path: Path) -> None:
    commands = progress.try_next(tmp_path, {**FULL, "phase": "stopped"})
    assert commands[1].endswith(f"train --run-dir {tmp_path}")


def test_follow_prints_lines_without_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.01)
    asked = threading.Semaphore(0)

    def read() -> dict[str, Any] | None:
        asked.release()
        return FULL

    with progress.follow(read):
        for _ in range(3):
            assert asked.acquire(timeout=10)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 2 and all(line.startswith("steps 4,512/12,000") for line in lines)


@pytest.mark.parametrize(
    ("seconds", "want"), [(None, "-"), (0.4, "0:00"), (75, "1:15"), (3661, "1:01:01")]
)
def test_durations_read_like_a_clock(seconds: float | None, want: str) -> None:
    assert progress.duration(seconds) == want


def test_command_is_named_as_it_can_be_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("sys.argv", [str(Path.cwd() / ".venv" / "bin" / "dreamfleet")])
    assert re.fullmatch(r"\.venv/bin/dreamfleet", progress.command_name())
