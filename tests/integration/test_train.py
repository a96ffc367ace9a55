"""Whole runs through the command line: real Ray, real Redis, real processes."""

import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from shutil import copytree

import psutil
import pytest

from deploy.sentinel import MARK
from learner.checkpoint import load_newest
from learner.files import read_rows

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
SMALL = (
    ("--preset", "v3-cartpole", "--size", "debug", "--train-ratio", "4")
    + ("--envs-per-actor", "2", "--learner.batch-size", "4", "--learner.batch-length", "16")
    + ("--replay.min-size-steps", "256", "--replay.chunk-steps", "16")
    + ("--learner.log-every-s", "0.5", "--learner.publish-every-s", "0.5")
    # Runs without an end would be worth compiling for.
    + ("--learner.mode", "eager")
)
EVALUATED = ("--eval.actors", "1", "--eval.episodes", "2", "--eval.every-s", "0.5")
FOREVER = "10000000"
TOKEN = "DREAMFLEET_TEST_RUN"
"""In the environment of a run's process, and so of all that come from it."""
START_S, END_S = 240.0, 180.0
SLOW_UPDATE = """
import sys, time
from pathlib import Path
from deploy import cli
from learner.learner import Learner
update = Learner._update
def slow(self):
    Path(sys.argv[1]).touch()
    time.sleep(20.0)
    update(self)
Learner._update = slow
sys.exit(cli.main(sys.argv[2:]))
"""
"""The program, but every update takes long, and leaves a file where it begins."""


class Run:
    """One `dreamfleet train` in a process of its own, of the real program or a variant of it."""

    def __init__(
        self,
        directory: Path,
        *flags: str,
        program: Sequence[str] = ("-m", "deploy.cli"),
        own_group: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.directory, self.token = directory, secrets.token_hex(8)
        command = [sys.executable, *program, "train", *SMALL]
        self.log = directory.with_suffix(".log").open("ab")
        self.process = subprocess.Popen(
            [*command, "--run-dir", str(directory), *flags],
            cwd=ROOT,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                TOKEN: self.token,
                **(environment or {}),
            },
            process_group=0 if own_group else None,
        )
        self.members: dict[int, psutil.Process] = {}

    def status(self) -> dict[str, object]:
        """Return the last snapshot, {} before the first."""
        try:
            return dict(json.loads((self.directory / "status.json").read_text()))
        except FileNotFoundError:
            return {}

    def wait_for(self, there: Callable[[dict[str, object]], bool], timeout_s: float) -> None:
        """Wait for a snapshot with some property, and remember every process on the way."""
        deadline = time.monotonic() + timeout_s
        while not there(self.status()):
            assert self.process.poll() is None, f"the run ended early:\n{self.output()}"
            assert time.monotonic() < deadline, f"waited too long:\n{self.output()}"
            self.note_members()
            time.sleep(0.1)
        self.note_members()

    def note_members(self) -> None:
        """Remember every process below the run, as long as they can be told from others."""
        try:
            for child in psutil.Process(self.process.pid).children(recursive=True):
                self.members[child.pid] = child
        except psutil.NoSuchProcess:
            return

    def left(self, timeout_s: float) -> list[str]:
        """Return what still runs of the whole tree when the time is over."""
        _, alive = psutil.wait_procs(self.members.values(), timeout=timeout_s)
        return [" ".join(p.cmdline()) for p in alive if p.status() != psutil.STATUS_ZOMBIE]

    def of_it(self) -> list[str]:
        """Return all that run and come from the run's process, also where it has ended before."""
        found = [p for p in psutil.process_iter() if _environment(p).get(TOKEN) == self.token]
        return [" ".join(p.cmdline()) for p in found if p.status() != psutil.STATUS_ZOMBIE]

    def output(self) -> str:
        """Return what the run has said."""
        return self.directory.with_suffix(".log").read_text(errors="replace")

    def close(self) -> None:
        """End everything, if a test has failed before."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.log.close()


@pytest.fixture
def start(tmp_path: Path):  # type: ignore[no-untyped-def]
    runs: list[Run] = []

    def begin(*flags: str, name: str = "run") -> Run:
        runs.append(Run(tmp_path / name, *flags))
        return runs[-1]

    yield begin
    for run in runs:
        run.close()


def training(status: dict[str, object]) -> bool:
    return int(str(status.get("updates", 0))) > 20


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that has ended by itself, for tests that go on with a copy of its directory."""
    run = Run(
        tmp_path_factory.mktemp("ended") / "run",
        *("--steps", "1500", "--learner.checkpoint-every-steps", "500", *EVALUATED),
    )
    try:
        assert run.process.wait(START_S + END_S) == 0, run.output()
    finally:
        run.close()
    return run


def ends_well(run: Run, number: signal.Signals, code: int) -> None:
    """Signal a run, which saves what it has and leaves no process."""
    assert len(run.of_it()) > 3, "the server, Ray and actors come from the run's process"
    run.process.send_signal(number)
    assert run.process.wait(END_S) == code, run.output()
    assert run.left(1.0) == [] == run.of_it()
    assert run.status()["phase"] == "stopped"
    saved = load_newest(run.directory / "checkpoints")
    assert saved is not None
    assert saved.manifest["update"] == run.status()["updates"]


def test_a_run_ends_by_itself_resumes_and_leaves_what_it_promises(  # type: ignore[no-untyped-def]
    ended: Run, start, tmp_path: Path
) -> None:
    found = {path.name for path in ended.directory.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "scores.jsonl", "curve.png", "replay"} <= found
    assert {"checkpoints", "status.json"} <= found
    assert any(name.startswith("events.out.tfevents.") for name in found)
    assert ended.status()["phase"] == "finished"
    first = load_newest(ended.directory / "checkpoints")
    assert first is not None
    assert first.manifest["env_steps"] >= 1500
    assert "dreamfleet eval" in ended.output()

    copytree(ended.directory, tmp_path / "run")
    again = start("--steps", "2500")
    assert again.process.wait(START_S + END_S) == 0, again.output()
    second = load_newest(again.directory / "checkpoints")
    assert second is not None
    assert second.manifest["env_steps"] >= 2500
    assert second.manifest["update"] > first.manifest["update"]
    assert second.manifest["fence"] > first.manifest["fence"]
    rows = read_rows(again.directory / "scores.jsonl")
    trained, played = ([row for row in rows if row["split"] == s] for s in ("train", "eval"))
    steps = [row["env_steps"] for row in trained]
    assert steps == sorted(steps) and len(trained) + len(played) == len(rows)
    # What was played for its score alone is in no account of the replay.
    assert played and sum(row["length"] for row in trained) <= steps[-1]
    assert {row["actor"] for row in played} == {"eval-0-0"}
    assert len({tuple(row["policy_version"]) for row in played}) > 1
    assert "evaluation" in ended.output()


def test_an_interrupt_saves_and_leaves_no_process(start) -> None:  # type: ignore[no-untyped-def]
    run = start("--steps", FOREVER)
    run.wait_for(training, START_S)
    ends_well(run, signal.SIGINT, 130)


def test_a_signal_to_the_whole_group_in_a_long_update_saves_what_the_update_makes(
    tmp_path: Path,
) -> None:
    begun = tmp_path / "begun"
    run = Run(
        tmp_path / "run",
        *("--steps", FOREVER),
        program=("-c", SLOW_UPDATE, str(begun)),
        own_group=True,
        # What Ray would wait for its control process, were it not told otherwise: less than the
        # update takes.
        environment={"RAY_gcs_rpc_server_reconnect_timeout_s": "3"},
    )
    try:
        run.wait_for(lambda _: begun.exists(), START_S)
        os.killpg(run.process.pid, signal.SIGTERM)
        assert run.process.wait(END_S) == 143, run.output()
        assert run.left(1.0) == []
        assert run.status()["phase"] == "stopped"
        saved = load_newest(run.directory / "checkpoints")
        assert saved is not None
        assert saved.manifest["update"] == run.status()["updates"] == 1
    finally:
        run.close()


def test_actors_join_and_leave_a_run_which_keeps_the_number_and_ends_when_asked(start) -> None:  # type: ignore[no-untyped-def]
    run = start("--steps", FOREVER)
    run.wait_for(training, START_S)
    for actors in ("3", "2"):
        command = [sys.executable, "-m", "deploy.cli", "scale", str(run.directory)]
        done = subprocess.run(
            [*command, "--actors", actors], cwd=ROOT, capture_output=True, text=True, timeout=END_S
        )
        assert done.returncode == 0, done.stdout + done.stderr + run.output()
        assert f"{actors} actors wanted" in done.stdout
        run.note_members()
    found = run.status()["per_actor"]
    assert isinstance(found, list) and len(found) == 2
    assert "actors: 2" in (run.directory / "config.yaml").read_text()
    ends_well(run, signal.SIGTERM, 143)


def test_a_second_signal_stops_at_once(start) -> None:  # type: ignore[no-untyped-def]
    run = start("--steps", FOREVER)
    run.wait_for(training, START_S)
    run.process.send_signal(signal.SIGINT)
    run.process.send_signal(signal.SIGINT)
    assert run.process.wait(END_S) == 130, run.output()
    assert run.left(1.0) == []


def test_a_killed_run_leaves_no_process_and_can_be_continued(start) -> None:  # type: ignore[no-untyped-def]
    run = start("--steps", FOREVER, "--learner.checkpoint-every-s", "2")
    run.wait_for(training, START_S)
    run.wait_for(lambda status: any((run.directory / "checkpoints").glob("0*")), END_S)
    run.process.kill()
    run.process.wait()
    assert run.left(20.0) == []
    saved = load_newest(run.directory / "checkpoints")
    assert saved is not None
    more = str(saved.manifest["env_steps"] + 1000)
    again = start("--steps", more)
    assert again.process.wait(START_S + END_S) == 0, again.output()
    resumed = load_newest(run.directory / "checkpoints")
    assert resumed is not None
    assert resumed.manifest["update"] > saved.manifest["update"]


def test_a_signal_while_starting_leaves_nothing(start) -> None:  # type: ignore[no-untyped-def]
    run = start("--steps", FOREVER)
    deadline = time.monotonic() + START_S
    while not (run.directory / "replay").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(1.0)
    run.note_members()
    run.process.send_signal(signal.SIGTERM)
    assert run.process.wait(END_S) == 143, run.output()
    assert run.left(1.0) == [] == run.of_it()
    assert not run.directory.exists()


def test_a_corrupt_newest_checkpoint_is_said_and_the_previous_one_used(  # type: ignore[no-untyped-def]
    ended: Run, start, tmp_path: Path
) -> None:
    copytree(ended.directory, tmp_path / "run")
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    data = bytearray((newest / "state.pt").read_bytes())
    data[len(data) // 2] ^= 0xFF
    (newest / "state.pt").write_bytes(bytes(data))
    again = start("--steps", "2000")
    assert again.process.wait(START_S + END_S) == 0, again.output()
    assert re.search(rf"checkpoint_skipped.*{newest.name}", again.output())


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--env", "NoSuchEnv-v0"), "NoSuchEnv"),
        (("--redis", "redis://127.0.0.1:1"), "Connection refused; is it running, and is this its"),
        (("--ray", "127.0.0.1:1"), "nothing answers at --ray 127.0.0.1:1"),
        (("--device", "cuda:7"), "--device cuda:7 is not there"),
        (("--replay.capacity-steps", "1000000000000"), "capacity"),
    ],
)
def test_what_cannot_work_is_one_clear_error(start, flags: tuple[str, ...], words: str) -> None:  # type: ignore[no-untyped-def]
    run = start("--steps", "2000", *flags)
    assert run.process.wait(START_S) == 2, run.output()
    assert words in run.output()
    assert "Traceback" not in run.output()
    assert run.of_it() == []
    assert not run.directory.exists()


def test_what_fails_after_everything_has_started_leaves_nothing(start) -> None:  # type: ignore[no-untyped-def]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = int(free.getsockname()[1])
    run = start("--steps", "2000", "--learner.metrics-port", str(port))
    deadline = time.monotonic() + START_S
    while not (run.directory / "replay").exists():
        assert run.process.poll() is None, run.output()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    # The port was free when the run tried it; somebody else is faster.
    with socket.create_server(("127.0.0.1", port)):
        assert run.process.wait(START_S) == 2, run.output()
    assert "in use" in run.output() and "Traceback" not in run.output()
    assert run.of_it() == []
    assert not run.directory.exists()


def test_two_runs_side_by_side_share_no_port_key_directory_or_process(start) -> None:  # type: ignore[no-untyped-def]
    first = start("--steps", FOREVER, "--seed", "1", name="one")
    first.wait_for(training, START_S)
    second = start("--steps", FOREVER, "--seed", "2", name="two")
    second.wait_for(training, START_S)
    first.note_members()
    assert not first.members.keys() & second.members.keys()
    ports = [{port for _, port in _listening(run)} for run in (first, second)]
    assert ports[0] and ports[1] and not ports[0] & ports[1]
    marks = [{_environment(p).get(MARK) for p in run.members.values()} for run in (first, second)]
    assert not (marks[0] & marks[1]) - {None}
    below = [_directories(run) for run in (first, second)]
    assert below[0] and below[1] and not below[0] & below[1]
    # What one run does is no business of the other: it goes on when the first one ends.
    first.process.send_signal(signal.SIGTERM)
    assert first.process.wait(END_S) == 143, first.output()
    assert first.left(1.0) == []
    updates = int(str(second.status()["updates"]))
    second.wait_for(lambda status: int(str(status["updates"])) > updates + 5, START_S)
    names = {row["actor"] for row in read_rows(second.directory / "scores.jsonl")}
    assert second.status()["metrics_port"] in ports[1] and names


def _listening(run: Run) -> set[tuple[str, int]]:
    """Return where the processes of a run listen on TCP."""
    found = set()
    for process in [psutil.Process(run.process.pid), *run.members.values()]:
        try:
            for socket in process.net_connections("tcp"):
                if socket.status == psutil.CONN_LISTEN:
                    found.add((str(socket.laddr.ip), int(socket.laddr.port)))
        except psutil.Error:
            continue
    return found


def _directories(run: Run) -> set[str]:
    """Return the folders below which a run writes: its own, and the temporary one of its Ray."""
    found = {str(run.directory)}
    for process in run.members.values():
        try:
            names = [file.path for file in process.open_files()]
        except psutil.Error:
            continue
        found |= {name.split("/session_")[0] for name in names if "dreamfleet-ray-" in name}
    return found


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:
        return {}
