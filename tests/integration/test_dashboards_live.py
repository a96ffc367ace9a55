"""Dashboards and rules on a whole run, which a real Prometheus finds by the replay service."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from replay_service import EmbeddedServer
from tests.deploy.test_cluster import free_port
from tests.deploy.test_dashboards import OURS, ask
from tests.deploy.test_rules import RECORDED
from tests.integration.test_train import END_S, EVALUATED, FOREVER, ROOT, START_S, Run

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(600)]

RULES = ROOT / "deploy" / "prometheus" / "rules.yml"
NOTHING_HAPPENED = {"dreamer_actor_restarts_total", *(q for q in OURS if "prototypes" in q)}
"""What a run of DreamerV3 without any trouble says nothing of."""
QUERIES_S = 120.0


@contextmanager
def ending(command: list[str], **options: object) -> Iterator[subprocess.Popen[str]]:
    """Run a command for as long as the block."""
    with subprocess.Popen(command, text=True, **options) as process:  # type: ignore[call-overload]
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def prometheus(directory: Path, service: str) -> tuple[list[str], str]:
    """Write what Prometheus is to scrape and watch; return its command and its address."""
    jobs = [
        {
            "job_name": "dreamfleet",
            "http_sd_configs": [{"url": f"http://{service}/sd", "refresh_interval": "1s"}],
        },
    ]
    every = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    config = directory / "prometheus.yml"
    config.write_text(
        json.dumps({"global": every, "rule_files": [str(RULES)], "scrape_configs": jobs})
    )
    asked = f"127.0.0.1:{free_port()}"
    return [
        "prometheus",
        f"--config.file={config}",
        f"--storage.tsdb.path={directory / 'data'}",
        f"--web.listen-address={asked}",
    ], asked


def end(run: Run) -> None:
    """Stop a run as a user does, and everything of it."""
    run.process.terminate()
    try:
        run.process.wait(END_S)
    finally:
        run.close()


@pytest.fixture
def live(tmp_path: Path) -> Iterator[str]:
    """A run, the replay service beside its server, and where a Prometheus that scrapes both is."""
    if shutil.which("prometheus") is None:
        pytest.skip("prometheus is not installed (Debian: prometheus)")
    with ExitStack() as stack:
        address = f"127.0.0.1:{free_port()}"
        stack.enter_context(
            EmbeddedServer(tmp_path / "server", max_memory_bytes=2**27, listen=address)
        )
        serve = [sys.executable, "-m", "deploy.cli", "replay", "serve", f"redis://{address}"]
        service = stack.enter_context(
            ending([*serve, "--listen", "127.0.0.1:0"], stdout=subprocess.PIPE, cwd=ROOT)
        )
        assert service.stdout is not None
        listening = re.search(r"http://(\S+)", service.stdout.readline())
        assert listening is not None
        flags = ("--redis", f"redis://{address}", "--steps", FOREVER, "--actors", "2")
        run = Run(tmp_path / "run", *flags, *EVALUATED, "--learner.checkpoint-every-s", "2")
        stack.callback(end, run)
        run.wait_for(lambda now: int(str(now.get("updates", 0))) > 0, START_S)
        command, asked = prometheus(tmp_path, listening[1])
        stack.enter_context(ending(command, stderr=subprocess.DEVNULL))
        yield asked


def test_every_query_returns_data_of_a_live_run_and_no_alert_fires(live: str) -> None:
    # Recorded rules are asked along: they come with the interval of their group.
    wanted, deadline = [*OURS, *RECORDED], time.monotonic() + QUERIES_S
    empty = wanted
    while not {*empty} <= NOTHING_HAPPENED and time.monotonic() < deadline:
        time.sleep(1.0)
        empty = [query for query in wanted if not ask(live, query)]
    assert {*empty} <= NOTHING_HAPPENED, "these return nothing"
    # Those that evaluate are actors like any other, and told apart.
    for split in ("train", "eval"):
        assert ask(live, f'dreamer_episodes_total{{role="actor",split="{split}"}} > 0'), split
    jobs = {one["metric"]["job"] for one in ask(live, "up == 1")}
    assert jobs == {"dreamfleet"} and not ask(live, "up == 0")
    assert [one["metric"] for one in ask(live, 'ALERTS{alertstate="firing"}')] == []
