"""Configuration of the learner's loop, free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class LearnerConfig:
    """How the learner batches, publishes, saves and reports."""

    batch_size: int = 16
    """Windows B in one update."""
    batch_length: int = 64
    """Trained steps T of every window."""
    mode: Literal["auto", "eager", "compile", "graph"] = "auto"
    """How the update runs: plain torch, torch.compile, or one captured CUDA graph; auto picks graph
    on CUDA, and on the CPU compile for 1,500 updates and more where there is a C++ compiler, else
    eager."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the large products; auto is bf16 on CUDA and fp32 on the CPU."""
    threads: int = 0
    """Torch threads of the learner on the CPU; 0 leaves torch's own choice."""
    publish_every_s: float = 10.0
    """Longest time in seconds between two publications of the policy's weights."""
    publish_every_updates: int = 100
    """Updates after which the weights are published, if that comes first."""
    checkpoint_every_s: float = 300.0
    """Seconds between checkpoints; one is also written when the run ends for any reason."""
    checkpoint_every_steps: int = 0
    """Environment steps between checkpoints, 0 for none. A lockstep run knows only these: a clock
    would make it depend on the machine."""
    keep_checkpoints: int = 3
    """Newest checkpoints that stay on disk."""
    log_every_s: float = 5.0
    """Seconds between rows of metrics.jsonl and points in TensorBoard."""
    video_every_s: float = 600.0
    """Seconds between open-loop video predictions of image observations; 0 writes none."""
    metrics_port: int = 0
    """Port of the Prometheus endpoint; 0 takes a free one, -1 opens none."""
    metrics_listen: str = "127.0.0.1"
    """Address at which it listens; beyond loopback it needs a token."""
    metrics_token_file: Path | None = None
    """File whose first line readers of the endpoint must send as a bearer token, readable by its
    owner alone."""
    metrics_host: str | None = None
    """Name or address at which Prometheus reaches this machine, if it is another one."""

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if not value >= least:
                raise ValueError(
                    f"learner.{name} must be >= {least}, got {value}; "
                    f"set --learner.{name.replace('_', '-')}"
                )
        if self.metrics_port > 65535:
            raise ValueError(f"learner.metrics_port must be <= 65535, got {self.metrics_port}")


_LEAST = {
    "batch_size": 1,
    "batch_length": 2,
    "threads": 0,
    "publish_every_s": 0.01,
    "publish_every_updates": 1,
    "checkpoint_every_s": 1.0,
    "checkpoint_every_steps": 0,
    "keep_checkpoints": 1,
    "log_every_s": 0.1,
    "video_every_s": 0.0,
    "metrics_port": -1,
}
