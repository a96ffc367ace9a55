"""One service of docker-compose.yml, run by this machine's own programs in namespaces.

What Docker would do and this does: a network of its own, names that resolve, a root that cannot be
written, the listed secrets, volumes and temporary file systems, processes that end with their first
one, and (for root) the service's user without capabilities. What it does not do: the image's files
(those of this machine stand for them), limits of memory and CPU, and Docker's own name server.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import psutil

from deploy.rehearse.compose import ROOT, RehearsalError, Service, image_environment

START_TIMEOUT_S = 20.0
NAMESPACES = ("--net", "--mount", "--pid", "--fork", "--uts", "--ipc", "--kill-child=SIGKILL")
STAND_INS: dict[str, Mapping[str, tuple[str, ...]]] = {
    "redis": {
        "/shim/valkey-server": ("valkey-server", "redis-server"),
        "/shim/valkey-cli": ("valkey-cli", "redis-cli"),
    },
    "prometheus": {"/shim/prometheus": ("prometheus",)},
    "redis-exporter": {"/redis_exporter": ("redis_exporter", "prometheus-redis-exporter")},
    "grafana": {"/run.sh": ("grafana-server",)},
}
"""Programs of an image by where the image has them: names under which a machine may have them."""
_CLI = """\
#!{python}
# Stands for valkey-cli, of which a health check uses nothing but `--user NAME ping`.
import os, sys, redis
client = redis.Redis(username=sys.argv[2], password=os.environ["REDISCLI_AUTH"], socket_timeout=4)
sys.stdout.write("PONG" if client.ping() else "")
"""


def missing_programs(service: Service) -> list[str]:
    """Return the programs that a service needs and this machine lacks."""
    if service.ours:
        return []
    found = programs(service)
    wanted = STAND_INS.get(service.name)
    if wanted is None:
        return [service.image]
    return [" or ".join(names) for path, names in wanted.items() if path not in found]


def programs(service: Service) -> dict[str, str]:
    """Return this machine's program for each of the service's that it has."""
    from replay_service.server import find_binary

    found = {}
    for path, names in STAND_INS.get(service.name, {}).items():
        places = [shutil.which(name) for name in names]
        if "valkey-server" in names:
            places.insert(0, find_binary())
        if place := next(filter(None, places), None):
            found[path] = place
        elif "valkey-cli" in names:
            found[path] = ""
    return found


class Container:
    """A service's process with everything around it; it can be started again after it has ended.

    Args:
        service: what to run.
        number: which replica.
        directory: for its description, log and mount point.
        addresses: its address in each of its networks.
        hosts: names and addresses for /etc/hosts.
    """

    def __init__(
        self,
        service: Service,
        number: int,
        directory: Path,
        addresses: Mapping[str, str],
        hosts: Sequence[tuple[str, str]],
    ) -> None:
        self.service, self.name = service, f"{service.name}-{number}"
        self.addresses, self._hosts = addresses, hosts
        self._directory = directory
        self._process: subprocess.Popen[str] | None = None
        self._log: TextIO | None = None
        self.started_at = 0.0
        self.stuck = ""
        """What still ran when it had to be killed."""
        (directory / "root").mkdir(parents=True)

    @property
    def log_path(self) -> Path:
        """What it has written to its standard output and error."""
        return self._directory / "log"

    @property
    def exit_code(self) -> int | None:
        """Exit code of the command, None while it runs or before it was started."""
        return None if self._process is None else self._process.poll()

    @property
    def running(self) -> bool:
        """Whether the command runs."""
        return self._process is not None and self._process.poll() is None

    def start(self, bridges: Mapping[str, str], gateways: Mapping[str, str]) -> None:
        """Start the command. Blocks until its network is there.

        Args:
            bridges: name of the bridge of each network.
            gateways: address of the way out of each network that has one.

        Raises:
            RehearsalError: its namespaces cannot be made.
        """
        spec = self._directory / "spec.json"
        spec.write_text(json.dumps(self._describe()))
        if self._log is None:
            self._log = self.log_path.open("a")
        self._process = subprocess.Popen(
            ["unshare", *NAMESPACES, sys.executable, "-m", "deploy.rehearse.inside", str(spec)],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        self.started_at = time.monotonic()
        self._connect(bridges, gateways)
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.close()

    def healthy(self) -> tuple[bool, str]:
        """Run the health check once; returns whether it is well, and what it said."""
        health, inner = self.service.health, self._inner()
        if not self.running or inner is None:
            return False, "it does not run"
        if health is None:
            return True, ""
        try:
            done = subprocess.run(
                [*self._enter(inner), *self._prefix(), *health.test],
                capture_output=True,
                text=True,
                timeout=health.timeout_s,
                env=self._environment(),
            )
        except subprocess.TimeoutExpired:
            return False, f"its health check took longer than {health.timeout_s:.0f} s"
        return done.returncode == 0, (done.stdout + done.stderr).strip()[-500:]

    def kill(self) -> None:
        """End it as `docker kill` does: every process at once, without a word."""
        assert self._process is not None
        inner = self._inner()
        self._process.kill()
        if inner is not None and inner.is_running():
            inner.kill()
        self._process.wait(START_TIMEOUT_S)

    def stop(self) -> int:
        """End it as `docker stop` does, and return its exit code; killed ones give 137."""
        if self._process is None:
            return 0
        inner = self._inner()
        if inner is not None and self.running:
            inner.send_signal(signal.SIGTERM)
            try:
                self._process.wait(self.service.stop_grace_s)
            except subprocess.TimeoutExpired:
                self.stuck = _states(inner)
                self.kill()
        if self._log is not None:
            self._log.close()
            self._log = None
        code = self._process.wait(START_TIMEOUT_S)
        return 128 - code if code < 0 else code

    def tail(self, lines: int = 15) -> str:
        """Return the end of its log."""
        if not self.log_path.exists():
            return ""
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-lines:])

    def _inner(self) -> psutil.Process | None:
        """Return the first process inside: the only child of the one that made the namespaces."""
        assert self._process is not None
        try:
            children = psutil.Process(self._process.pid).children()
        except psutil.Error:
            return None
        return children[0] if children else None

    def _enter(self, inner: psutil.Process) -> list[str]:
        return ["nsenter", "-t", str(inner.pid), "-n", "-m", "-p", "-u", "-i", "-r", "-w"]

    def _connect(self, bridges: Mapping[str, str], gateways: Mapping[str, str]) -> None:
        assert self._process is not None
        pid = self._process.pid
        mine = os.stat("/proc/self/ns/net").st_ino
        deadline = time.monotonic() + START_TIMEOUT_S
        while _network_of(pid) in (mine, 0):
            if not self.running or time.monotonic() > deadline:
                raise RehearsalError(f"{self.name}: no namespaces: {self.tail()}")
            time.sleep(0.01)
        inside = ["nsenter", "-t", str(pid), "-n"]
        command(*inside, "ip", "link", "set", "lo", "up")
        for index, (network, address) in enumerate(self.addresses.items()):
            here, there = f"v{pid}-{index}", f"eth{index}"
            # As Docker's, the link's address follows from the network's: to one that is new after
            # every start the others would send into the void until their caches are too old.
            link = "02:42:" + ":".join(f"{int(part):02x}" for part in address.split("."))
            peer = ["peer", "name", there, "address", link, "netns", str(pid)]
            command("ip", "link", "add", here, "type", "veth", *peer)
            command("ip", "link", "set", here, "master", bridges[network], "up")
            command(*inside, "ip", "addr", "add", f"{address}/24", "dev", there)
            command(*inside, "ip", "link", "set", there, "up")
            if network in gateways:
                command(*inside, "ip", "route", "replace", "default", "via", gateways[network])

    def _prefix(self) -> list[str]:
        """Return what changes to the service's user; only root here can be somebody else there."""
        if os.environ.get("DREAMFLEET_REHEARSAL_ROOT") != "1":
            return []
        uid, _, gid = self.service.user.partition(":")
        words = ["setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups"]
        return [*words, "--no-new-privs", "--inh-caps=-all", "--bounding-set=-all"]

    def _environment(self) -> dict[str, str]:
        image = image_environment()
        if self.service.ours:
            image["CXX"] = "the-cpu-image-has-none"
        else:
            image = {"PATH": f"/shim:{image['PATH']}", "HOME": "/tmp"}
        return {**image, **self.service.environment, "HOSTNAME": self.name}

    def _describe(self) -> dict[str, Any]:
        service = self.service
        hosts = ["127.0.0.1 localhost", "::1 localhost"]
        hosts += [f"{address} {name}" for name, address in self._hosts]
        hosts += [f"{address} {self.name}" for address in self.addresses.values()]
        files = {"/etc/hosts": "\n".join(hosts) + "\n", "/etc/resolv.conf": ""}
        files["/etc/hostname"] = f"{self.name}\n"
        links = {}
        for path, program in programs(service).items():
            if program:
                links[path] = program
            else:
                files[path] = _CLI.format(python=sys.executable)
        files[f"{'/app' if service.ours else '/shim'}/.keep"] = ""
        binds = {
            f"/run/secrets/{name}": (str(path), True) for name, path in service.secrets.items()
        }
        binds |= {path: (str(source), ro) for path, (source, ro) in service.volumes.items()}
        return {
            "root": str(self._directory / "root"),
            "hostname": self.name,
            "shared": list(dict.fromkeys([str(ROOT), sys.prefix, sys.base_prefix])),
            "shm_size_bytes": service.shm_size_bytes,
            "files": files,
            "links": links,
            "tmpfs": list(service.tmpfs),
            "binds": binds,
            "directory": "/app" if service.ours else "/",
            "prefix": self._prefix(),
            "words": list(service.words),
            "environment": self._environment(),
        }


def command(*words: str) -> None:
    """Run a program of this machine. Raises RehearsalError with what it said if it fails."""
    done = subprocess.run(words, capture_output=True, text=True, timeout=START_TIMEOUT_S)
    if done.returncode:
        raise RehearsalError(f"{' '.join(words)}: {done.stderr.strip()}")


def _states(first: psutil.Process) -> str:
    """Return what a process and those below it do, as the kernel says it."""
    found = []
    try:
        for process in [first, *first.children(recursive=True)]:
            waits = Path(f"/proc/{process.pid}/wchan").read_text()
            found.append(f"{process.name()} {process.status()} {waits}")
    except (psutil.Error, OSError):
        found.append("one that has just ended")
    return ", ".join(found)


def _network_of(pid: int) -> int:
    try:
        return os.stat(f"/proc/{pid}/ns/net").st_ino
    except OSError:
        return 0
