"""Run directories as a table, and as a page that needs nothing else."""

from __future__ import annotations

import dataclasses
import json
import os
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploy.cli import main
from deploy.config import FILE_NAME, ConfigError, save_config
from deploy.presets import preset
from deploy.report import ReportOptions, measured, report
from deploy.runs import describe
from learner.gif import encode_gif
from learner.status import Snapshot, write_status

STATUS: dict[str, Any] = {
    **dict.fromkeys(("env_steps_per_s", "updates_per_s", "ratio_actual", "ratio_target"), 1.0),
    **dict.fromkeys(("weights_age_s", "eta_s"), None),
    "env_steps": 900,
    "target_steps": 1000,
    "updates": 40,
    "return_mean20": 123.25,
    "episodes": 2,
    "losses": {},
    "policy_version": (1, 40),
    "waiting_for": "",
    "inserts_wait": "",
    "shares": {},
    "bound_by": "learner (92%)",
    "advice": "lower the train ratio",
    "started_at": 0.0,
}


def make_run(directory: Path, **status: Any) -> Path:
    config = dataclasses.replace(preset("v3-cartpole", "debug"), env="<Odd>-v1", run_dir=directory)
    save_config(config, directory / FILE_NAME)
    if status:
        values = {**STATUS, "pid": 2**22 + 1, **status}
        write_status(directory / "status.json", Snapshot(**values))
    return directory


def test_describe_tells_the_states_apart(tmp_path: Path) -> None:
    runs = {
        "finished": make_run(tmp_path / "a", phase="finished"),
        "died": make_run(tmp_path / "b", phase="update"),
        "running": make_run(tmp_path / "c", phase="update", pid=os.getpid(), started_at=2e9),
        "starting": make_run(tmp_path / "d"),
        "unreadable": make_run(tmp_path / "e"),
    }
    (runs["unreadable"] / FILE_NAME).write_text("no: such\n")
    assert {name: describe(path)["state"] for name, path in runs.items()} == {n: n for n in runs}
    found = describe(runs["finished"])
    assert found["agent"] == "v3" and found["size"] == "debug" and found["env"] == "<Odd>-v1"
    assert (found["steps"], found["updates"], found["return"]) == (900, 40, 123.25)


def test_runs_are_listed_as_a_table_and_as_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "one", phase="finished")
    make_run(tmp_path / "two")
    (tmp_path / "other").mkdir()
    assert main(["runs", str(tmp_path), "--json"]) == 0
    text = capsys.readouterr().out
    assert text.count('"run"') == 2 and '"state": "finished"' in text
    assert main(["runs", str(tmp_path / "one" / "nothing")]) == 2
    assert "there is no folder" in capsys.readouterr().err


class Page(HTMLParser):
    """Notes what a page shows and what it refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_report_is_one_file_that_needs_nothing_else(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", phase="finished", eval_mean20=200.5)
    score = {"return": 9.0, "length": 9, "end": "terminated", "actor": "a", "env_frames": 1}
    rows = [{"env_steps": n, "split": s, **score} for n in range(5) for s in ("train", "eval")]
    (run / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    metrics = [
        {"env_steps": n, "loss/rec": 1.0 / (n + 1), "env_steps_per_s": 5.0, "share/update": 0.5}
        for n in range(2500)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    (run / "videos").mkdir()
    frames = np.zeros((2, 8, 8, 3), np.uint8)
    for name in ("image-0000000010", "image-0000000020", "eval-0000000020"):
        gif = encode_gif(frames, caption="What <it> shows.")
        (run / "videos" / f"{name}.gif").write_bytes(gif)
    assert report(ReportOptions(run_dir=run)) == 0
    page = Page()
    page.feed((run / "report.html").read_text())
    kinds = [source.split(";")[0] for source in page.sources]
    assert kinds == ["data:image/png"] * 4 + ["data:image/gif"] * 2
    for words in ("<Odd>-v1", "900 of", "123.2", "200.5", "learner (92%): lower the train ratio"):
        assert words in page.text, words
    assert "image-0000000020.gif" in page.text and "image-0000000010.gif" not in page.text
    assert "image-0000000020.gif: What <it> shows." in page.text
    assert "preset: v3-cartpole" in page.text


def test_report_draws_what_the_agent_measures_whatever_its_names() -> None:
    rows: list[dict[str, Any]] = [
        {"env_steps": 1, "loss/rec": 1.0, "loss/rec_image": 1.0, "kl_nats/kl": 1.0, "lr": 1.0},
        {"env_steps": 2, "loss/rec": 1.0, "loss/kl": 1.0, "loss/swav": 1.0, "value_mean": 1.0},
        {"env_steps": 3, "value_percentile/5": 1.0, "entropy_nats": 1.0, "return_scale": 1.0},
        {"env_steps": 4, "return_percentile/95": 1.0, "return_mean20": 1.0},
    ]
    assert measured(rows) == (
        ["loss/rec", "loss/kl", "loss/swav"],
        ["kl_nats/kl", "entropy_nats"],
        ["value_mean", "value_percentile/5", "return_percentile/95"],
    )


def test_report_of_a_run_that_has_just_begun_says_what_is_missing(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert report(ReportOptions(run_dir=run, out=tmp_path / "page.html")) == 0
    assert "No episode has ended yet" in (tmp_path / "page.html").read_text()
    with pytest.raises(ConfigError, match="there is no run"):
        report(ReportOptions(run_dir=tmp_path / "nothing"))
