"""The rehearsal itself: start in order, watch, check, kill each part once, take everything down."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deploy.progress import console
from deploy.rehearse.compose import ROOT, Project, RehearsalError, Service
from deploy.rehearse.container import Container, command, missing_programs

SUBNET = "10.213"
RESTART_DELAY_S = 1.0
BACK_TIMEOUT_S = 300.0
"""Time in which a service that was killed must be healthy again, and training go on."""
TRAINING_TIMEOUT_S = 300.0
SCRAPE_TIMEOUT_S = 120.0
SILENT = ("DCGM_", "dreamer_actor_restarts_total")
"""Metrics that a run without a GPU and without trouble has not."""
TRAINS = "learner"


@dataclass
class Watched:
    """A container and what its health checks have said."""

    container: Container
    health: str = "starting"
    failures: int = 0
    said: str = ""
    wanted: bool = True
    restarts: int = 0
    healthy_after_s: float = 0.0
    watcher: threading.Thread | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


class Rehearsal:
    """Everything of a project, on one machine.

    Args:
        project: what docker-compose made of the file.
        directory: for descriptions and logs.
        data: what DATA_DIR is here.
        run: name of the run below it.
        scale: containers of the service `actors`.
    """

    def __init__(
        self, project: Project, directory: Path, data: Path, run: str, scale: int = 1
    ) -> None:
        self._project, self._run = project, data / "runs" / run
        self._stopping = threading.Event()
        self._bridges = {name: f"df{index}" for index, name in enumerate(project.networks)}
        self._gateways = {
            name: f"{SUBNET}.{index}.1"
            for index, (name, internal) in enumerate(project.networks.items())
            if not internal
        }
        self.skipped: dict[str, str] = {}
        self.timings: dict[str, float] = {}
        self.expected_jobs = frozenset[str]()
        self._watched = self._containers(directory, scale)

    def _containers(self, directory: Path, scale: int) -> dict[str, Watched]:
        places: list[tuple[Service, int, dict[str, str]]] = []
        for service in self._project.in_order():
            if missing := missing_programs(service):
                self.skipped[service.name] = f"this machine has no {', '.join(missing)}"
                continue
            for number in range(1, (scale if service.name == "actors" else 1) + 1):
                host = 10 + len(places)
                networks = list(self._project.networks)
                addresses = {
                    name: f"{SUBNET}.{networks.index(name)}.{host}" for name in service.networks
                }
                places.append((service, number, addresses))
        found = {}
        for service, number, addresses in places:
            hosts = [
                (other.name, theirs[shared[0]])
                for other, _, theirs in places
                if (shared := [name for name in theirs if name in addresses])
            ]
            name = f"{service.name}-{number}"
            found[name] = Watched(Container(service, number, directory / name, addresses, hosts))
        return found

    @contextmanager
    def running(self) -> Iterator[Rehearsal]:
        """Start everything, in the order of its dependencies; take it down afterwards."""
        for index, (name, bridge) in enumerate(self._bridges.items()):
            command("ip", "link", "add", bridge, "type", "bridge")
            command("ip", "addr", "add", f"{SUBNET}.{index}.1/24", "dev", bridge)
            command("ip", "link", "set", bridge, "up")
            assert name in self._project.networks
        begin = time.monotonic()
        try:
            for watched in self._watched.values():
                self._await_needed(watched.container.service)
                self._start(watched)
                say(f"{watched.container.name:<18} started {time.monotonic() - begin:6.1f} s")
            yield self
        finally:
            self._stopping.set()

    def await_health(self) -> None:
        """Wait until every health check is well. Raises RehearsalError, with the log, if not."""
        for name, watched in self._watched.items():
            self._await(
                lambda watched=watched: watched.health == "healthy",  # type: ignore[misc]
                BACK_TIMEOUT_S,
                f"{name} is not healthy",
                watched,
            )
            self.timings[f"{name} healthy, from its start"] = watched.healthy_after_s

    def await_update(self) -> dict[str, Any]:
        """Wait for the first update of the agent, and return the learner's status."""
        learner = self._watched[f"{TRAINS}-1"]
        self._await(
            lambda: self.status().get("updates", 0) > 0,
            TRAINING_TIMEOUT_S,
            "there was no update",
            learner,
        )
        return self.status()

    def status(self) -> dict[str, Any]:
        """Return the learner's last status, empty before the first."""
        try:
            found: dict[str, Any] = json.loads((self._run / "status.json").read_text())
        except (OSError, ValueError):
            return {}
        return found

    def await_targets(self) -> dict[str, str]:
        """Wait until Prometheus has scraped every target that it knows; {job instance: health}."""
        targets: dict[str, str] = {}
        # They are in the list of the replay service once they have entered themselves; an actor has
        # no role there, but in its metrics.
        roles = {"replay", "learner", ""} if "dreamfleet" in self.expected_jobs else set[str]()

        def all_up() -> bool:
            answer = self.ask_prometheus("/api/v1/targets?state=active")
            targets.clear()
            seen = set[str]()
            for target in answer.get("data", {}).get("activeTargets", []):
                labels = target["labels"]
                if labels.get("job") not in self.expected_jobs:
                    continue
                if labels["job"] == "dreamfleet":
                    seen.add(labels.get("role", ""))
                name = f"{labels.get('job')} {labels.get('instance')}"
                targets[name] = target["health"] + (f" {target['lastError']}"[:200]).rstrip()
            jobs = {name.split()[0] for name in targets}
            there = self.expected_jobs <= jobs and roles <= seen
            return there and bool(targets) and {*targets.values()} == {"up"}

        try:
            self._await(all_up, SCRAPE_TIMEOUT_S, "not every target is up", None)
        except RehearsalError as error:
            raise RehearsalError(f"{error}: {targets}, expected {self.expected_jobs}") from error
        return targets

    def await_dashboards(self) -> int:
        """Wait until every query of every dashboard but `SILENT` returns data; say how many do."""
        boards = ROOT / "deploy" / "grafana" / "provisioning" / "dashboards"
        wanted = {
            target["expr"].replace("$run", ".*")
            for path in sorted(boards.glob("*.json"))
            for panel in json.loads(path.read_text())["panels"]
            for target in panel["targets"]
            if not any(name in target["expr"] for name in SILENT)
        }
        empty = set(wanted)

        def all_answered() -> bool:
            for query in sorted(empty):
                words = urllib.parse.urlencode({"query": query})
                found = self.ask_prometheus(f"/api/v1/query?{words}")
                if found.get("data", {}).get("result"):
                    empty.discard(query)
            return not empty

        try:
            self._await(all_answered, SCRAPE_TIMEOUT_S, "dashboards have panels without data", None)
        except RehearsalError as error:
            raise RehearsalError(f"{error}: {sorted(empty)}") from error
        return len(wanted)

    def ask_prometheus(self, path: str) -> dict[str, Any]:
        """Return what Prometheus answers, empty if it does not."""
        return self.fetch_json("prometheus", 9090, path)

    def fetch_json(self, service: str, port: int, path: str) -> dict[str, Any]:
        """Return what a service answers at a path, empty if it does not."""
        watched = self._watched.get(f"{service}-1")
        if watched is None:
            return {}
        address = watched.container.addresses["control"]
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(f"http://{address}:{port}{path}", timeout=5.0) as answer:
                found: dict[str, Any] = json.load(answer)
        except (urllib.error.URLError, OSError, ValueError):
            return {}
        return found

    @property
    def names(self) -> list[str]:
        """Names of the containers, in the order in which they were started."""
        return list(self._watched)

    def kill_and_await(self, name: str) -> float:
        """Kill a container; return the seconds until all are healthy and training goes on."""
        watched = self._watched[name]
        before = self.status()
        begin, restarts = time.monotonic(), watched.restarts
        watched.container.kill()
        with watched.lock:
            watched.health = "starting"

        def back() -> bool:
            return watched.restarts > restarts and all(
                other.health == "healthy" for other in self._watched.values()
            )

        self._await(back, BACK_TIMEOUT_S, f"{name} did not come back", watched)
        learner = self._watched[f"{TRAINS}-1"]
        steps = self.status()

        def goes_on() -> bool:
            now = self.status()
            same = now.get("pid") == steps.get("pid")
            return bool(now) and (
                not same
                or (
                    now["updates"] > steps.get("updates", 0)
                    and now["env_steps"] > steps["env_steps"]
                )
            )

        self._await(goes_on, BACK_TIMEOUT_S, f"training did not go on after {name}", learner)
        after = self.status()
        if name.startswith(TRAINS) and after["env_steps"] < before["env_steps"]:
            raise RehearsalError(
                f"the learner came back at {after['env_steps']} steps, and was at "
                f"{before['env_steps']}"
            )
        return time.monotonic() - begin

    def take_down(self) -> dict[str, int]:
        """Stop everything as `docker compose down` does; returns the exit codes."""
        self._stopping.set()
        codes = {}
        for name, watched in reversed(self._watched.items()):
            watched.wanted = False
            if watched.watcher is not None:
                watched.watcher.join(60.0)
            codes[name] = watched.container.stop()
            if watched.container.stuck:
                say(f"{name} was killed after its grace: {watched.container.stuck}")
        return codes

    def troubles(self) -> str:
        """Return the state and the last words of every container that is not well."""
        return "\n".join(
            f"--- {name} is {watched.health} ({watched.said})\n{watched.container.tail()}"
            for name, watched in self._watched.items()
            if watched.health != "healthy"
        )

    def _await_needed(self, service: Service) -> None:
        for needed in service.needs:
            for name, watched in self._watched.items():
                if watched.container.service.name == needed:
                    self._await(
                        lambda watched=watched: watched.health == "healthy",  # type: ignore[misc]
                        BACK_TIMEOUT_S,
                        f"{service.name} needs {name}, which is not healthy",
                        watched,
                    )

    def _start(self, watched: Watched) -> None:
        watched.container.start(self._bridges, self._gateways)
        if watched.watcher is None:
            watched.watcher = threading.Thread(target=self._watch, args=(watched,), daemon=True)
            watched.watcher.start()

    def _watch(self, watched: Watched) -> None:
        """Check one container's health, and start it again when it has ended, as Docker would."""
        health = watched.container.service.health
        while not self._stopping.is_set():
            if not watched.container.running and watched.wanted:
                self._restart(watched)
                continue
            well, said = watched.container.healthy()
            age = time.monotonic() - watched.container.started_at
            with watched.lock:
                watched.said = said
                if well:
                    if not watched.healthy_after_s:
                        watched.healthy_after_s = age
                    watched.health, watched.failures = "healthy", 0
                elif health is not None and age > health.start_period_s:
                    watched.failures += 1
                    if watched.failures >= health.retries:
                        watched.health = "unhealthy"
            if health is None:
                pause = 1.0
            else:
                waiting = watched.health == "starting"
                pause = health.start_interval_s if waiting else health.interval_s
            self._pause(watched, pause)

    def _restart(self, watched: Watched) -> None:
        code = watched.container.exit_code
        with watched.lock:
            watched.health, watched.failures = "starting", 0
        if watched.container.service.restart == "on-failure" and code == 0:
            watched.wanted = False
            return
        if not self._stopping.wait(RESTART_DELAY_S):
            watched.container.start(self._bridges, self._gateways)
            watched.restarts += 1

    def _pause(self, watched: Watched, pause_s: float) -> None:
        """Wait, but not longer than the container runs: Docker notices its end at once."""
        end = time.monotonic() + pause_s
        while time.monotonic() < end and not self._stopping.wait(0.1):
            if watched.wanted and not watched.container.running:
                return

    def _await(
        self,
        condition: Callable[[], bool],
        timeout_s: float,
        trouble: str,
        watched: Watched | None,
    ) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                words = ""
                if watched is not None:
                    words = f" ({watched.said})\n{watched.container.tail()}"
                raise RehearsalError(f"{trouble} after {timeout_s:.0f} s{words}")
            time.sleep(0.1)


def say(text: str) -> None:
    """Show one line."""
    console().print(text, highlight=False, markup=False, soft_wrap=True)


def table(rows: Mapping[str, float]) -> str:
    """Return names and seconds, one pair a line."""
    return "\n".join(f"  {name:<44} {value:7.1f} s" for name, value in rows.items())
