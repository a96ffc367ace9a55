"""Prometheus's rules: they read what is exported, each alert is tested, and each is explained."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

from deploy.dashboards import metrics_in

ROOT = Path(__file__).parents[2]
DIRECTORY = ROOT / "deploy" / "prometheus"
RULES: list[dict[str, Any]] = [
    rule
    for group in yaml.safe_load((DIRECTORY / "rules.yml").read_text())["groups"]
    for rule in group["rules"]
]
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
RECORDED = {rule["record"] for rule in RULES if "record" in rule}
FROM_ELSEWHERE = {"up", "redis_evicted_keys_total"}
"""Prometheus's own, and redis_exporter's."""


def promtool(*args: str) -> subprocess.CompletedProcess[str]:
    """Run promtool beside the rules; skip the test where there is none."""
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (Debian: prometheus)")
    return subprocess.run(
        ["promtool", *args], cwd=DIRECTORY, capture_output=True, text=True, timeout=60
    )


def test_prometheus_reads_the_rules() -> None:
    config = yaml.safe_load((DIRECTORY / "prometheus.yml").read_text())
    assert config["rule_files"] == ["rules.yml"]
    for args in (
        ("check", "rules", "rules.yml"),
        ("check", "config", "--syntax-only", "prometheus.yml"),
    ):
        done = promtool(*args)
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_fires_when_it_should_and_is_silent_when_not() -> None:
    done = promtool("test", "rules", "rules_test.yml")
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_rule_is_tested_both_ways() -> None:
    tests = yaml.safe_load((DIRECTORY / "rules_test.yml").read_text())["tests"]
    asked = [one for test in tests for one in test.get("alert_rule_test", [])]
    assert {one["alertname"] for one in asked if one["exp_alerts"]} == {*ALERTS}
    assert {one["alertname"] for one in asked if not one["exp_alerts"]} == {*ALERTS}
    recorded = [one["expr"] for test in tests for one in test.get("promql_expr_test", [])]
    assert {expr.split("{")[0] for expr in recorded} == RECORDED


def test_every_metric_in_a_rule_is_exported(exported: set[str]) -> None:
    used = {name for rule in RULES for name in metrics_in(rule["expr"])}
    ray = {f"ray_{name}" for name in METRICS_GAUGES}
    assert len(used) > 25
    assert used - exported - ray == FROM_ELSEWHERE
    named = {name for rule in RULES for name in re.findall(r"dreamer:[\w:]+", rule["expr"])}
    assert named and named <= RECORDED


def test_every_alert_is_explained() -> None:
    page = (ROOT / "docs" / "operations.md").read_text()
    rows = re.findall(r"^\| `([A-Z]\w+)` \| (page|warn) \|", page, re.MULTILINE)
    assert rows == [(name, rule["labels"]["severity"]) for name, rule in ALERTS.items()]
