from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from deploy.cli import COMMANDS, main, parse_train
from deploy.config import FILE_NAME, ConfigError, save_config
from deploy.presets import preset

HEAVY = ("torch", "ray", "gymnasium", "matplotlib", "tensorboard", "tyro", "redis")


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """Return what went to the error stream, without colours."""
    return re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("line", "want"),
    [
        ("trian", "unknown command trian; did you mean train?"),
        ("train --batch-size 4", "unknown flag --batch-size; did you mean --learner.batch-size?"),
        ("train --agent.rssm.deterr 8", "did you mean --agent.rssm.deter?"),
        ("train --preset v3-catpole", "did you mean v3-cartpole?"),
        ("train --size 12", "unknown --size 12"),
        ("train --steps many", "--steps: invalid literal"),
        ("train --steps", "--steps"),
        ("train --learner.mode fast", "--learner.mode"),
        ("train --agent.rssm.deter 13", "must be a multiple of rssm.blocks"),
        ("train --device tpu", "--device must be auto, cpu, cuda"),
        ("train surprise", "surprise"),
        ("eval", "RUN_DIR"),
        ("eval nowhere", "there is no run in nowhere"),
        ("status nowhere", "there is no run in nowhere"),
        ("eval x --epsiodes 3", "did you mean --episodes?"),
        ("doctor --all", "unknown flag --all"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(
    line: str, want: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(line.split()) == 2
    text = said(capsys)
    assert text.startswith("dreamfleet: error: ") and want in text
    assert text.count("\n") == 1 and "Traceback" not in text


def test_words_are_shown_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    named = tmp_path / "a:boom:b"
    assert main(["status", str(named)]) == 2
    assert f"there is no run in {named}" in said(capsys)
    named.mkdir()
    assert main(["runs", str(named)]) == 0
    assert "a:boom:b" in capsys.readouterr().out.replace("\n", "")


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(ConfigError):
        main(["train", "--steps", "0", "--debug"])


def test_help_of_train_shows_every_field_with_its_meaning(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    for flag in """--preset --size --run-dir --env --steps --seed --actors --envs-per-actor
        --train-ratio --device --redis --ray --lockstep --agent.rssm.deter
        --learner.batch-size --replay.capacity-steps --environment.image-size""".split():
        assert re.search(rf"{re.escape(flag)}\b", shown), flag
    assert "Width D of the deterministic state" in re.sub(r"[│\s]+", " ", shown)


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "train"])
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert f"usage: dreamfleet {command}" in capsys.readouterr().out


def test_without_a_command_all_commands_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name}" in shown for name in COMMANDS)


def test_flags_change_single_fields_on_top_of_preset_and_size() -> None:
    line = "--preset v3-dmc-proprio --size 12m --agent.rssm.deter 1024 --seed 3 --lockstep"
    config = parse_train(line.split())
    assert (config.env, config.seed, config.lockstep) == ("dmc:walker-walk", 3, True)
    assert (config.agent.rssm.deter, config.agent.rssm.hidden) == (1024, 256)
    assert config.size == "12m"


def test_run_directory_alone_continues_with_what_it_was_started_with(tmp_path: Path) -> None:
    started = parse_train(["--preset", "v3-minigrid", "--run-dir", str(tmp_path), "--seed", "5"])
    save_config(started, tmp_path / FILE_NAME)
    assert parse_train(["--run-dir", str(tmp_path)]) == started
    longer = parse_train(["--run-dir", str(tmp_path), "--steps", "600000"])
    assert (longer.steps, longer.seed) == (600_000, 5)


def test_default_is_the_cartpole_preset() -> None:
    assert parse_train([]) == preset("v3-cartpole")


def test_environment_alone_takes_its_preset_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "deploy.cli"):
        config = parse_train(["--env", "my_package.my_env:MyEnv", "--size", "25m"])
    assert config == replace(preset("v3", "25m"), env="my_package.my_env:MyEnv")
    assert "preset_chosen v3: no preset is made for my_package.my_env:MyEnv" in caplog.text
    images = parse_train(["--env=dmc:cup-catch", "--environment.obs", "image"])
    assert (images.preset, images.env) == ("v3-dmc-vision", "dmc:cup-catch")


def test_chosen_preset_is_said_on_the_terminal_once(tmp_path: Path) -> None:
    words = ["train", "--env", "no.module:Here", "--run-dir", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-m", "deploy.cli", *words], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    shown = " ".join((done.stdout + done.stderr).split())
    assert shown.count("preset_chosen v3: no preset is made for no.module:Here") == 1, shown


def test_named_preset_and_existing_run_are_what_an_environment_alone_does_not_change(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    line = ["--env", "Acrobot-v1", "--run-dir", str(tmp_path)]
    with caplog.at_level(logging.INFO, "deploy.cli"):
        started = parse_train([*line, "--preset", "v3-cartpole"])
        assert started.preset == "v3-cartpole"
        save_config(started, tmp_path / FILE_NAME)
        assert parse_train(line) == started
    assert "preset_chosen" not in caplog.text
    wider = parse_train([*line, "--size", "1m"])
    assert (wider.preset, wider.size) == ("v3-cartpole", "1m")


def test_help_is_quick_and_loads_nothing_heavy() -> None:
    code = (
        "import sys, deploy.cli\n"
        f"heavy = sorted(set({HEAVY!r}) & set(sys.modules))\n"
        "assert not heavy, heavy\n"
        "code = deploy.cli.main(['train', '--help'])\n"
        "heavy = sorted({'torch', 'ray', 'gymnasium'} & set(sys.modules))\n"
        "assert not heavy, heavy\n"
        "sys.exit(code)"
    )
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    # Half a second on an idle core; the bound leaves room for a busy machine.
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize(("own", "want"), [(None, "PASSIVE"), ("active", "ACTIVE")])
def test_threads_that_wait_leave_the_cores_to_others(own: str | None, want: str) -> None:
    code = "from deploy.cli import main; main(['--help']); import torch"
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    environment |= {"OMP_DISPLAY_ENV": "true"} | ({"OMP_WAIT_POLICY": own} if own else {})
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60
    )
    assert re.search(rf"OMP_WAIT_POLICY *= *'{want}'", done.stderr), done.stderr
