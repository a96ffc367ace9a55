"""What the user may choose about replay, and the limits that follow for one server."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from replay_service.chunk import MAX_CHUNK_STEPS
from replay_service.errors import ReplayConfigError

GIB = 1024**3
UNLIMITED_BUDGET = 2**52


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Which windows an update trains on, apart from new ones.

    The shares of ``recency`` and ``prioritised`` are of what ``online`` leaves; the rest is drawn
    evenly.
    """

    windows: Literal["any", "episodes"] = "any"
    """any draws every window of a stream alike, across episodes, which reset the state inside;
    episodes draws a complete episode, then a window within it, and skips episodes that are shorter
    than a window."""
    ends: bool = False
    """With windows episodes: draw the end of an episode more often, as if the start were drawn from
    the whole episode and moved back until the window fits."""
    online: float = 1.0
    """Largest share of a batch for windows that were never trained on (with replay.online)."""
    recency: float = 0.0
    """Share of a batch whose age is distributed exponentially."""
    recency_steps: int = 50_000
    """Mean of that age in steps."""
    prioritised: float = 0.0
    """Share of a batch that is drawn around steps with a high loss when they were last trained on.
    On a GPU every update then waits for its losses."""
    priority_exponent: float = 0.8
    """Power of the loss that is a step's priority; 0 makes all alike."""

    def __post_init__(self) -> None:
        for name in ("online", "recency", "prioritised"):
            share = getattr(self, name)
            if not 0.0 <= share <= 1.0:
                raise ReplayConfigError(f"sampling.{name} is {share}, expected a share of 0 to 1")
        if self.recency + self.prioritised > 1.0:
            raise ReplayConfigError(
                f"sampling.recency {self.recency} + sampling.prioritised {self.prioritised} = "
                f"{self.recency + self.prioritised} is more than the whole batch; lower one of them"
            )
        if not 0.0 <= self.priority_exponent <= 10.0:
            raise ReplayConfigError(
                f"sampling.priority_exponent is {self.priority_exponent}, expected 0 to 10"
            )
        _require_range("sampling.recency_steps", self.recency_steps, 1, 2**50)
        within = self.windows == "episodes"
        if self.ends and not within:
            raise ReplayConfigError(
                "sampling.ends is about the ends of episodes, and sampling.windows is "
                f"{self.windows}: set it to episodes, or leave ends out"
            )
        if self.recency and within:
            raise ReplayConfigError(
                f"sampling.recency {self.recency} draws windows across episodes, and "
                "sampling.windows is episodes: set it to any, or recency to 0"
            )


@dataclass(frozen=True, kw_only=True)
class ReplayConfig:
    """Size, transport and placement of the replay."""

    capacity_steps: int = 1_000_000
    """Steps that are kept, the oldest go first."""
    chunk_steps: int = 64
    """Steps per chunk (16 to 1024 for training; smaller only in tests)."""
    flush_age_s: float = 2.0
    """Seconds after which a partly filled chunk is sent at the next step; inf turns it off."""
    codec: Literal["auto", "zstd", "zlib", "raw"] = "auto"
    """Compression of chunks; auto decides per chunk."""
    min_size_steps: int = 1024
    """Steps that must be there before training starts."""
    tolerance_steps: int | None = None
    """Replayed steps by which the train ratio's account may lead or lag; None = the larger of four
    batches and two chunks' worth of replayed steps."""
    redis_memory_bytes: int = 4 * GIB
    """Memory limit of the Redis-protocol server; the log uses at most three quarters of it."""
    resend_chunks: int = 32
    """Acknowledged chunks that a writer keeps per stream in case the server forgets them."""
    resend_bytes: int = 256 * 2**20
    """Bytes of them that one actor process keeps over all its streams; the oldest go first."""
    pending_chunks: int = 2
    """Unacknowledged chunks per stream at which a writer waits."""
    placement: Literal["auto", "cuda", "ram", "disk"] = "auto"
    """Where the learner's decoded copy lives; auto takes the first of these that fits."""
    page_steps: int = 64
    """Steps per page of that copy."""
    online: bool = True
    """Train on every new window once, newest first, before drawing uniformly."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How the rest of a batch is drawn."""
    durability: Literal["none", "everysec", "strict"] = "everysec"
    """What the embedded server keeps. none: it writes nothing to disk, so its end is the replay's
    end. everysec: a power cut may take two seconds of acknowledged steps, and so may the death of
    the server, but only while a sync of a slow disk holds its writes back. strict: it acknowledges
    only what is on the disk, at the cost of one sync per insert."""
    on_data_loss: Literal["reseed", "continue"] = "reseed"
    """If the server loses all its data: reseed writes the learner's copy back before actors go on,
    so that a restarted learner finds it; continue goes on with an empty log, at once."""
    secrets: Path | None = None
    """Directory made by dreamfleet secrets: learner and actors log in with their own roles, and
    the embedded server admits nobody else."""
    password_file: Path | None = None
    """File whose first line is the password for --redis, readable by its owner alone; the user is
    the one in the address (redis://user@host:port)."""
    ca_file: Path | None = None
    """Certificate that must have signed the server's, for rediss:// addresses; None is the one in
    the directory of secrets, else what the system trusts."""
    take_over: bool = False
    """Continue the replay that another run has left on the server, and end that run if it goes on;
    otherwise such a server is refused. The run does not remember it."""
    listen: str | None = None
    """address:port at which the embedded server also listens, for actors on other machines; beyond
    loopback it needs secrets. None is a unix socket alone."""

    def __post_init__(self) -> None:
        _require_range("capacity_steps", self.capacity_steps, 1, 10**10)
        _require_range("chunk_steps", self.chunk_steps, 1, MAX_CHUNK_STEPS)
        _require_range("page_steps", self.page_steps, 1, 4096)
        _require_range("min_size_steps", self.min_size_steps, 1, self.capacity_steps)
        _require_range("redis_memory_bytes", self.redis_memory_bytes, 2**20, 2**50)
        _require_range("resend_chunks", self.resend_chunks, 1, 100_000)
        _require_range("resend_bytes", self.resend_bytes, 1, 2**50)
        _require_range("pending_chunks", self.pending_chunks, 1, 100_000)
        if not self.flush_age_s > 0:
            raise ReplayConfigError(f"flush_age_s is {self.flush_age_s}, expected a time above 0")
        if self.online and self.sampling.windows == "episodes":
            raise ReplayConfigError(
                "online windows are new stretches of a stream and cross episodes, and "
                "sampling.windows is episodes: set replay.online to false "
                "(--replay.no-online), or sampling.windows to any"
            )
        if self.tolerance_steps is not None:
            _require_range("tolerance_steps", self.tolerance_steps, 1, 2**50)

    @property
    def log_bytes(self) -> int:
        """Bytes of chunks that the server keeps: three quarters of its memory."""
        return self.redis_memory_bytes * 3 // 4


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one server enforces."""

    capacity_steps: int
    """Steps above which the oldest chunks are evicted."""
    capacity_bytes: int
    """Bytes of chunks above which the oldest chunks are evicted."""
    min_size_steps: int = 1
    """Inserts are always admitted below this size; 0 leaves all to the budget."""
    budget_steps: int = UNLIMITED_BUDGET
    """Inserted steps admitted until the first settlement (a later one replaces it)."""
    max_chunk_steps: int = MAX_CHUNK_STEPS
    """Longest chunk that is accepted."""

    def __post_init__(self) -> None:
        _require_range("capacity_steps", self.capacity_steps, 1, 2**50)
        _require_range("capacity_bytes", self.capacity_bytes, 1, 2**50)
        _require_range("min_size_steps", self.min_size_steps, 0, self.capacity_steps)
        _require_range("budget_steps", self.budget_steps, 0, 2**53)
        _require_range("max_chunk_steps", self.max_chunk_steps, 1, MAX_CHUNK_STEPS)


def _require_range(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ReplayConfigError(f"{name} is {value}, expected {low} to {high}")
