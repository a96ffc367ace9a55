"""Files for Ray's cluster launcher and for Kubernetes, against the schemas that can be had."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import tyro
import yaml

from deploy.cli import parse_train
from deploy.cluster import ACTOR, LEARNER
from deploy.replaycmd import ReplayServeOptions

ROOT = Path(__file__).parents[2]
KUBERNETES = sorted((ROOT / "deploy" / "kubernetes").glob("*.yaml"))
RELEASE = "1.35"
# Fields of KubeRay's and the Prometheus operator's own kinds: their schemas are in no package.
RAY_CLUSTER = {
    "rayVersion",
    "enableInTreeAutoscaling",
    "autoscalerOptions",
    "headGroupSpec",
    "workerGroupSpecs",
    "gcsFaultToleranceOptions",
    "suspend",
    "managedBy",
    "authOptions",
}
WORKER_GROUP = {
    "groupName",
    "replicas",
    "minReplicas",
    "maxReplicas",
    "idleTimeoutSeconds",
    "numOfHosts",
    "rayStartParams",
    "scaleStrategy",
    "suspend",
    "template",
}
RAY_JOB = {
    "clusterSelector",
    "entrypoint",
    "entrypointNumCpus",
    "entrypointNumGpus",
    "entrypointResources",
    "metadata",
    "runtimeEnvYAML",
    "submissionMode",
    "suspend",
}
SCRAPE_CONFIG = {"authorization", "httpSDConfigs", "scrapeInterval", "relabelings", "scheme"}
POD_MONITOR = {"selector", "podMetricsEndpoints", "namespaceSelector", "podTargetLabels"}


def documents(name: str) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file."""
    yield from yaml.safe_load_all((ROOT / "deploy" / "kubernetes" / name).read_text())


def one(name: str, kind: str) -> dict[str, Any]:
    """Return the only object of a kind in a file."""
    (found,) = [document for document in documents(name) if document["kind"] == kind]
    return found


def groups() -> dict[str, dict[str, Any]]:
    """Return the groups of the Ray cluster by name."""
    spec = one("raycluster.yaml", "RayCluster")["spec"]
    return {
        "head": spec["headGroupSpec"],
        **{group["groupName"]: group for group in spec["workerGroupSpecs"]},
    }


def test_launcher_file_passes_rays_own_validation() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((ROOT / "deploy/ray/cluster.yaml").read_text())
    validate_config(prepare_config(config))
    config["available_node_types"]["actors"]["ressources"] = {}
    with pytest.raises(Exception, match="ressources"):
        validate_config(prepare_config(config))


def test_launcher_file_gives_roles_a_token_and_a_port_that_is_free() -> None:
    config = yaml.safe_load((ROOT / "deploy/ray/cluster.yaml").read_text())
    kinds = config["available_node_types"]
    assert kinds["learner"]["resources"][LEARNER] == 1 and kinds["learner"]["resources"]["GPU"] == 1
    assert kinds["actors"]["resources"][ACTOR] >= 1 and "GPU" not in kinds["actors"]["resources"]
    assert kinds["head"]["resources"] == {"CPU": 0}
    for command in (config["head_start_ray_commands"][-1], config["worker_start_ray_commands"][-1]):
        assert "RAY_AUTH_MODE=token" in command
        port = int(re.search(r"(?:--port=|IP:)(\d+)", command)[1])  # type: ignore[index]
        assert port != 6379 and not 10002 <= port <= 19999


@pytest.mark.parametrize("path", KUBERNETES, ids=lambda path: path.name)
def test_kubernetes_accepts_every_object_that_it_knows(path: Path) -> None:
    import kubernetes_validate

    known = 0
    for document in documents(path.name):
        if "." in document["apiVersion"].split("/")[0]:
            continue
        kubernetes_validate.validate(document, RELEASE, strict=True)
        known += 1
    assert known or path.name in ("rayjob.yaml", "podmonitor.yaml")


@pytest.mark.parametrize("name", ["head", "learner", "actors"])
def test_kubernetes_accepts_the_pods_of_the_ray_cluster(name: str) -> None:
    import kubernetes_validate

    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}}
    spec = groups()[name]["template"]["spec"]
    kubernetes_validate.validate({**pod, "spec": spec}, RELEASE, strict=True)
    with pytest.raises(kubernetes_validate.ValidationError):
        wrong = {**spec, "tolerations": "everything"}
        kubernetes_validate.validate({**pod, "spec": wrong}, RELEASE, strict=True)


def test_objects_of_other_schemas_have_only_fields_that_these_know() -> None:
    cluster = one("raycluster.yaml", "RayCluster")
    assert cluster["apiVersion"] == "ray.io/v1" and set(cluster["spec"]) <= RAY_CLUSTER
    for group in cluster["spec"]["workerGroupSpecs"]:
        assert set(group) <= WORKER_GROUP
    assert set(one("rayjob.yaml", "RayJob")["spec"]) <= RAY_JOB
    known = {"PodMonitor": POD_MONITOR, "ScrapeConfig": SCRAPE_CONFIG}
    for monitor in documents("podmonitor.yaml"):
        assert set(monitor["spec"]) <= known[monitor["kind"]]


def test_ray_cluster_has_the_version_roles_and_token_of_the_image() -> None:
    assert one("raycluster.yaml", "RayCluster")["spec"]["rayVersion"] == version("ray")
    params = {name: group["rayStartParams"] for name, group in groups().items()}
    assert LEARNER in params["learner"]["resources"] and ACTOR in params["actors"]["resources"]
    assert params["head"]["num-cpus"] == "0" and "resources" not in params["head"]
    for group in groups().values():
        (container,) = group["template"]["spec"]["containers"]
        names = {entry["name"]: entry for entry in container["env"]}
        assert names["RAY_AUTH_MODE"]["value"] == "token"
        assert "secretKeyRef" in names["RAY_AUTH_TOKEN"]["valueFrom"]
        gpu = "nvidia.com/gpu" in container["resources"].get("limits", {})
        assert gpu == container["image"].endswith(":cuda")


def test_pods_run_as_nobody_special_and_say_what_they_need() -> None:
    specs = [group["template"]["spec"] for group in groups().values()]
    specs.append(one("redis.yaml", "StatefulSet")["spec"]["template"]["spec"])
    specs.append(one("replay.yaml", "Deployment")["spec"]["template"]["spec"])
    for spec in specs:
        assert spec["securityContext"]["runAsNonRoot"]
        for container in [*spec["containers"], *spec.get("initContainers", [])]:
            assert not container["securityContext"]["allowPrivilegeEscalation"]
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["requests"] and container["resources"]["limits"]["memory"]
            assert not container["image"].endswith(":latest")


def test_job_is_a_run_that_the_command_line_understands() -> None:
    spec = one("rayjob.yaml", "RayJob")["spec"]
    words = spec["entrypoint"].split()
    assert words[:2] == ["dreamfleet", "train"]
    config = parse_train(words[2:])
    assert (config.ray, config.device) == ("auto", "cuda")
    service = one("redis.yaml", "Service")["metadata"]["name"]
    assert config.redis == f"redis://{service}:6379"
    assert yaml.safe_load(spec["entrypointResources"]) == {LEARNER: 1}
    conf = one("redis.yaml", "ConfigMap")["data"]["redis.conf"]
    gigabytes = re.search(r"^maxmemory (\d+)gb$", conf, re.MULTILINE)
    assert gigabytes and int(gigabytes[1]) * 2**30 == config.replay.redis_memory_bytes
    slots = yaml.safe_load(yaml.safe_load(groups()["actors"]["rayStartParams"]["resources"]))
    assert groups()["actors"]["maxReplicas"] * slots[ACTOR] >= config.actors
    for part in (config.learner, config.actor):
        assert part.metrics_listen == "0.0.0.0"
        assert str(part.metrics_token_file) == "/run/secrets/metrics.token"


def test_replay_service_of_kubernetes_lists_what_prometheus_scrapes() -> None:
    spec = one("replay.yaml", "Deployment")["spec"]["template"]["spec"]
    service = one("replay.yaml", "Service")
    (container,) = spec["containers"]
    words = container["command"]
    assert words[:3] == ["dreamfleet", "replay", "serve"]
    given = tyro.cli(ReplayServeOptions, args=words[3:])
    name, port = service["metadata"]["name"], service["spec"]["ports"][0]["port"]
    assert given.listen == f"0.0.0.0:{port}"
    # Prometheus is in a namespace of its own: a bare name would be looked for there.
    assert given.host == f"{name}.$(NAMESPACE).svc"
    (field,) = [entry for entry in container["env"] if entry["name"] == "NAMESPACE"]
    assert field["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.namespace"
    scrape = one("podmonitor.yaml", "ScrapeConfig")["spec"]
    assert [each["url"] for each in scrape["httpSDConfigs"]] == [
        f"http://{name}.default.svc:{port}/sd"
    ]
    assert scrape["authorization"]["credentials"]["key"] == "metrics.token"
    assert str(given.token_file) == "/run/secrets/metrics.token"
    held = {item["key"] for item in spec["volumes"][0]["secret"]["items"]}
    assert held == {"admin.password", "exporter.password", "metrics.token"}
    for group in ("learner", "actors"):
        (secret,) = [
            volume["secret"]
            for volume in groups()[group]["template"]["spec"]["volumes"]
            if "secret" in volume
        ]
        assert "metrics.token" in {item["key"] for item in secret["items"]}


def test_ports_that_are_scraped_exist() -> None:
    for monitor in documents("podmonitor.yaml"):
        if monitor["kind"] != "PodMonitor":
            continue
        assert {entry["port"] for entry in monitor["spec"]["podMetricsEndpoints"]} == {"metrics"}
    pods = [group["template"]["spec"] for group in groups().values()]
    pods.append(one("redis.yaml", "StatefulSet")["spec"]["template"]["spec"])
    for spec in pods:
        ports = [port["name"] for item in spec["containers"] for port in item.get("ports", [])]
        assert ports.count("metrics") == 1
