"""What all processes of a run export, for the tests of dashboards and rules."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry

from actors.metrics import ActorMetrics, FleetMetrics
from learner.bound import PHASES
from learner.metrics import Exporter
from replay_service import EmbeddedServer, Limits, ReplayClient
from replay_service.exporter import ReplayMetrics, ReplayWatch
from tests.replay_service.records import SCHEMA, insert_many


@pytest.fixture(scope="module")
def registries(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, CollectorRegistry]]:
    """What learner, replay service and an actor export, with a value of everything."""
    learner = Exporter("abc")
    learner.registry.register(
        FleetMetrics(
            lambda: {"desired": 2, "states": {"up": 2}, "restarts": {"hang": 1}, "quarantined": 0}
        )
    )
    learner.phases(dict.fromkeys(PHASES, 1.0))
    learner.bound({"environments": 1.0}, 2)
    names = ["kl_nats/dyn", "grad_norm/rssm", "entropy_nats", "value_mean", "prototypes/live"]
    names += ["lr", "grad_clip_fraction", "param_norm", "update_rms"]
    names += ["loss/rec", "return_percentile/5", "value_percentile/95"]
    learner.train(dict.fromkeys(names, 1.0))
    learner.update({"checkpoint_last_success_timestamp_seconds": 1.0}, {})
    values = {"weights_received_timestamp_seconds": 1.0}
    actor = ActorMetrics(slot=0, env="CartPole-v1", read=lambda: values)
    with EmbeddedServer(
        tmp_path_factory.mktemp("replay") / "server", max_memory_bytes=2**26
    ) as server:
        client, watch = ReplayClient(server.url), ReplayWatch(server.url, timeout_s=2.0)
        client.create(SCHEMA, Limits(capacity_steps=1000, capacity_bytes=10**7))
        insert_many(client, 0, 3)
        replay = CollectorRegistry()
        replay.register(ReplayMetrics(watch))
        yield {"learner": learner.registry, "actor": actor.registry, "replay": replay}
        client.close()
        watch.close()


@pytest.fixture(scope="module")
def exported(registries: dict[str, CollectorRegistry]) -> set[str]:
    """The names of all samples in them."""
    return {
        sample.name
        for registry in registries.values()
        for family in registry.collect()
        for sample in family.samples
    }
