"""Training on several Ray nodes: who goes where, and nodes that leave and join meanwhile."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deploy import cluster as ours
from tests.integration.raylets import (
    DEADLINE_S,
    acting_below,
    add,
    empty_cluster,
    raylet_of,
    start,
    status,
    until,
)

pytestmark = [pytest.mark.integration, pytest.mark.slow]


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    with empty_cluster(monkeypatch) as cluster:
        yield cluster


def test_training_survives_a_node_that_leaves_and_uses_one_that_joins(
    nodes: Any, tmp_path: Path
) -> None:
    add(nodes, learner=1)
    first = add(nodes, actor=2)
    run = tmp_path / "run"
    process = start(nodes, run, "--steps", "1000000", "--actors", "2")
    try:
        until(
            lambda: acting_below(run, raylet_of(first)) == 2, process, "no actors on the first node"
        )
        until(lambda: status(run)["updates"] > 0, process, "no update")
        nodes.remove_node(first, allow_graceful=False)
        second = add(nodes, actor=2)
        until(
            lambda: acting_below(run, raylet_of(second)) == 2,
            process,
            "no actors on the second node",
        )
        before = status(run)
        until(
            lambda: (
                status(run)["env_steps"] > before["env_steps"]
                and status(run)["updates"] > before["updates"]
            ),
            process,
            "training did not go on",
        )
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 128 + signal.SIGTERM, out[-3000:]
        assert "reason=died" in out, out
    finally:
        process.kill()
        process.wait(30)


def test_a_learner_on_the_wrong_node_is_told_how_to_get_to_the_right_one(
    nodes: Any, tmp_path: Path
) -> None:
    add(nodes)  # the process that is started here belongs to the first node
    add(nodes, learner=1)
    nodes.wait_for_nodes()
    process = start(nodes, tmp_path / "run", "--steps", "2000")
    out, _ = process.communicate(timeout=DEADLINE_S)
    said = " ".join(out.split())
    assert process.returncode == 2, said
    assert "this process is on a node without the Ray resource 'learner'" in said
    assert """--entrypoint-resources '{"learner": 1}'""" in said


def test_actors_without_room_are_announced(nodes: Any, caplog: pytest.LogCaptureFixture) -> None:
    import ray

    add(nodes, learner=1, actor=1)
    ray.init(address=nodes.address, logging_level="ERROR", log_to_driver=False)
    assert ours.actor_resources(1) == {"actor": 1.0}
    assert not caplog.records
    assert ours.actor_resources(3) == {"actor": 1.0}
    assert "actors_without_room wanted=3 offered=1" in caplog.text
    assert list(ours.this_node().values()) == [0.001]
