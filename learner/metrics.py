"""Where numbers go besides the run's files: TensorBoard and Prometheus."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Info
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

from learner.bound import PHASES
from replay_service import MetricsEndpoint


class Board:
    """TensorBoard event files in the run directory; the horizontal axis is environment steps."""

    def __init__(self, directory: Path) -> None:
        self._writer: Any = SummaryWriter(str(directory))

    def scalars(self, values: Mapping[str, float], env_steps: int) -> None:
        """Add one point to each curve."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, env_steps)
        self._writer.flush()

    def animation(self, name: str, gif: bytes, size: tuple[int, int], env_steps: int) -> None:
        """Add an animated GIF, shown moving among the images."""
        width, height = size
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=gif)
        summary = Summary(value=[Summary.Value(tag=name, image=image)])
        self._writer.file_writer.add_summary(summary, env_steps)
        self._writer.flush()

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


class GpuMemory(Collector):
    """Memory that torch has on this process's GPU, read when it is asked for; nothing on a CPU.

    Only torch's own counters are read: calls to the driver would disturb a graph being captured.
    They are added up over all GPUs: a learner uses one, which need not be the first.
    """

    def collect(self) -> Iterable[Metric]:
        """Yield the gauge."""
        gauge = GaugeMetricFamily(
            "dreamer_gpu_memory_bytes",
            "Memory of the learner's GPU: allocated, reserved from the driver, most allocated.",
            labels=("kind",),
        )
        if torch.cuda.is_initialized():
            gpus = range(torch.cuda.device_count())
            gauge.add_metric(("allocated",), sum(map(torch.cuda.memory_allocated, gpus)))
            gauge.add_metric(("reserved",), sum(map(torch.cuda.memory_reserved, gpus)))
            gauge.add_metric(("peak",), sum(map(torch.cuda.max_memory_allocated, gpus)))
        yield gauge


class Exporter:
    """Prometheus metrics of the learner, on the loopback interface unless told otherwise."""

    def __init__(self, config_hash: str = "") -> None:
        self.registry = CollectorRegistry()
        self._seen: dict[str, float] = {}
        self._endpoint: MetricsEndpoint | None = None
        info = Info("dreamer_build", "What runs here.", registry=self.registry)
        info.info({"config_hash": config_hash, "version": _version()})
        self.registry.register(GpuMemory())
        self._gauges = {name: self._gauge(name, text) for name, text in _GAUGES.items()}
        for name in ("episode_return", "eval_return", *_PLAIN):
            # 0 is a number like any other: until there is one, curves have nothing to draw.
            self._gauges[name].set(math.nan)
        self._counters = {name: self._counter(name, text) for name, text in _COUNTERS.items()}
        self._phase = self._counter(
            "step_seconds", "Wall-clock seconds of the learner, by what it did.", ["phase"]
        )
        self._bound = self._gauge(
            "bound_share", "What bounds the run: share of the time by cause.", ["cause"]
        )
        self._training = {
            name: self._gauge(name, text, [label]) for name, (label, text) in _TRAINING.items()
        }
        self._metric = self._gauge("train_metric", "Other training metrics, by name.", ["name"])

    def serve(self, port: int, host: str = "127.0.0.1", token_file: Path | None = None) -> int:
        """Listen and return the port.

        Raises:
            ReplayConfigError: it would listen beyond loopback without a token, the port is taken,
                or the address is not of this machine.
        """
        self._endpoint = MetricsEndpoint(
            self.registry,
            host=host,
            port=port,
            token_file=token_file,
            flag="--learner.metrics-port",
        )
        return self._endpoint.port

    def update(self, gauges: Mapping[str, float], counters: Mapping[str, float]) -> None:
        """Set gauges, and move counters up to their new totals; unknown names are an error."""
        for name, value in gauges.items():
            self._gauges[name].set(value)
        for name, total in counters.items():
            self._advance(name, total, self._counters[name])

    def phases(self, totals: Mapping[str, float]) -> None:
        """Move the time of every phase up to its total in seconds."""
        for phase in PHASES:
            self._advance(f"phase/{phase}", totals[phase], self._phase.labels(phase))

    def bound(self, shares: Mapping[str, float], actors_wanted: int) -> None:
        """Set what bounds the run, see `learner.verdict.Verdict`."""
        for cause, share in shares.items():
            self._bound.labels(cause).set(share)
        self._gauges["bound_actors_wanted"].set(actors_wanted)

    def train(self, values: Mapping[str, float]) -> None:
        """Set training metrics: ``loss/rec`` is ``dreamer_loss{name="rec"}``.

        One optimiser for everything has no name: its label is ``all``.
        """
        for name, value in values.items():
            kind, _, part = name.partition("/")
            if kind in self._training:
                self._training[kind].labels(part or "all").set(value)
            elif name in _PLAIN:
                self._gauges[name].set(value)
            else:
                self._metric.labels(name).set(value)

    def close(self) -> None:
        """Stop listening."""
        if self._endpoint is not None:
            self._endpoint.close()

    def _advance(self, key: str, total: float, counter: Any) -> None:
        step = total - self._seen.get(key, 0.0)
        if step > 0:
            counter.inc(step)
            self._seen[key] = total

    def _gauge(self, name: str, text: str, labels: list[str] | None = None) -> Any:
        return Gauge(f"dreamer_{name}", text, labels or [], registry=self.registry)

    def _counter(self, name: str, text: str, labels: list[str] | None = None) -> Any:
        return Counter(f"dreamer_{name}", text, labels or [], registry=self.registry)


def _version() -> str:
    try:
        return version("dreamfleet")
    except PackageNotFoundError:
        return "not installed"


_GAUGES = {
    "replay_size_steps": "Steps that the mirror holds.",
    "replay_ratio_target": "Replayed steps per inserted step that the limiter keeps.",
    "replay_drift_steps": "Inserted steps times the ratio, less replayed steps.",
    "replay_budget_steps": "Inserted steps up to which actors are admitted.",
    "replay_memory_share": "Share of the replay server's memory limit that is used, 0 to 1.",
    "replay_servers": "Replay servers that share the work.",
    "replay_servers_away": "Replay servers that do not answer; their actors wait.",
    "mirror_memory_share": "Bytes of the full mirror by those there is room for, 1 at the limit.",
    "mirror_queue_share": "Share of the memory for chunks not yet applied that is used, 0 to 1.",
    "updates_waiting_seconds": "For how long no update could start; 0 while they run.",
    "inserts_waiting_seconds": "For how long no insert was admitted; 0 while they are.",
    "mirror_lag_chunks": "Chunks received and not yet applied.",
    "weights_update": "Updates of the last weights published.",
    "fence": "Fence of this learner's lineage.",
    "episode_return": "Mean return of the last 20 episodes.",
    "eval_return": "Mean return of the last 20 evaluation episodes.",
    "bound_actors_wanted": "More actors that would keep the learner busy, if it waits for them.",
    "checkpoint_last_success_timestamp_seconds": "When the last checkpoint was completed.",
    "checkpoint_seconds": "Duration of the last checkpoint.",
    "checkpoint_bytes": "Size of the last checkpoint.",
    "publish_seconds": "Duration of the last publication.",
    "weights_bytes": "Size of the last weights published.",
}
_PLAIN = {
    "entropy_nats": "Entropy of the policy in imagined states, in nats.",
    "value_mean": "Mean of the critic's values in imagined states.",
}
_GAUGES |= _PLAIN
_TRAINING = {
    "loss": ("name", "Mean loss of the last update logged."),
    "kl_nats": ("which", "KL divergence of posterior from prior, and both entropies, in nats."),
    "return_percentile": ("p", "Percentile of the returns that were imagined."),
    "value_percentile": ("p", "Percentile of the critic's values in imagined states."),
    "grad_norm": ("module", "Norm of the gradient before clipping, by module and by group."),
    "grad_clip_fraction": ("group", "Share of clipped tensors, or of updates clipped as one."),
    "param_norm": ("group", "Norm of the parameters that one optimiser moves."),
    "update_rms": ("group", "Root mean square of what one update moves parameters by."),
    "lr": ("group", "Learning rate."),
}
_COUNTERS = {
    "updates": "Updates of the agent.",
    "replay_inserted_steps": "Environment steps seen in the replay log.",
    "replay_sampled_steps": "Steps replayed.",
    "mirror_missed_steps": "Steps that left the log before the mirror read them.",
    "replay_losses": "How often the server had lost all its data and the replay was made anew.",
    "episodes": "Episodes finished.",
    "weights_published": "Publications that the hub accepted.",
    "weights_rejected": "Publications that the hub refused or that failed.",
    "checkpoint_failures": "Checkpoints that could not be written.",
    "skipped_updates": "Updates skipped because a loss or a gradient was not finite.",
}
