"""The examples run, with nothing but the libraries that they name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from replay_service import EmbeddedServer, ReplayClient, check_server

ROOT = Path(__file__).parents[2]
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
    script = ROOT / "examples" / "write_chunks.py"
    for written in (300, 600):
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                RUNNER,
                json.dumps([ONLY, str(script), server.url, "300"]),
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
