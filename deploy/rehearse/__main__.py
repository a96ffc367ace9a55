"""`make rehearse`: everything in docker-compose.yml, on this machine, without Docker.

The outer process makes passwords and settings with the script that `make secrets` runs, then starts
itself again in namespaces that end with it; afterwards it looks whether anything is left.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from deploy.rehearse.compose import ROOT, RehearsalError, load_project
from deploy.rehearse.rehearsal import Rehearsal, say, table
from deploy.sentinel import MARK, end_members, members

SETTINGS = {
    # Enough for the whole rehearsal: the run must not reach its end before it.
    "TRAIN_ARGS": "--steps 2000000 --learner.checkpoint-every-s 20",
    "ACTORS": "2",
    "ACTOR_SLOTS": "2",
    "ACTOR_CPUS": "2",
    "LEARNER_THREADS": "1",
    "OBJECT_STORE_BYTES": "100000000",
    "REDIS_MEMORY_BYTES": "536870912",
}
JOBS = {
    "prometheus": "prometheus",
    "redis": "redis-exporter",
    "ray": "ray-head",
    "dreamfleet": "replay",
}
"""Jobs of Prometheus that must have a target each, and the services that they are about."""
MOST_S = 1800.0


def main() -> int:
    """Rehearse, and return 0 if everything did what it should."""
    parser = argparse.ArgumentParser(prog="make rehearse", description=__doc__)
    parser.add_argument("--no-kill", action="store_true", help="kill nothing")
    parser.add_argument("--nodes", type=int, default=1, help="containers of the service actors")
    parser.add_argument("--keep", action="store_true", help="keep logs and data, and say where")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside is not None:
        return rehearse(options.inside, options.nodes, not options.no_kill)
    # What a signal to this process ends must end everything inside, too.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        return outside(options)
    except RehearsalError as error:
        say(f"the rehearsal cannot begin: {error}")
        return 2


def outside(options: argparse.Namespace) -> int:
    """Prepare, start the rehearsal in namespaces of its own, and see that nothing is left."""
    for program in ("unshare", "nsenter", "ip", "mount"):
        if shutil.which(program) is None:
            raise RehearsalError(f"{program} is not installed (packages util-linux and iproute2)")
    directory = Path(tempfile.mkdtemp(prefix="dreamfleet-rehearsal-"))
    directory.chmod(0o755)
    try:
        prepare(directory)
        mark = directory.name
        root = os.geteuid() == 0
        user = [] if root else ["--user", "--map-root-user"]
        words = ["unshare", *user, "--net", "--mount", "--pid", "--fork", "--mount-proc"]
        words += ["--kill-child=SIGKILL", sys.executable, "-m", "deploy.rehearse"]
        words += ["--inside", str(directory), "--nodes", str(options.nodes)]
        words += ["--no-kill"] if options.no_kill else []
        env = {**os.environ, MARK: mark, "DREAMFLEET_REHEARSAL_ROOT": "1" if root else "0"}
        begin = time.monotonic()
        try:
            code = subprocess.run(words, cwd=ROOT, env=env, timeout=MOST_S).returncode
        except subprocess.TimeoutExpired:
            say(f"the rehearsal took longer than {MOST_S:.0f} s")
            code = 1
        left = members(mark)
        if left:
            say("left behind: " + ", ".join(f"{process.pid}" for process in left))
            end_members(mark, grace_s=0.0)
            code = 1
        verdict = "passed" if code == 0 else "FAILED"
        took = time.monotonic() - begin
        say(f"rehearsal {verdict} after {took:.0f} s; processes left: {len(left)}")
        return code
    finally:
        if options.keep:
            say(f"logs and data: {directory}")
        else:
            shutil.rmtree(directory, ignore_errors=True)


def prepare(directory: Path) -> None:
    """Make .env, secrets and data directories, with the script that `make secrets` runs."""
    (directory / "deploy").symlink_to(ROOT / "deploy")
    text = (ROOT / ".env.example").read_text()
    for name, value in SETTINGS.items():
        text, count = re.subn(rf"(?m)^{name}=.*$", f"{name}={value}", text)
        if count != 1:
            raise RehearsalError(f".env.example has no line {name}=…")
    (directory / ".env.example").write_text(text)
    program = directory / "dreamfleet"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m deploy.cli "$@"\n')
    program.chmod(0o755)
    done = subprocess.run(
        [str(ROOT / "deploy/docker/prepare.sh"), str(program)],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    if done.returncode:
        raise RehearsalError(f"deploy/docker/prepare.sh: {done.stderr.strip()}")


def rehearse(directory: Path, nodes: int, kill: bool) -> int:
    """Run everything, inside of the namespaces."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True, timeout=10)
    subprocess.run(["mount", "--make-rprivate", "/"], check=True, timeout=10)
    project = load_project(directory, "cpu")
    play = Rehearsal(
        project, directory / "containers", directory / "compose-data", "v3-cartpole-0", nodes
    )
    for name, reason in play.skipped.items():
        say(f"{name:<18} left out: {reason}")
    play.expected_jobs = frozenset(JOBS) - {
        job for job, service in JOBS.items() if service in play.skipped
    }
    begin, passed = time.monotonic(), False
    try:
        with play.running():
            facts = play.await_update()
            play.timings["start to first update"] = time.monotonic() - begin
            say(f"first update at {facts['env_steps']} environment steps")
            play.await_health()
            say("every health check is well")
            if "prometheus" not in play.skipped:
                targets = play.await_targets()
                play.timings["start to every target scraped"] = time.monotonic() - begin
                say("targets up: " + ", ".join(sorted(targets)))
                count = play.await_dashboards()
                play.timings["start to data in every dashboard"] = time.monotonic() - begin
                say(f"{count} queries of the dashboards return data")
            if kill:
                for name in play.names:
                    took = play.kill_and_await(name)
                    play.timings[f"{name} killed, and training again"] = took
                    say(f"{name:<18} killed, back after {took:6.1f} s")
            passed = True
    except RehearsalError as error:
        say(f"{error}\n{play.troubles()}")
    codes = play.take_down()
    say("exit codes: " + ", ".join(f"{name} {code}" for name, code in codes.items()))
    # 137 was killed after its grace; the learner must have obeyed the signal (128 + 15) and saved.
    wrong = [name for name, code in codes.items() if code == 137]
    wrong += [name for name, code in codes.items() if name == "learner-1" and code not in (0, 143)]
    if wrong:
        say(f"did not stop in time or as it should: {', '.join(wrong)}")
    say(table(play.timings))
    return 0 if passed and not wrong else 1


if __name__ == "__main__":
    sys.exit(main())
