import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from learner.checkpoint import CheckpointError, load, load_newest, save
from replay_service import ReplayFenced

STATE = {"agent": {"weight": torch.arange(6.0).reshape(2, 3)}, "updates": 7, "name": "v3"}


def write(directory: Path, update: int, **state: object) -> Path:
    return save(directory, {**STATE, **state}, fence=1, update=update, env_steps=64, keep=3)


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(bytes(data))


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    write(tmp_path, 7)
    found = load_newest(tmp_path)
    assert found is not None
    assert torch.equal(found.state["agent"]["weight"], STATE["agent"]["weight"])
    assert found.state["updates"] == 7
    assert found.manifest["update"] == 7
    assert found.manifest["env_steps"] == 64
    assert found.skipped == ()


def test_an_empty_or_missing_directory_has_no_checkpoint(tmp_path: Path) -> None:
    assert load_newest(tmp_path) is None
    assert load_newest(tmp_path / "missing") is None


def test_only_the_newest_three_stay(tmp_path: Path) -> None:
    for update in range(1, 6):
        write(tmp_path, update)
    assert [int(path.name.split("-")[1]) for path in sorted(tmp_path.iterdir())] == [3, 4, 5]


def test_a_later_fence_is_newer_than_more_updates(tmp_path: Path) -> None:
    save(tmp_path, STATE, fence=1, update=900, env_steps=1, keep=3)
    save(tmp_path, STATE, fence=2, update=100, env_steps=1, keep=3)
    found = load_newest(tmp_path)
    assert found is not None
    assert found.manifest["update"] == 100


@pytest.mark.parametrize("successor", ["000002-0000000100-000000000001", ".partial-000002-1-1"])
def test_a_replaced_learner_writes_nothing_and_takes_nothing_away(
    tmp_path: Path, successor: str
) -> None:
    kept = [write(tmp_path, update).name for update in (1, 2, 3)]
    (tmp_path / successor).mkdir()
    (tmp_path / successor / "state.pt").write_bytes(b"half of")
    for update in (3, 4):  # one that is there already, and a new one
        with pytest.raises(ReplayFenced, match="fence 1 was replaced by 2"):
            write(tmp_path, update)
    assert {path.name for path in tmp_path.iterdir()} == {*kept, successor}
    assert (tmp_path / successor / "state.pt").read_bytes() == b"half of"


def test_a_learner_that_is_replaced_while_it_writes_does_not_finish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, dump = write(tmp_path, 1).name, torch.save

    def slowly(*words: object) -> None:
        dump(*words)
        (tmp_path / "000002-0000000001-000000000064").mkdir()

    monkeypatch.setattr(torch, "save", slowly)
    with pytest.raises(ReplayFenced):
        write(tmp_path, 2)
    finished = {path.name for path in tmp_path.glob("[0-9]*")}
    assert finished == {kept, "000002-0000000001-000000000064"}


@pytest.mark.parametrize("name", ["state.pt", "manifest.json"])
def test_a_corrupt_newest_checkpoint_is_skipped_and_named(tmp_path: Path, name: str) -> None:
    write(tmp_path, 1)
    newest = write(tmp_path, 2)
    flip_byte(newest / name) if name == "state.pt" else (newest / name).write_text("{")
    found = load_newest(tmp_path)
    assert found is not None
    assert found.manifest["update"] == 1
    assert len(found.skipped) == 1
    assert newest.name in found.skipped[0]


@pytest.mark.parametrize("name", ["state.pt", "manifest.json"])
def test_a_missing_file_makes_the_previous_checkpoint_count(tmp_path: Path, name: str) -> None:
    write(tmp_path, 1)
    (write(tmp_path, 2) / name).unlink()
    found = load_newest(tmp_path)
    assert found is not None
    assert found.manifest["update"] == 1


def test_all_corrupt_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    flip_byte(write(tmp_path, 1) / "state.pt")
    with pytest.raises(CheckpointError, match="all 1 checkpoints .* damaged .*--run-dir"):
        load_newest(tmp_path)


@pytest.mark.parametrize("name", ["state.pt", "manifest.json"])
def test_checkpoint_with_a_file_missing_names_the_file(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, 1)
    (path / name).unlink()
    with pytest.raises(CheckpointError, match=f"cannot be read: .*No such file.*{name}"):
        load(path)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {tmp_path}/ran",)

    path = write(tmp_path, 1, trap=Trap())
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(path)
    assert not (tmp_path / "ran").exists()


def test_an_unwritable_directory_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(CheckpointError, match="cannot write checkpoint .* earlier .* kept"):
        write(tmp_path / "taken", 1)


# The first argument names a function; the process kills itself just before or after its n-th call.
KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from learner.checkpoint import save
directory, name, count, when = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
module = torch if name == "save" else os
real, calls = getattr(module, name), 0
def trap(*args, **kwargs):
    global calls
    calls += 1
    if calls == count and when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    result = real(*args, **kwargs)
    if calls == count:
        os.kill(os.getpid(), signal.SIGKILL)
    return result
setattr(module, name, trap)
save(directory, {"updates": 2}, fence=1, update=2, env_steps=128, keep=3)
"""

FAULTS = [
    ("save", 1, "before", 1),
    ("save", 1, "after", 1),
    ("fsync", 1, "after", 1),
    ("fsync", 2, "before", 1),
    ("fsync", 3, "after", 1),
    ("replace", 1, "before", 1),
    ("replace", 1, "after", 2),
    ("fsync", 4, "after", 2),
]


@pytest.mark.faults
@pytest.mark.slow
@pytest.mark.parametrize("name, count, when, want", FAULTS)
def test_a_kill_at_any_point_leaves_a_valid_checkpoint(
    tmp_path: Path, name: str, count: int, when: str, want: int
) -> None:
    write(tmp_path, 1)
    command = [sys.executable, "-c", KILLED, str(tmp_path), name, str(count), when]
    ended = subprocess.run(command, timeout=240, check=False, env={**os.environ, "PYTHONPATH": "."})
    assert ended.returncode == -signal.SIGKILL
    found = load_newest(tmp_path)
    assert found is not None
    assert found.manifest["update"] == want
    assert found.skipped == ()
    write(tmp_path, 3)
    assert not list(tmp_path.glob(".partial-*"))


# The largest file that the process may write: the system refuses what is beyond, as a full disk
# does, without any right to mount one.
FULL = """
import resource, signal, sys
from pathlib import Path
import torch
from learner.checkpoint import CheckpointError, save
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
state = {"weight": torch.zeros(2**16)}
try:
    save(Path(sys.argv[1]), state, fence=1, update=2, env_steps=128, keep=3)
except CheckpointError as error:
    sys.exit(str(error))
"""


@pytest.mark.faults
@pytest.mark.parametrize("room", [0, 100_000])
def test_a_disk_that_fills_up_leaves_the_earlier_checkpoint(tmp_path: Path, room: int) -> None:
    write(tmp_path, 1)
    command = [sys.executable, "-c", FULL, str(tmp_path), str(room)]
    environment = {**os.environ, "PYTHONPATH": "."}
    ended = subprocess.run(
        command, timeout=120, check=False, env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 1, ended.stderr
    assert "cannot write checkpoint" in ended.stderr and "earlier checkpoints" in ended.stderr
    found = load_newest(tmp_path)
    assert found is not None and found.manifest["update"] == 1 and found.skipped == ()
    write(tmp_path, 3)
    assert not list(tmp_path.glob(".partial-*"))
