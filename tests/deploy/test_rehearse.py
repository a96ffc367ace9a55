"""The parts of the rehearsal that can be seen without running it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.rehearse.__main__ import prepare
from deploy.rehearse.compose import Project, image_environment, load_project, seconds
from deploy.rehearse.container import missing_programs, programs


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("rehearsal")
    prepare(place)
    return place


@pytest.fixture(scope="module")
def project(directory: Path) -> Project:
    return load_project(directory, "cpu")


@pytest.mark.parametrize(
    ("text", "want"), [("15s", 15.0), ("1m30s", 90.0), ("2h", 7200.0), ("500ms", 0.5)]
)
def test_durations_are_read_as_docker_compose_writes_them(text: str, want: float) -> None:
    assert seconds(text) == want


@pytest.mark.integration
def test_services_start_after_what_they_need(project: Project) -> None:
    order = [service.name for service in project.in_order()]
    assert sorted(order) == sorted(project.services)
    for name, service in project.services.items():
        assert all(order.index(needed) < order.index(name) for needed in service.needs)


@pytest.mark.integration
def test_what_a_service_runs_is_what_the_file_says(project: Project, directory: Path) -> None:
    learner = project.services["learner"]
    assert learner.ours and learner.words[:2] == ("sh", "-ec")
    assert "--object-store-memory=$OBJECT_STORE_BYTES" in learner.words[2]
    assert learner.secrets["learner.password"] == directory / "secrets" / "learner.password"
    assert learner.volumes["/runs"] == (directory / "compose-data" / "runs", False)
    assert learner.shm_size_bytes == 2 * 2**30 and learner.stop_grace_s == 120.0
    assert learner.health and learner.health.interval_s == 15.0 and learner.health.retries == 8
    redis = project.services["redis"]
    assert redis.health and redis.health.test[:2] == ("/bin/sh", "-c")
    assert '"$(cat /run/secrets/exporter.password)"' in redis.health.test[2]
    assert project.networks == {"control": False, "data": True}


def test_image_environment_is_that_of_the_dockerfile_with_these_programs() -> None:
    environment = image_environment("cpu")
    assert environment["OMP_NUM_THREADS"] == "1" and environment["HOME"] == "/tmp"
    assert environment["PATH"].startswith(f"{sys.prefix}/bin:")


@pytest.mark.integration
def test_this_machine_has_a_replay_server_and_lacks_what_nobody_has(project: Project) -> None:
    assert not missing_programs(project.services["redis"])
    assert programs(project.services["redis"])["/shim/valkey-server"]
    assert missing_programs(project.services["grafana"]) == ["grafana-server"]
    assert not missing_programs(project.services["learner"])


@pytest.mark.integration
def test_every_container_knows_the_names_of_its_networks_alone(
    project: Project, directory: Path
) -> None:
    from deploy.rehearse.rehearsal import Rehearsal

    play = Rehearsal(project, directory / "containers", directory / "compose-data", "a-run", 2)
    assert {"actors-1", "actors-2"} <= set(play.names)
    hosts = {
        name: dict(reversed(pair) for pair in watched.container._hosts)
        for name, watched in play._watched.items()
    }
    assert "ray-head" not in hosts["redis-1"].values()
    assert {"redis", "ray-head", "actors"} <= set(hosts["learner-1"].values())
    assert len([name for name in hosts["learner-1"].values() if name == "actors"]) == 2


def test_a_container_has_its_own_network_root_and_secrets(
    directory: Path, project: Project
) -> None:
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    isolated = ["unshare", *user, "--net", "--mount", "--pid", "--fork"]
    if not shutil.which("unshare") or subprocess.run([*isolated, "true"]).returncode:
        pytest.skip("namespaces cannot be made here: no unshare, or not allowed")
    script = f"""
import sys, time
from dataclasses import replace
from pathlib import Path
from deploy.rehearse.compose import load_project
from deploy.rehearse.container import Container, command
command("ip", "link", "set", "lo", "up")
command("ip", "link", "add", "df0", "type", "bridge")
command("ip", "addr", "add", "10.213.0.1/24", "dev", "df0")
command("ip", "link", "set", "df0", "up")
service = load_project(Path({str(directory)!r}), "cpu").services["actors"]
check = '''
hostname=$(cat /etc/hostname); echo "name $hostname"
ls /run/secrets | tr '\\\\n' ' '; echo
touch /x 2>/dev/null && echo writable; touch /tmp/x && echo tmp
ip link show eth0 | grep -o 'ether [0-9a-f:]*'
getent hosts redis; sed 1,2d /proc/net/dev | cut -d: -f1 | tr -d ' '
exit 7'''
service = replace(service, words=("sh", "-c", check), networks=("control",), user="0:0")
one = Container(service, 1, Path({str(directory)!r}) / "one", {{"control": "10.213.0.9"}},
                [("redis", "10.213.0.8")])
one.start({{"control": "df0"}}, {{"control": "10.213.0.1"}})
deadline = time.monotonic() + 30
while one.running and time.monotonic() < deadline:
    time.sleep(0.05)
sys.stdout.write(one.tail(50) + f"\\ncode {{one.exit_code}}\\n")
one.stop()
deaf = replace(service, words=("sh", "-c", "trap '' TERM; echo deaf; sleep 100; true"),
               stop_grace_s=1.0)
two = Container(deaf, 2, Path({str(directory)!r}) / "two", {{"control": "10.213.0.10"}}, [])
two.start({{"control": "df0"}}, {{"control": "10.213.0.1"}})
while "deaf" not in two.tail() and time.monotonic() < deadline:
    time.sleep(0.05)
sys.stdout.write(f"stopped {{two.stop()}}: {{two.stuck}}\\n")
"""
    done = subprocess.run(
        [*isolated, "--mount-proc", "--kill-child=SIGKILL", sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "name actors-1" in lines and "actor.password metrics.token ray.token " in lines
    assert "tmp" in lines and "writable" not in lines
    assert "10.213.0.8      redis" in lines
    assert {"lo", "eth0"} <= set(lines)
    # Started again it has the same, so that the others find it at once.
    assert "ether 02:42:0a:d5:00:09" in lines
    assert "code 7" in lines
    assert lines[-1].startswith("stopped 137: ") and "sleep sleeping" in lines[-1]
