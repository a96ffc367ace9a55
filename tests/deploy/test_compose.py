"""docker-compose.yml as the real docker-compose reads it; no container is started here."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.cli import parse_train

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
OURS = {"replay", "ray-head", "actors", "learner", "learner-gpu"}
SERVICES = OURS | {"redis", "redis-exporter", "prometheus", "grafana", "dcgm-exporter"}
LOOPBACK = "127.0.0.1"


def tool(name: str) -> str:
    """Return the path of a program that `make setup` installs."""
    found = shutil.which(name, path=f"{BIN}{os.pathsep}{os.environ['PATH']}")
    assert found, f"{name} is not installed: run `make setup`"
    return found


def config(*args: str, directory: Path = ROOT, env: Path | None = None) -> dict[str, Any]:
    """Return the file as docker-compose resolves it, with the settings of a file or none."""
    chosen = env or Path(os.devnull)
    words = [tool("docker-compose"), "--project-directory", str(directory)]
    words += ["-f", str(ROOT / "docker-compose.yml"), "--env-file", str(chosen), *args]
    clean = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME")}
    done = subprocess.run(
        [*words, "config", "--format", "json"],
        capture_output=True,
        text=True,
        timeout=60,
        env=clean,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr.strip(), done.stderr
    resolved: dict[str, Any] = json.loads(done.stdout)
    return resolved


@pytest.fixture(scope="module")
def everything() -> dict[str, Any]:
    return config("--profile", "*")


def test_the_file_holds_every_service(everything: dict[str, Any]) -> None:
    assert set(everything["services"]) == SERVICES


def test_a_misspelt_key_would_be_found(tmp_path: Path) -> None:
    broken = tmp_path / "docker-compose.yml"
    text = (ROOT / "docker-compose.yml").read_text()
    broken.write_text(text.replace("healthcheck:", "heathcheck:", 1))
    done = subprocess.run(
        [tool("docker-compose"), "-f", str(broken), "--profile", "*", "config", "-q"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode != 0 and "heathcheck" in done.stderr


@pytest.mark.parametrize(
    ("profile", "learner"), [("cpu", {"learner"}), ("gpu", {"learner-gpu", "dcgm-exporter"})]
)
def test_a_profile_chooses_the_learner_and_nothing_else(profile: str, learner: set[str]) -> None:
    services = set(config("--profile", profile)["services"])
    assert services == SERVICES - {"learner", "learner-gpu", "dcgm-exporter"} | learner


def test_gpu_learner_differs_in_image_device_and_reservation_alone(
    everything: dict[str, Any],
) -> None:
    cpu, gpu = (deepcopy(everything["services"][name]) for name in ("learner", "learner-gpu"))
    assert gpu.pop("deploy")["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]
    assert (cpu["environment"].pop("DEVICE"), gpu["environment"].pop("DEVICE")) == ("cpu", "cuda")
    for name, service in (("learner", cpu), ("learner-gpu", gpu)):
        assert service["environment"].pop("METRICS_HOST") == name
        for name in ("profiles", "image", "build"):
            service.pop(name)
    assert cpu == gpu


def test_every_service_is_hardened_limited_and_watched(everything: dict[str, Any]) -> None:
    for name, service in everything["services"].items():
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["read_only"] and service["init"], name
        assert int(service["mem_limit"]) > 0 and service["pids_limit"] > 0, name
        assert service["logging"]["options"]["max-size"], name
        assert service["restart"] in ("unless-stopped", "on-failure"), name
        assert "container_name" not in service, name
        if name != "dcgm-exporter":
            assert service["user"] == "10001:10001", name
            assert service["healthcheck"]["test"], name


def test_nothing_is_published_beyond_this_machine_and_redis_not_at_all(
    everything: dict[str, Any],
) -> None:
    services = everything["services"]
    published = {
        name: {port["host_ip"] for port in service["ports"]}
        for name, service in services.items()
        if service.get("ports")
    }
    assert set(published) == {"grafana", "prometheus", "ray-head"}
    assert set().union(*published.values()) == {LOOPBACK}
    assert set(services["redis"]["networks"]) == {"data"}
    assert everything["networks"]["data"]["internal"]


def test_prometheus_asks_every_service_that_has_metrics(everything: dict[str, Any]) -> None:
    text = (ROOT / "deploy/prometheus/prometheus.yml").read_text()
    asked: dict[str, set[str]] = {}
    for job in yaml.safe_load(text)["scrape_configs"]:
        places = [place for one in job.get("static_configs", []) for place in one["targets"]]
        places += [one["url"] for one in job.get("http_sd_configs", [])]
        places += [name for one in job.get("dns_sd_configs", []) for name in one["names"]]
        hosts = (re.match(r"(?:http://)?([\w.-]+)", place) for place in places)
        asked[job["job_name"]] = {host[1] for host in hosts if host}
    # learner and actors are in the replay service's list, Ray's nodes in the head's
    assert asked == {
        "prometheus": {LOOPBACK},
        "redis": {"redis-exporter"},
        "ray": {"ray-head"},
        "dcgm": {"dcgm-exporter"},
        "dreamfleet": {"replay"},
    }
    networks = set(everything["services"]["prometheus"]["networks"])
    for host in set().union(*asked.values()) - {LOOPBACK}:
        assert networks & set(everything["services"][host]["networks"]), host


def test_images_are_pinned(everything: dict[str, Any]) -> None:
    for name, service in everything["services"].items():
        if name not in OURS:
            assert re.search(r":v?\d+\.\d+", service["image"]), service["image"]
            assert "latest" not in service["image"]
    for line in (ROOT / "deploy/docker/Dockerfile").read_text().splitlines():
        match = re.match(r"FROM (\S+:\S+) ", line)
        assert not match or re.search(r":\d+\.\d+\.\d+", match[1]), line


def test_ray_demands_a_token_everywhere(everything: dict[str, Any]) -> None:
    for name in ("ray-head", "actors", "learner", "learner-gpu"):
        service = everything["services"][name]
        assert service["environment"]["RAY_AUTH_MODE"] == "token"
        path = service["environment"]["RAY_AUTH_TOKEN_PATH"]
        assert path == "/run/secrets/ray.token"
        assert "ray.token" in {secret["source"] for secret in service["secrets"]}


def test_no_service_holds_a_secret_that_it_does_not_need(everything: dict[str, Any]) -> None:
    held = {
        name: {secret["source"] for secret in service.get("secrets", [])}
        for name, service in everything["services"].items()
    }
    assert held["actors"] == {"actor.password", "ray.token", "metrics.token"}
    assert held["learner"] == {"learner.password", "ray.token", "metrics.token"}
    assert held["replay"] == {"admin.password", "exporter.password", "metrics.token"}
    assert held["redis-exporter"] == {"exporter.password"}
    assert held["prometheus"] == {"ray.token", "metrics.token"}


def test_our_own_commands_are_understood(everything: dict[str, Any]) -> None:
    script = everything["services"]["learner"]["command"][-1].replace("$$", "$")
    train = re.search(r"dreamfleet train (.*)", script.replace("\\\n", " "))
    assert train
    asked = parse_train(train[1].replace("$DEVICE", "cpu").split())
    assert (asked.ray, asked.redis) == ("auto", "redis://redis:6379")
    memory = everything["services"]["redis"]["command"][-1]
    assert asked.replay.redis_memory_bytes == int(memory)


def test_settings_are_all_explained_and_change_nothing_by_themselves(
    everything: dict[str, Any],
) -> None:
    example = ROOT / ".env.example"
    used = set(re.findall(r"\$\{(\w+)", (ROOT / "docker-compose.yml").read_text()))
    named = set(re.findall(r"^(\w+)=", example.read_text(), re.MULTILINE))
    ids = {"COMPOSE_PROJECT_NAME", "DREAMFLEET_UID", "DREAMFLEET_GID"}
    assert named - {"COMPOSE_PROFILES"} == used - ids
    assert config("--profile", "*", env=example) == everything


def test_files_that_are_mounted_exist(everything: dict[str, Any]) -> None:
    for service in everything["services"].values():
        for volume in service.get("volumes", []):
            source = Path(volume["source"])
            if "compose-data" not in source.parts and not {"prometheus", "grafana"} & {
                *source.parts
            }:
                assert source.exists(), source


def test_dockerfile_passes_hadolint() -> None:
    done = subprocess.run(
        [tool("hadolint"), str(ROOT / "deploy/docker/Dockerfile")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_without_docker_the_image_is_built_by_buildah_or_the_message_says_what_is_missing(
    tmp_path: Path,
) -> None:
    words = ["make", "-n", "images-without-docker", "ARGS=--layers"]
    # These tests run below a make, whose flags and level would be this one's too.
    own = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    asked = subprocess.run(words, cwd=ROOT, env=own, capture_output=True, text=True, timeout=30)
    assert asked.stdout.split() == ["deploy/docker/buildah.sh", "--layers"]
    script = str(ROOT / "deploy/docker/buildah.sh")
    done = subprocess.run(
        [script], env={"PATH": str(tmp_path)}, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 1 and "buildah is not installed" in done.stderr


def test_everything_that_the_image_copies_is_in_its_context() -> None:
    kept = set(re.findall(r"^!(\S+)", (ROOT / ".dockerignore").read_text(), re.MULTILINE))
    copied: set[str] = set()
    for line in (ROOT / "deploy/docker/Dockerfile").read_text().splitlines():
        if line.startswith("COPY ") and "--from" not in line:
            copied |= set(line.split()[1:-1])
    assert copied == kept
    assert all((ROOT / name).exists() for name in kept)


def test_one_command_prepares_settings_secrets_and_directories(tmp_path: Path) -> None:
    shutil.copy(ROOT / ".env.example", tmp_path)
    dreamfleet = tmp_path / "dreamfleet"
    dreamfleet.write_text(f'#!/bin/sh\nexec {sys.executable} -m deploy.cli "$@"\n')
    dreamfleet.chmod(0o755)
    prepare = [str(ROOT / "deploy/docker/prepare.sh"), str(dreamfleet)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    for _ in range(2):  # the second time it changes nothing
        subprocess.run(prepare, cwd=tmp_path, env=env, check=True, timeout=60, capture_output=True)
    secrets = {path.name: path for path in (tmp_path / "secrets").iterdir()}
    resolved = config("--profile", "*", directory=tmp_path, env=tmp_path / ".env")
    assert {Path(entry["file"]).name for entry in resolved["secrets"].values()} <= set(secrets)
    for name in ("ray.token", "grafana_admin.password", "actor.password"):
        assert stat.S_IMODE(secrets[name].stat().st_mode) == 0o600
    owner = secrets["ray.token"].stat()
    assert owner.st_uid != 0
    for service in resolved["services"].values():
        if service["user"] != "0:0":
            assert service["user"] == f"{owner.st_uid}:{owner.st_gid}"
    assert (tmp_path / "compose-data" / "redis").is_dir()


def test_health_check_of_an_address_says_what_is_wrong(capfd: pytest.CaptureFixture[str]) -> None:
    from http.server import BaseHTTPRequestHandler, HTTPServer
    from threading import Thread

    from deploy.healthz import main

    class Sick(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/well" else 503)
            self.end_headers()
            self.wfile.write(b"the engine is cold")

        def log_message(self, *args: object) -> None:
            """Say nothing."""

    server = HTTPServer((LOOPBACK, 0), Sick)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    at = f"http://{LOOPBACK}:{server.server_port}"
    try:
        assert main([f"{at}/well"]) == 0
        assert main([f"{at}/well", f"{at}/ill"]) == 1
        assert f"{at}/ill answers 503: the engine is cold" in capfd.readouterr().err
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5.0)
    assert main([f"{at}/well"]) == 1
    assert "does not answer" in capfd.readouterr().err
    assert main([]) == 1
