"""Prometheus metrics of actor processes and of the fleet."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

PREFIX = "dreamer_"
LABELS = ("role", "slot", "env", "split")
_FAST_S = (1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 10.0)
_RETURNS = (-1000.0, -100.0, -10.0, -1.0, 0.0, 1.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 10000.0)
_LENGTHS = (10.0, 30.0, 100.0, 200.0, 300.0, 500.0, 1000.0, 3000.0, 10000.0, 30000.0)

_COUNTERS = {
    "env_steps": "Records written, which is the agent's decisions and the last observations.",
    "env_frames": "Records times the action repeat.",
    "insert_wait_seconds": "Seconds that writers waited for room.",
    "resend_chunks": "Acknowledged chunks that were sent again.",
}
_GAUGES = {
    "pending_chunks": "Chunks waiting for their acknowledgement.",
    "resend_memory_share": "Share of the memory for resend rings that is used, 0 to 1.",
    "blocked": "1 while inserts wait for training or for the server, else 0.",
    "last_step_timestamp_seconds": "Unix time of the last completed step.",
    "weights_fence": "Lineage of the policy's weights.",
    "weights_update": "Update that the policy's weights come from.",
    "weights_received_timestamp_seconds": "Unix time at which the policy got its weights.",
    "weights_apply_seconds": "Seconds that the newest swap of weights took.",
}
_COUNTED_BY = {
    "episodes": ("end", "Episodes by how they ended."),
    "env_restarts": ("reason", "Environments replaced, by reason."),
    "obs_rejected": ("reason", "Answers of environments that were not valid, by reason."),
    "insert_replies": ("code", "Answers of the replay server, by code."),
}


class ActorMetrics(Collector):
    """What one actor process exports.

    Args:
        slot: of the actor.
        env: id of the environment.
        split: "train" or "eval".
        read: returns the current values by name (see `_COUNTERS`, `_GAUGES`, `_COUNTED_BY`; for
            the last {label value: count}). Called from the thread that answers a scrape.
    """

    def __init__(
        self, *, slot: int, env: str, read: Callable[[], Mapping[str, Any]], split: str = "train"
    ) -> None:
        self.registry = CollectorRegistry()
        self._values = ("actor", str(slot), env, split)
        self._read = read
        self._env_seconds = self._histogram("env_step_seconds", "Waiting for a step.", _FAST_S)
        self._policy_seconds = self._histogram("policy_seconds", "One policy call.", _FAST_S)
        self._insert_seconds = self._histogram("insert_seconds", "Handing records over.", _FAST_S)
        self._return = self._histogram("episode_return", "Return of an episode.", _RETURNS)
        self._length = self._histogram("episode_length", "Steps of an episode.", _LENGTHS)
        self.registry.register(self)

    def step(self, *, policy_s: float, env_s: float, write_s: float) -> None:
        """Count one step of the loop."""
        self._policy_seconds.observe(policy_s)
        self._env_seconds.observe(env_s)
        self._insert_seconds.observe(write_s)

    def episode(self, ret: float, length: int) -> None:
        """Count one episode that ended."""
        self._return.observe(ret)
        self._length.observe(length)

    def collect(self) -> Iterable[Metric]:
        """Yield everything that is not a histogram, as it is now."""
        values = self._read()
        for name, text in _COUNTERS.items():
            counter = CounterMetricFamily(PREFIX + name, text, labels=LABELS)
            counter.add_metric(self._values, values.get(name, 0.0))
            yield counter
        for name, text in _GAUGES.items():
            gauge = GaugeMetricFamily(PREFIX + name, text, labels=LABELS)
            gauge.add_metric(self._values, values.get(name, 0.0))
            yield gauge
        for name, (label, text) in _COUNTED_BY.items():
            counter = CounterMetricFamily(PREFIX + name, text, labels=(*LABELS, label))
            for key, count in values.get(name, {}).items():
                counter.add_metric((*self._values, key), count)
            yield counter

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Any:
        histogram = Histogram(PREFIX + name, text, LABELS, registry=self.registry, buckets=buckets)
        return histogram.labels(*self._values)


class FleetMetrics(Collector):
    """What the fleet exports; register it in the registry of the process that supervises.

    Args:
        read: returns desired (int), states {state: actors}, restarts {reason: count} and
            quarantined (int).
    """

    def __init__(self, read: Callable[[], Mapping[str, Any]]) -> None:
        self._read = read

    def collect(self) -> Iterable[Metric]:
        """Yield the gauges and counters of the fleet as they are now."""
        values = self._read()
        yield GaugeMetricFamily(
            PREFIX + "fleet_actors_desired", "Actors that should run.", value=values["desired"]
        )
        states = GaugeMetricFamily(PREFIX + "fleet_actors", "Actors by state.", labels=("state",))
        for state, count in values["states"].items():
            states.add_metric((state,), count)
        yield states
        restarts = CounterMetricFamily(
            PREFIX + "actor_restarts", "Actors replaced, by reason.", labels=("reason",)
        )
        for reason, count in values["restarts"].items():
            restarts.add_metric((reason,), count)
        yield restarts
        yield GaugeMetricFamily(
            PREFIX + "slots_quarantined",
            "Slots given up after too many restarts.",
            value=values["quarantined"],
        )
