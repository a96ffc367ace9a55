"""docker-compose.yml as data: what docker-compose itself makes of the file, and the Dockerfile."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
CONFIG_TIMEOUT_S = 60.0
_UNITS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


class RehearsalError(RuntimeError):
    """The rehearsal cannot begin, or something did not do what it should; the message says what."""


@dataclass(frozen=True, kw_only=True)
class Health:
    """When a service counts as healthy."""

    test: tuple[str, ...]
    """Command, run inside of the container; exit code 0 is well."""
    interval_s: float
    """Seconds between two checks."""
    start_interval_s: float
    """The same until the first that is well."""
    timeout_s: float
    """Seconds that a check may take."""
    retries: int
    """Checks that fail in a row before the service counts as unhealthy."""
    start_period_s: float
    """Seconds in which failures do not count."""


@dataclass(frozen=True, kw_only=True)
class Service:
    """What Docker would be told about one service."""

    name: str
    image: str
    words: tuple[str, ...]
    """Entrypoint and command."""
    environment: Mapping[str, str]
    user: str
    networks: tuple[str, ...]
    secrets: Mapping[str, Path]
    """Files of this machine by name below /run/secrets."""
    volumes: Mapping[str, tuple[Path, bool]]
    """Path in the container: path here, and whether it may only be read."""
    tmpfs: tuple[str, ...]
    shm_size_bytes: int
    needs: tuple[str, ...]
    """Services that must be healthy first."""
    health: Health | None
    restart: str
    stop_grace_s: float

    @property
    def ours(self) -> bool:
        """Whether its image is built from this tree."""
        return self.image.rpartition("/")[2].startswith("dreamfleet:")


@dataclass(frozen=True, kw_only=True)
class Project:
    """All services of a profile, and their networks."""

    services: Mapping[str, Service]
    networks: Mapping[str, bool]
    """Name: whether it has no way out."""

    def in_order(self) -> list[Service]:
        """Return the services so that each comes after all that it needs."""
        done: dict[str, Service] = {}

        def add(name: str) -> None:
            service = self.services[name]
            for needed in service.needs:
                if needed not in done:
                    add(needed)
            done.setdefault(name, service)

        for name in self.services:
            add(name)
        return list(done.values())


def load_project(directory: Path, profile: str) -> Project:
    """Have docker-compose resolve the file against a directory with .env and secrets.

    Raises:
        RehearsalError: docker-compose is missing, or refuses the file.
    """
    program = _program("docker-compose")
    words = [program, "--project-directory", str(directory), "--env-file", str(directory / ".env")]
    words += ["-f", str(ROOT / "docker-compose.yml"), "--profile", profile]
    clean = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME")}
    done = subprocess.run(
        [*words, "config", "--format", "json"],
        capture_output=True,
        text=True,
        timeout=CONFIG_TIMEOUT_S,
        env=clean,
    )
    if done.returncode:
        raise RehearsalError(f"docker-compose refuses docker-compose.yml: {done.stderr.strip()}")
    data = json.loads(done.stdout)
    secrets = {name: Path(entry["file"]) for name, entry in data["secrets"].items()}
    return Project(
        services={name: _service(name, entry, secrets) for name, entry in data["services"].items()},
        networks={name: bool(entry.get("internal")) for name, entry in data["networks"].items()},
    )


def image_environment(target: str = "runtime") -> dict[str, str]:
    """Return the ENV of our images up to a stage, with this virtual environment for theirs."""
    text = (ROOT / "deploy/docker/Dockerfile").read_text().replace("\\\n", " ")
    stages: dict[str, dict[str, str]] = {}
    current: dict[str, str] = {}
    for line in text.splitlines():
        if start := re.match(r"FROM (\S+) AS (\S+)", line):
            current = dict(stages.get(start[1], {}))
            stages[start[2]] = current
        elif line.startswith("ENV "):
            current.update(re.findall(r"(\w+)=(\S+)", line))
    here = f"{sys.prefix}/bin:/usr/local/bin:/usr/bin:/bin"
    return {**stages[target], "PATH": here, "PYTHONPATH": str(ROOT)}


def seconds(text: str) -> float:
    """Return a duration as docker-compose writes it (1m30s) in seconds."""
    parts = re.findall(r"([\d.]+)(ns|us|ms|h|m|s)", text)
    return sum(float(number) * _UNITS[unit] for number, unit in parts)


def _service(name: str, entry: Mapping[str, Any], secrets: Mapping[str, Path]) -> Service:
    volumes = {
        volume["target"]: (Path(volume["source"]), bool(volume.get("read_only")))
        for volume in entry.get("volumes", [])
    }
    # The file's own $$ has become $ for the container only when Docker gets it.
    words = [*(entry.get("entrypoint") or []), *(entry.get("command") or [])]
    return Service(
        name=name,
        image=entry["image"],
        words=tuple(word.replace("$$", "$") for word in words),
        environment={key: str(value) for key, value in entry.get("environment", {}).items()},
        user=entry["user"],
        networks=tuple(entry.get("networks", {})),
        secrets={
            secret.get("target", secret["source"]).rpartition("/")[2]: secrets[secret["source"]]
            for secret in entry.get("secrets", [])
        },
        volumes=volumes,
        tmpfs=tuple(entry.get("tmpfs", [])),
        shm_size_bytes=int(entry.get("shm_size", 2**26)),
        needs=tuple(entry.get("depends_on", {})),
        health=_health(entry.get("healthcheck")),
        restart=entry.get("restart", "no"),
        stop_grace_s=seconds(entry.get("stop_grace_period", "10s")),
    )


def _health(entry: Mapping[str, Any] | None) -> Health | None:
    if entry is None:
        return None
    kind, *rest = entry["test"]
    words = ["/bin/sh", "-c", *rest] if kind == "CMD-SHELL" else rest
    interval = seconds(entry.get("interval", "30s"))
    return Health(
        test=tuple(word.replace("$$", "$") for word in words),
        interval_s=interval,
        start_interval_s=min(seconds(entry.get("start_interval", "5s")), interval),
        timeout_s=seconds(entry.get("timeout", "30s")),
        retries=int(entry.get("retries", 3)),
        start_period_s=seconds(entry.get("start_period", "0s")),
    )


def _program(name: str) -> str:
    found = shutil.which(name, path=f"{sys.prefix}/bin{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None:
        raise RehearsalError(f"{name} is not installed here: run `make setup`, which brings it")
    return found
