"""The fleet as it appears at the learner's metrics port, before and while actors run."""

from __future__ import annotations

import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from prometheus_client.parser import text_string_to_metric_families

from actors.actor import ActorSpec
from actors.fleet import Fleet
from deploy.crew import Crew
from deploy.launch import export_fleet
from learner.learner import Learner
from learner.record import Recorder
from replay_service import ReplayClient


def scrape(port: int) -> dict[tuple[str, ...], float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        text = answer.read().decode()
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    return {(s.name, *s.labels.values()): s.value for s in samples}


def test_fleet_is_exported_at_the_port_that_the_snapshot_names(tmp_path: Path) -> None:
    spec, source = cast(ActorSpec, None), cast(Any, None)
    crew = Crew(spec, source, cast(ReplayClient, None), actors=3)
    recorder = Recorder(tmp_path, port=0)
    try:
        export_fleet(cast(Learner, SimpleNamespace(recorder=recorder)), crew)
        facts: dict[str, Any] = dict.fromkeys(("env_steps", "target_steps", "updates"), 0)
        facts |= {"ratio_actual": 0.0, "ratio_target": 1.0, "version": (1, 0)}
        port = recorder.snapshot(**facts, weights_age_s=None, waiting_for="").metrics_port
        assert port is not None
        before = scrape(port)
        crew._fleet = Fleet(spec, source, actors=3)
        after = scrape(port)
    finally:
        recorder.close()
    assert before["dreamer_fleet_actors_desired",] == after["dreamer_fleet_actors_desired",] == 3
    assert before["dreamer_slots_quarantined",] == 0
    assert ("dreamer_fleet_actors", "starting") not in before
    assert after["dreamer_fleet_actors", "starting"] == 3
