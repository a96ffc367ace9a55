"""The page on operations lists every metric that there is, and none that is not."""

from __future__ import annotations

import re
from pathlib import Path

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric

from actors.metrics import ActorMetrics, FleetMetrics
from learner.metrics import Exporter
from replay_service import EmbeddedServer, Limits, ReplayClient
from replay_service.exporter import ReplayMetrics, ReplayWatch
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
