"""Watching an agent: the same episodes as eval plays, wherever they are shown."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageSequence

from deploy.cli import main
from deploy.config import ConfigError, TrainConfig
from deploy.play import PlayOptions
from deploy.presets import preset
from deploy.progress import console
from tests.deploy.untrained import save

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on CartPole."""
    directory = tmp_path_factory.mktemp("run")
    save(directory, preset("v3-cartpole", "debug"), update=7)
    return directory


@pytest.fixture
def no_display(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A terminal of 60 by 20 that shows all colours."""
    values = {"FORCE_COLOR": "1", "COLORTERM": "truecolor", "TERM": "xterm-256color"}
    for name, value in (values | {"COLUMNS": "60", "LINES": "20"}).items():
        monkeypatch.setenv(name, value)
    console.cache_clear()
    yield
    console.cache_clear()


def with_env(env: str) -> TrainConfig:
    return dataclasses.replace(preset("v3-cartpole", "debug"), env=env)


def returns(text: str) -> list[float]:
    return [float(found) for found in re.findall(r"episode \d+: return ([\d.]+)", text)]


@pytest.mark.integration
def test_video_shows_the_episode_that_eval_plays_in_real_time(
    run: Path, tmp_path: Path, capsys: Capture
) -> None:
    film = tmp_path / "new" / "film.gif"
    assert main(f"play {run} --episodes 2 --seed 5 --video {film}".split()) == 0
    shown = returns(capsys.readouterr().out)
    assert main(f"eval {run} --episodes 1 --envs 1 --seed 5".split()) == 0
    assert shown[0] == json.loads((run / "eval.json").read_text())["mean"]
    with Image.open(film) as gif:
        times = [frame.info["duration"] for frame in ImageSequence.Iterator(gif)]
        assert gif.size == (300, 200)
    # CartPole pays one for each step, and takes 50 of them in a second.
    assert len(shown) == 2 and sum(times) == 20 * sum(shown)


@pytest.mark.integration
@pytest.mark.usefixtures("no_display")
def test_without_display_and_terminal_the_video_is_in_the_run(run: Path, capsys: Capture) -> None:
    assert main(f"play {run} --episodes 1".split()) == 0
    (film,) = (run / "videos").glob("play-*.gif")
    assert film.name == "play-0000000070.gif" and str(film) in capsys.readouterr().out


@pytest.mark.integration
@pytest.mark.usefixtures("no_display", "terminal")
def test_terminal_is_drawn_in_and_given_back(run: Path, capsys: Capture) -> None:
    assert main(f"play {run} --episodes 1 --speed 50".split()) == 0
    shown, after = capsys.readouterr().out.split("\x1b[?1049l")  # the end of the other screen
    assert "\x1b[?1049h" in shown and "episode 1 of 1, step 1, return 0" in shown
    rows = shown.partition("step 1,")[0].splitlines()[:-1]
    assert len(rows) == 19 and all("▀" in row for row in rows)
    assert "255;255;255" in rows[0] and "0;0;0" in "".join(rows)  # paper, and the cart
    assert "episode 1: return" in after


@pytest.mark.integration
def test_window_stays_open_while_the_environment_draws(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    assert main(f"play {run} --window --episodes 2 --speed 50".split()) == 0
    assert len(returns(capsys.readouterr().out)) == 2


@pytest.mark.integration
def test_what_the_agent_sees_is_shown_where_nothing_is_drawn(tmp_path: Path) -> None:
    save(tmp_path, with_env("tests.deploy.untrained:Pixels"), update=1)
    film = tmp_path / "film.gif"
    assert main(f"play {tmp_path} --episodes 1 --video {film}".split()) == 0
    with Image.open(film) as gif:
        frames = [np.asarray(f.convert("RGB")) for f in ImageSequence.Iterator(gif)]
        assert gif.info["duration"] == 100
    assert [frame.mean() for frame in frames] == [0, 80, 160]


@pytest.mark.integration
def test_an_environment_without_pictures_is_refused(tmp_path: Path, capsys: Capture) -> None:
    save(tmp_path, with_env("tests.deploy.untrained:Unseen"), update=1)
    assert main(f"play {tmp_path} --video {tmp_path / 'film.gif'}".split()) == 2
    assert "untrained:Unseen draws nothing, and its agent sees no image" in capsys.readouterr().err
    assert not (tmp_path / "film.gif").exists()


@pytest.mark.usefixtures("no_display")
@pytest.mark.parametrize(
    ("flag", "words"), [("--window", "there is no display"), ("--terminal", "is no terminal")]
)
def test_where_nothing_can_be_shown_the_other_ways_are_named(
    run: Path, flag: str, words: str, capsys: Capture
) -> None:
    assert main(["play", str(run), flag]) == 2
    said = capsys.readouterr().err
    assert words in said and "--video PATH" in said


def test_a_run_without_checkpoint_is_refused(run: Path, tmp_path: Path, capsys: Capture) -> None:
    shutil.copy(run / "config.yaml", tmp_path)
    assert main(["play", str(tmp_path), "--video", "film.gif"]) == 2
    assert "has no checkpoint yet" in capsys.readouterr().err


def test_a_missing_environment_library_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    save(tmp_path, with_env("crafter:reward"), update=1)
    monkeypatch.delitem(sys.modules, "actors.envs.crafter", raising=False)
    monkeypatch.setitem(sys.modules, "crafter", None)
    assert main(["play", str(tmp_path), "--video", "film.gif"]) == 2
    assert "need crafter, which is not installed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ({"episodes": 0}, "--episodes must be at least 1, got 0"),
        ({"speed": 0.0}, "--speed must be above 0, got 0.0"),
        ({"video": Path("film.mp4")}, "name it .gif, got film.mp4"),
        ({"terminal": True, "window": True}, "got --window and --terminal"),
    ],
)
def test_bad_choices_are_refused(chosen: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        PlayOptions(run_dir=Path("run"), **chosen)  # type: ignore[arg-type]
