"""The examples run, with nothing but the libraries that they name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from replay_service import EmbeddedServer, Mirror, ReplayClient, ServerLog, check_server
from tests.replay_service.records import absorb_until

ROOT = Path(__file__).parents[2]
WRITER = ROOT / "examples" / "write_chunks.py"
ONLY = ("numpy", "msgpack", "redis", "replay_service")
RUNNER = """
import json, runpy, sys

class Fence:
    asked = set()

    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in sys.stdlib_module_names or top in ALLOWED:
            return None
        self.asked.add(top)
        raise ImportError(f"{name} is not installed here")

ALLOWED, script, *arguments = json.loads(sys.argv[1])
before = {name.partition(".")[0] for name in sys.modules}
sys.meta_path.insert(0, Fence())
for name in ("torch", "ray", "zstandard", "hiredis"):
    try:
        __import__(name)
    except ImportError:
        continue
    raise AssertionError(f"{name} could be imported")
sys.argv = [script, *arguments]
runpy.run_path(script, run_name="__main__")
# Extension modules leave bookkeeping behind that comes from no file.
loaded = {n.partition(".")[0] for n, m in sys.modules.items() if getattr(m, "__file__", None)}
loaded -= before
print(json.dumps(sorted(loaded - sys.stdlib_module_names)))
"""


def test_chunks_are_written_with_numpy_msgpack_and_redis_alone(
    server: EmbeddedServer, client: ReplayClient
) -> None:
    for written in (300, 600):
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                RUNNER,
                json.dumps([ONLY, str(WRITER), server.url, "300"]),
            ],
            cwd="/",
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == sorted(ONLY)
        report = check_server(client)
        assert report.ok and report.steps == written
    assert {sid: s.steps for sid, s in report.streams.items()} == {
        "robot-7@1": 300,
        "robot-7@2": 300,
    }


def run_outside(*command: str | Path) -> str:
    """Run a command that must not see this environment's packages; return what it prints."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd="/",
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment made with the commands that the example names."""
    directory = tmp_path_factory.mktemp("robot")
    venv.create(directory / "venv", with_pip=True)
    python = directory / "venv" / "bin" / "python"
    # Building writes next to the source: from a copy of what a checkout has.
    skipped = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.egg-info", "__pycache__")
    source = shutil.copytree(ROOT, directory / "source", ignore=skipped)
    pip = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    locked = ("-c", ROOT / "constraints.txt")
    run_outside(*pip, *locked, "numpy", "msgpack", "redis")
    run_outside(*pip, "--no-deps", source)
    shutil.rmtree(source)
    return python


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_example_runs_in_an_environment_that_has_nothing_else(
    bare_python: Path, server: EmbeddedServer, client: ReplayClient
) -> None:
    find = "import importlib.util as u, sys; print([n for n in sys.argv[1:] if u.find_spec(n)])"
    absent = ("torch", "ray", "gymnasium", "zstandard", "hiredis", "isal", "prometheus_client")
    assert run_outside(bare_python, "-c", find, *ONLY, *absent) == str(list(ONLY))
    home = run_outside(bare_python, "-c", "import replay_service; print(replay_service.__file__)")
    assert Path(home).is_relative_to(bare_python.parents[1])
    run_outside(bare_python, WRITER, server.url, "450")
    report = check_server(client)
    assert report.ok and {sid: s.steps for sid, s in report.streams.items()} == {"robot-7@1": 450}
    mirror = Mirror(
        ServerLog(client), client.schema(), capacity_steps=600, window_steps=8, placement="ram"
    )
    mirror.start()
    absorb_until(mirror, lambda: mirror.caught_up)
    mirror.stop()
    ((sid, first, rows),) = mirror.held()
    assert (sid, first, len(rows)) == ("robot-7@1", 0, 450)
    position = mirror.columns["position"][rows].tolist()
    assert position == [[step % 200] * 3 for step in range(450)]
    assert mirror.columns["is_first"][rows].nonzero().flatten().tolist() == [0, 200, 400]
