"""The train ratio as a credit account in exact integers."""

from __future__ import annotations

import logging
import math
from fractions import Fraction

from replay_service.chunk import max_blob_bytes
from replay_service.config import Limits, ReplayConfig
from replay_service.errors import ReplayConfigError
from replay_service.schema import Schema

log = logging.getLogger(__name__)


class CreditLimiter:
    """Keeps replayed steps per inserted step at a ratio, with a stated tolerance.

    With inserted steps ``I``, updates ``u``, batch steps ``m``, ratio ``r``, ``S = u·m`` and::

        drift = (I − i0)·r − S

    an update may start iff ``size ≥ min_size`` and ``drift − m ≥ −tol_s``, and ``n`` steps may be
    inserted iff ``size < min_size`` or ``drift + n·r ≤ tol_i``, that is
    ``I + n ≤ budget = i0 + ⌊(S + tol_i) / r⌋``. From the minimum size on, the drift therefore stays
    in ``[−tol_s, tol_i]``. The learner may see an old ``I`` and the server an old ``S``: both only
    grow, so an old value delays but never breaks the band.

    Args:
        train_ratio: replayed steps per inserted step; a Fraction, an int, or a decimal.
        batch_steps: B·L, steps replayed by one update.
        chunk_steps: largest number of steps inserted at once.
        min_size_steps: size at which training may start.
        capacity_steps: size at which the oldest are evicted.
        insert_tolerance: tol_i in replayed steps; None = max(4·m, 2·T·r).
        sample_tolerance: tol_s in replayed steps; None = the same.
        offset_steps: i0, steps inserted before the account starts; None = min_size_steps.
        shards: servers that share the budget. Each must have room for a whole chunk while updates
            wait for inserts, so that ``T`` above counts once for each, and two steps of rounding.

    Raises:
        ReplayConfigError: for a configuration that would deadlock or never train.
    """

    def __init__(
        self,
        *,
        train_ratio: Fraction | int | float | str,
        batch_steps: int,
        chunk_steps: int,
        min_size_steps: int,
        capacity_steps: int,
        insert_tolerance: int | None = None,
        sample_tolerance: int | None = None,
        offset_steps: int | None = None,
        shards: int = 1,
    ) -> None:
        # A float goes through its shortest decimal, so that 0.1 means one tenth.
        self.train_ratio = Fraction(str(train_ratio))
        if self.train_ratio <= 0:
            raise ReplayConfigError(f"train_ratio is {train_ratio}, expected a number above 0")
        self.batch_steps = batch_steps
        self.chunk_steps = chunk_steps
        self.min_size_steps = min_size_steps
        self.capacity_steps = capacity_steps
        self.shards = shards
        self._tolerances = insert_tolerance, sample_tolerance
        default = max(4 * batch_steps, math.ceil(2 * self.room_steps * self.train_ratio))
        self.tol_i = default if insert_tolerance is None else insert_tolerance
        self.tol_s = default if sample_tolerance is None else sample_tolerance
        self.i0 = min_size_steps if offset_steps is None else offset_steps
        self.reason = ""
        self._refuse_deadlocks()

    @property
    def room_steps(self) -> int:
        """Steps of budget with which every shard, however it is split, admits a whole chunk."""
        return self.chunk_steps if self.shards == 1 else self.shards * (self.chunk_steps + 2)

    def over(self, shards: int) -> CreditLimiter:
        """Return the same account, shared by so many servers.

        With more of them no budget and no tolerance is smaller than before, so that whatever was
        admitted still is.

        Raises:
            ReplayConfigError: the tolerances that were given leave no room for so many.
        """
        insert_tolerance, sample_tolerance = self._tolerances
        return CreditLimiter(
            train_ratio=self.train_ratio,
            batch_steps=self.batch_steps,
            chunk_steps=self.chunk_steps,
            min_size_steps=self.min_size_steps,
            capacity_steps=self.capacity_steps,
            insert_tolerance=insert_tolerance,
            sample_tolerance=sample_tolerance,
            offset_steps=self.i0,
            shards=shards,
        )

    def _refuse_deadlocks(self) -> None:
        ratio, batch, chunk = self.train_ratio, self.batch_steps, self.room_steps
        name = "chunk" if self.shards == 1 else "shards·(chunk + 2)"
        need = chunk * ratio + batch
        if self.tol_i + self.tol_s < need:
            raise ReplayConfigError(
                f"the tolerances {self.tol_i} + {self.tol_s} = {self.tol_i + self.tol_s} are below "
                f"{name}·ratio + batch = {chunk}·{ratio} + {batch} = {need}: inserts and updates "
                f"would wait for each other; set tolerance_steps to {math.ceil(need / 2)} or more, "
                "or lower chunk_steps"
            )
        if self.tol_i < chunk * ratio:
            raise ReplayConfigError(
                f"the tolerance {self.tol_i} is below {name}·ratio = {chunk}·{ratio} = "
                f"{chunk * ratio}: a chunk could not be inserted while the account is balanced; "
                "raise tolerance_steps or lower chunk_steps"
            )
        if self.min_size_steps < batch:
            raise ReplayConfigError(
                f"min_size_steps {self.min_size_steps} is below one batch, {batch} steps; raise it"
            )
        if self.capacity_steps < self.min_size_steps + self.chunk_steps:
            raise ReplayConfigError(
                f"capacity_steps {self.capacity_steps} is below min_size_steps + chunk_steps = "
                f"{self.min_size_steps} + {self.chunk_steps}: eviction could keep the replay below "
                "the size at which training starts; raise capacity_steps"
            )

    def replayed_steps(self, updates: int) -> int:
        """Return S after that many updates."""
        return updates * self.batch_steps

    def drift(self, inserted: int, updates: int) -> Fraction:
        """Return the account in replayed steps: positive if training lags behind inserting."""
        return (inserted - self.i0) * self.train_ratio - self.replayed_steps(updates)

    def may_start_update(self, size: int, inserted: int, updates: int) -> bool:
        """Whether update number `updates` (from 0) may start; otherwise `reason` says why not."""
        if size < self.min_size_steps:
            self.reason = f"updates wait for the first {self.min_size_steps} steps ({size} so far)"
            return False
        if self.drift(inserted, updates) - self.batch_steps < -self.tol_s:
            self.reason = f"updates wait for experience: {self.describe(inserted, updates)}"
            return False
        self.reason = ""
        return True

    def why_inserts_wait(self, size: int, inserted: int, updates: int) -> str:
        """Return why a whole chunk is not admitted now, or nothing if it is."""
        if size < self.min_size_steps or inserted + self.chunk_steps <= self.budget(updates):
            return ""
        return f"inserts wait for training: {self.describe(inserted, updates)}"

    def describe(self, inserted: int, updates: int) -> str:
        """Return the account in words: "33.1 replayed steps per step, band 31–33"."""
        paid = inserted - self.i0
        if paid <= 0:
            return (
                f"drift {float(self.drift(inserted, updates)):.0f} of [{-self.tol_s}, "
                f"{self.tol_i}] replayed steps at ratio {float(self.train_ratio):g}"
            )
        ratio = float(self.train_ratio)
        low, high = max(ratio - self.tol_i / paid, 0.0), ratio + self.tol_s / paid
        return (
            f"{self.replayed_steps(updates) / paid:.4g} replayed steps per step, "
            f"band {low:.4g}–{high:.4g}"
        )

    def budget(self, updates: int) -> int:
        """Return the total of inserted steps that this many updates pay for."""
        credit = (self.replayed_steps(updates) + self.tol_i) / self.train_ratio
        return self.i0 + math.floor(credit)


def plan_limits(
    config: ReplayConfig,
    schema: Schema,
    *,
    train_ratio: Fraction | int | float | str,
    batch_size: int,
    batch_length: int,
    window_steps: int,
    streams: int,
    shards: int = 1,
) -> tuple[Limits, CreditLimiter]:
    """Derive what the server enforces and the matching account from one configuration.

    The minimum size is raised to ``streams · window_steps`` where needed: by then at least one
    stream holds a whole window, however the first chunks are spread over the streams.

    Args:
        config, schema: the replay.
        train_ratio: replayed steps per inserted step.
        batch_size, batch_length: of one update.
        window_steps: sampled length including context records.
        streams: environments that write at the same time.
        shards: servers that they are spread over.

    Raises:
        ReplayConfigError: for a configuration that would deadlock or cannot hold enough.
    """
    min_size = max(config.min_size_steps, streams * window_steps)
    if min_size > config.min_size_steps:
        log.info(
            "replay_min_size_raised from=%d to=%d streams=%d window_steps=%d",
            config.min_size_steps,
            min_size,
            streams,
            window_steps,
        )
    limiter = CreditLimiter(
        train_ratio=train_ratio,
        batch_steps=batch_size * batch_length,
        chunk_steps=config.chunk_steps,
        min_size_steps=min_size,
        capacity_steps=config.capacity_steps - config.page_steps,
        insert_tolerance=config.tolerance_steps,
        sample_tolerance=config.tolerance_steps,
        shards=shards,
    )
    need = max_blob_bytes(schema, config.chunk_steps) * (min_size // config.chunk_steps + 2)
    if config.log_bytes < need:
        raise ReplayConfigError(
            f"three quarters of redis_memory_bytes = {config.log_bytes} bytes cannot hold the "
            f"minimum of {min_size} steps, which may take {need} bytes ({schema.step_bytes} a "
            f"step); set redis_memory_bytes to {need * 4 // 3 + 1} or more"
        )
    limits = Limits(
        capacity_steps=config.capacity_steps,
        capacity_bytes=config.log_bytes,
        min_size_steps=min_size,
        budget_steps=limiter.budget(0),
        max_chunk_steps=config.chunk_steps,
    )
    return limits, limiter
