"""The dashboards: the files are what the code makes, and every query finds what we export."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
import yaml
from prometheus_client import CollectorRegistry

from deploy.dashboards import ANNOTATIONS, DIRECTORY, INFRA, PAGES, SOURCE, metrics_in, render
from replay_service.endpoint import MetricsEndpoint

OURS = [*{query for page in PAGES if page is not INFRA for query in page.queries()}]
MARKS = [query for _, query, _ in ANNOTATIONS]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.uid)
def test_the_files_are_what_the_code_makes(page) -> None:
    path = DIRECTORY / f"{page.uid}.json"
    assert path.read_text() == render(page), "run `make dashboards`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.uid)
def test_panels_fit_and_say_where_data_comes_from(page) -> None:
    panels = json.loads(render(page))["panels"]
    cells = [
        (panel["gridPos"]["x"] + x, panel["gridPos"]["y"] + y)
        for panel in panels
        for x in range(panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["h"])
    ]
    assert len(panels) == len(page.panels) and len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
    assert all(panel["datasource"]["uid"] == SOURCE.uid for panel in panels)
    shown = [target["expr"] for panel in panels for target in panel["targets"]]
    assert shown == [*page.queries()]


def test_the_source_and_the_folder_are_provisioned() -> None:
    sources = yaml.safe_load((DIRECTORY.parent / "datasources" / "prometheus.yml").read_text())
    assert [source["uid"] for source in sources["datasources"]] == [SOURCE.uid]
    folder = yaml.safe_load((DIRECTORY / "dreamfleet.yml").read_text())["providers"][0]
    assert Path(folder["options"]["path"]).parts[-2:] == DIRECTORY.parts[-2:]


def test_every_metric_in_a_query_is_exported(exported: set[str]) -> None:
    used = {name for query in OURS + MARKS for name in metrics_in(query)}
    assert len(used) > 30
    assert used - exported == {"up"}


def test_every_query_is_one(tmp_path: Path) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (Debian: prometheus)")
    rules = [
        {"record": f"q:{i}", "expr": query.replace("$run", ".*")}
        for i, query in enumerate([*OURS, *MARKS, *INFRA.queries()])
    ]
    path = tmp_path / "rules.yml"
    path.write_text(json.dumps({"groups": [{"name": "q", "rules": rules}]}))
    checked = subprocess.run(
        ["promtool", "check", "rules", path], capture_output=True, text=True, timeout=30
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.integration
def test_every_query_returns_data(registries: dict[str, CollectorRegistry], tmp_path: Path) -> None:
    if shutil.which("prometheus") is None:
        pytest.skip("prometheus is not installed (Debian: prometheus)")
    endpoints = {role: MetricsEndpoint(registry) for role, registry in registries.items()}
    jobs = [
        {
            "job_name": role,
            "static_configs": [
                {"targets": [f"127.0.0.1:{one.port}"], "labels": {"run": "a", "role": role}}
            ],
        }
        for role, one in endpoints.items()
    ]
    config = tmp_path / "prometheus.yml"
    every = {"scrape_interval": "250ms", "scrape_timeout": "200ms"}
    config.write_text(json.dumps({"global": every, "scrape_configs": jobs}))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={tmp_path / 'data'}"]
    server = subprocess.Popen(
        [*command, f"--web.listen-address={address}"], stderr=subprocess.DEVNULL
    )
    try:
        empty, end = OURS, time.monotonic() + 30
        while empty and time.monotonic() < end:
            time.sleep(0.5)
            empty = [query for query in empty if not ask(address, query)]
        assert not empty
    finally:
        server.kill()
        server.wait()
        for one in endpoints.values():
            one.close()


def ask(address: str, query: str) -> list[dict]:
    """Return what a query finds now, nothing while Prometheus is not there yet."""
    text = urllib.parse.urlencode({"query": query.replace("$run", ".*")})
    try:
        with urllib.request.urlopen(f"http://{address}/api/v1/query?{text}", timeout=5) as answer:
            return json.load(answer)["data"]["result"]
    except OSError:
        return []
