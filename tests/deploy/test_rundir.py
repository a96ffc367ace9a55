import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from deploy.config import ConfigError, load_config, save_config
from deploy.presets import preset
from deploy.rundir import begin, run_directory

LOCKED = """
import sys
from dataclasses import replace
from pathlib import Path
from deploy.presets import preset
from deploy.rundir import run_directory
with run_directory(replace(preset("v3-cartpole", "debug"), run_dir=Path(sys.argv[1]))):
    sys.stdout.write("locked\\n")
    sys.stdout.flush()
    sys.stdin.read()
"""
KILLED = """
import os, signal, sys
from dataclasses import replace
from pathlib import Path
from deploy.config import FILE_NAME, save_config
from deploy.presets import preset
from deploy.rundir import begin, run_directory
config = replace(preset("v3-cartpole", "debug"), run_dir=Path(sys.argv[1]))
with run_directory(config) as run:
    save_config(config, run / FILE_NAME)
    (run / "replay" / "appendonlydir").mkdir(parents=True)
    if "begin" in sys.argv:
        begin(run)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def config(directory: Path, **changes: object):  # type: ignore[no-untyped-def]
    return replace(preset("v3-cartpole", "debug"), run_dir=directory / "run", **changes)  # type: ignore[arg-type]


def test_the_same_configuration_continues_and_may_go_further(tmp_path: Path) -> None:
    with run_directory(config(tmp_path)) as directory:
        save_config(config(tmp_path), directory / "config.yaml")
        begin(directory)
    for _ in range(2):
        # It has begun: what a later start fails at changes nothing.
        with pytest.raises(OSError, match="no disk"):
            with run_directory(config(tmp_path, steps=99_000)) as directory:
                assert directory == tmp_path / "run"
                assert not begin(directory)
                raise OSError("no disk")
    assert {path.name for path in directory.iterdir()} == {"lock", "config.yaml"}


def test_a_run_that_could_not_start_does_not_keep_another_out(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no display"):
        with run_directory(config(tmp_path, env="NoSuchEnv-v0")) as directory:
            save_config(config(tmp_path), directory / "config.yaml")
            (directory / "replay" / "appendonlydir").mkdir(parents=True)
            raise OSError("no display")
    assert not (tmp_path / "run").exists()
    with run_directory(config(tmp_path)):
        pass


@pytest.mark.parametrize("begun", [False, True])
def test_a_start_that_was_killed_keeps_another_out_only_if_it_had_begun(
    tmp_path: Path, begun: bool
) -> None:
    words = [sys.executable, "-c", KILLED, str(tmp_path / "run"), *["begin"] * begun]
    assert subprocess.run(words, timeout=60).returncode == -signal.SIGKILL
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left == {"lock", "config.yaml", "replay"} | ({"starting"} if not begun else set())
    other = config(tmp_path, seed=5)
    if begun:
        with pytest.raises(ConfigError, match="seed"):
            with run_directory(other):
                pass
        return
    with run_directory(other) as directory:
        assert {path.name for path in directory.iterdir()} == {"lock", "starting"}


def test_a_link_to_a_place_for_the_run_stays(tmp_path: Path) -> None:
    (tmp_path / "large-disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "large-disk")
    with run_directory(config(tmp_path)) as directory:
        save_config(config(tmp_path), directory / "config.yaml")
        (directory / "mirror").symlink_to(tmp_path)
    assert (tmp_path / "run").is_symlink() and not any((tmp_path / "large-disk").iterdir())


def test_another_configuration_is_refused_with_the_differences(tmp_path: Path) -> None:
    with run_directory(config(tmp_path)) as directory:
        save_config(config(tmp_path), directory / "config.yaml")
        begin(directory)
    other = config(tmp_path, train_ratio=7.0, seed=5)
    with pytest.raises(ConfigError, match=r"seed.*train_ratio.*7\.0"):
        with run_directory(other):
            pass
    assert load_config(tmp_path / "run" / "config.yaml").seed == 0


def test_a_directory_with_something_else_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").touch()
    with pytest.raises(ConfigError, match=r"thesis\.tex.*another --run-dir"):
        with run_directory(config(tmp_path)):
            pass


def test_a_file_in_place_of_the_directory_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(ConfigError, match="cannot be used"):
        with run_directory(config(tmp_path)):
            pass


def test_two_runs_in_one_directory_are_refused_by_process(tmp_path: Path) -> None:
    other = subprocess.Popen(
        [sys.executable, "-c", LOCKED, str(tmp_path / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert other.stdin is not None and other.stdout is not None
    try:
        other.stdout.readline()
        with pytest.raises(ConfigError, match=f"in use by process {other.pid}"):
            with run_directory(config(tmp_path)):
                pass
    finally:
        other.stdin.close()
        other.wait(10)
        other.stdout.close()
    with run_directory(config(tmp_path)):
        pass
