"""What a learner tells of itself: to people, and as metrics."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from learner.status import Snapshot
from learner.waits import Standstill, lasting
from replay_service import ByteBudget, ReplayError

if TYPE_CHECKING:
    from learner.learner import Learner

log = logging.getLogger(__name__)


class Standing:
    """Reads a learner, and changes nothing of it.

    Args:
        learner: whose replay servers may become more while it runs.
    """

    def __init__(self, learner: Learner) -> None:
        self._learner = learner
        self._no_updates, self._no_inserts = Standstill(), Standstill()
        self._memory = ByteBudget(
            "replay server",
            "raise --replay.redis-memory-bytes (or the server's maxmemory), or lower "
            "--replay.capacity-steps; at 100 % actors wait, nothing is lost",
        )
        self._mirror_memory = ByteBudget(
            f"mirror in {learner.mirror.placement}",
            "it takes its place as it fills, and others may have taken some meanwhile: lower "
            "--replay.capacity-steps, or set --replay.placement to disk",
        )

    def snapshot(self) -> Snapshot:
        """Return what the run is doing now. Safe to call from another thread."""
        learner = self._learner
        stats = learner.publisher.stats
        age = time.monotonic() - stats.published_at if stats.published else None
        return learner.recorder.snapshot(
            env_steps=learner.env_steps,
            target_steps=learner.facts.target_steps,
            target_updates=learner.facts.target_updates,
            updates=learner.updates,
            ratio_actual=learner.ratio,
            ratio_target=float(learner.limiter.train_ratio),
            version=stats.version,
            weights_age_s=age,
            waiting_for=lasting(*self._updates_wait()),
            inserts_wait=self._who_waits(),
            replay_servers=learner.client.shards,
            phase=learner.outcome or None,
        )

    def _updates_wait(self) -> tuple[str, float]:
        """Return why no update starts, and for how many seconds none has."""
        learner = self._learner
        restoring = learner.reseeder.progress if learner.reseeder else ""
        reason = restoring or learner.pace.reason
        if reason and learner.mirror.trouble:
            reason = f"{reason} ({learner.mirror.trouble})"
        return reason, self._no_updates.seconds(reason, learner.updates)

    def _who_waits(self) -> str:
        """Return what inserts wait for and for how long, and first which servers are away."""
        learner = self._learner
        if learner.facts.target_updates is not None:
            # Nobody waits for a reader, which trains on with what it has.
            trouble = learner.mirror.trouble
            return f"new steps are not read: {trouble}" if trouble else ""
        away = f"some inserts wait: {learner.client.trouble}" if learner.client.trouble else ""
        return "; ".join(filter(None, (away, lasting(*self._inserts_wait()))))

    def _inserts_wait(self) -> tuple[str, float]:
        """Return why no insert is admitted, and for how many seconds none has been."""
        learner = self._learner
        reason, size = learner.unsettled, learner.mirror.size_steps
        if not reason and not learner.facts.lockstep:
            reason = learner.limiter.why_inserts_wait(size, learner.env_steps, learner.updates)
        return reason, self._no_inserts.seconds(reason, learner.env_steps)

    def export(self, values: Mapping[str, float]) -> None:
        """Write metrics of the update and of the run, to the files and for Prometheus."""
        learner = self._learner
        drift = float(learner.limiter.drift(learner.env_steps, learner.updates))
        stats, mirror = learner.publisher.stats, learner.mirror
        target = float(learner.limiter.train_ratio)
        learner.recorder.log(
            learner.env_steps,
            learner.updates,
            values,
            replay_steps=learner.replayed_steps,
            ratio_actual=learner.ratio,
            ratio_target=target,
            replay_size_steps=mirror.size_steps,
            drift_steps=drift,
        )
        gauges = {
            "replay_size_steps": mirror.size_steps,
            "replay_ratio_target": target,
            "replay_drift_steps": drift,
            "replay_budget_steps": learner.budget(),
            "replay_memory_share": self._memory_share(),
            "replay_servers": len(learner.client.shards) or 1,
            "replay_servers_away": learner.client.away or bool(learner.unsettled or mirror.trouble),
            "mirror_memory_share": self._mirror_memory.watch(*mirror.memory()),
            "mirror_queue_share": mirror.queue_share,
            "updates_waiting_seconds": self._updates_wait()[1],
            "inserts_waiting_seconds": self._inserts_wait()[1],
            "mirror_lag_chunks": mirror.lag_chunks,
            "weights_update": stats.version[1],
            "fence": learner.fence,
            "publish_seconds": stats.seconds,
            "weights_bytes": stats.size_bytes,
        }
        if learner.recorder.return_mean is not None:
            gauges["episode_return"] = learner.recorder.return_mean
        counters = {
            "updates": learner.updates,
            "replay_inserted_steps": learner.env_steps,
            "replay_sampled_steps": learner.replayed_steps,
            "mirror_missed_steps": mirror.missed_steps,
            "episodes": learner.recorder.episodes,
            "weights_published": stats.published,
            "weights_rejected": stats.rejected,
            "checkpoint_failures": learner.checkpoint_failures,
            "skipped_updates": learner.skipped_updates,
            "replay_losses": learner.reseeder.losses if learner.reseeder else 0,
        }
        learner.recorder.exporter.update(gauges, counters)

    def _memory_share(self) -> float:
        """Return the share of the server's memory that is used; the last known in an outage."""
        try:
            return self._memory.watch(*self._learner.client.memory())
        except ReplayError as error:
            log.debug("memory_unknown error=%s", error)
            return self._memory.share
