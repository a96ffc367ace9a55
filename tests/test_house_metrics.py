"""The page on operations lists every metric that there is, and none that is not."""

from __future__ import annotations

import re
from pathlib import Path

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric

from actors.metrics import ActorMetrics, FleetMetrics
from dreamer.presets import AGENTS, agent_config
from learner.metrics import Exporter
from replay_service import EmbeddedServer, Limits, ReplayClient
from replay_service.exporter import ReplayMetrics, ReplayWatch
from tests.dreamer.cases import PIXELS, batch_of, build
from tests.replay_service.records import SCHEMA, insert_many

PAGE = Path(__file__).parents[1] / "docs" / "operations.md"
SUFFIX = {"counter": "_total", "info": "_info"}
FLEET = {"desired": 1, "states": {"up": 1}, "restarts": {"died": 1}, "quarantined": 0}


def rows(of: str, families: list[Metric]) -> list[str]:
    """Return the rows of the table for what one process exports."""
    made = [
        (family.name + SUFFIX.get(family.type, ""), family.type, family.documentation)
        for family in families
    ]
    return [f"| `{name}` | {of} | {kind} | {text} |" for name, kind, text in sorted(made)]


def replay_families(directory: Path) -> list[Metric]:
    """Return what the replay service exports once a replay holds more than its minimum."""
    registry = CollectorRegistry()
    with EmbeddedServer(directory, max_memory_bytes=2**26) as server:
        client, watch = ReplayClient(server.url), ReplayWatch(server.url)
        client.create(SCHEMA, Limits(capacity_steps=100, capacity_bytes=2**24))
        insert_many(client, 0, 1)
        registry.register(ReplayMetrics(watch))
        found = list(registry.collect())
        watch.close()
        client.close()
    return found


def test_table_of_metrics_is_the_registry(tmp_path: Path) -> None:
    fleet = CollectorRegistry()
    fleet.register(FleetMetrics(lambda: FLEET))
    actor = ActorMetrics(slot=0, env="e", read=dict)
    want = [
        *rows("learner", list(Exporter().registry.collect())),
        *rows("fleet", list(fleet.collect())),
        *rows("actor", list(actor.registry.collect())),
        *rows("replay", replay_families(tmp_path)),
    ]
    there = re.findall(r"^\| `dreamer_.*\|$", PAGE.read_text(), re.MULTILINE)
    assert there == want, "the table should be:\n" + "\n".join(want)


def measured(name: str) -> set[str]:
    """Return what an update of an agent measures, as the page lists it."""
    may_end = {"cont": True} if hasattr(agent_config(name, "debug"), "kl_scale") else {}
    agent = build(name, PIXELS, **may_end)
    modules = {key.partition(".")[0] for key, _ in agent.named_parameters()}
    groups = {group.name for group in agent.groups()} - {""}

    def listed(metric: str) -> str:
        kind, _, part = metric.partition("/")
        if metric.startswith("loss/rec_"):
            return "loss/rec_KEY"
        if kind == "grad_norm" and part in modules:
            return "grad_norm/MODULE"
        return kind if part in groups else metric

    return {listed(metric) for metric in agent.update(batch_of(agent))[0]} - {"finite"}


def test_table_of_what_agents_measure_is_what_they_do() -> None:
    found = {name: measured(name) for name in AGENTS}
    want = {}
    for metric in set().union(*found.values()):
        by = [name for name in AGENTS if metric in found[name]]
        want[metric] = "all" if by == [*AGENTS] else ", ".join(by)
    section = PAGE.read_text().partition("| name | agents | meaning |")[2].partition("\n\n")[0]
    assert dict(re.findall(r"^\| `(.*?)` \| (.*?) \|", section, re.MULTILINE)) == want
