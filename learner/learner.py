"""The learner: experience in, updates, weights out."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dreamer.agent import Agent
from learner import checkpoint
from learner.batch import make_batch
from learner.config import LearnerConfig
from learner.errands import Errands
from learner.offline import NoPublisher
from learner.pace import Pace
from learner.publish import Publisher
from learner.record import Recorder
from learner.skipped import save_batch
from learner.standing import Standing
from learner.status import Snapshot
from learner.step import UpdateStep
from learner.throttle import Throttle
from learner.video import write_videos
from replay_service import (
    ReplayFenced,
    ReplayMissing,
    ReplayUnavailable,
    Reseeder,
    ShardedClient,
    ShardedReseeder,
    continue_account,
)

log = logging.getLogger(__name__)

WAIT_S = 0.5
"""Longest time for which one wait keeps the loop from its other duties."""
SETTLE_EVERY_S = 0.05
SETTLE_RETRY_S = 1.0
VIDEO_CONTEXT = 5
"""Frames that a video prediction sees before it imagines."""
LATENTS = {"deter", "stoch"}
UNLIMITED = 2**52
SKIPPED_IN_A_ROW = 3
"""Updates that may not be finite one after the other before the run ends."""


class LearnerError(RuntimeError):
    """Training cannot go on; the message says why and what to do."""


class LearnerReplaced(LearnerError):
    """Another learner has taken over, and with it all that outlives this one."""


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What the learner has to know about its run."""

    directory: Path
    """Run directory."""
    seed: int
    """Seed of everything that the learner draws."""
    target_steps: int
    """Environment steps at which training ends."""
    config_hash: str
    """Hash of the resolved configuration."""
    target_updates: int | None = None
    """Updates at which training ends, of a learner that only reads a replay."""
    lockstep: bool = False
    """Whether actor and learner take turns, and checkpoints allow a bitwise continuation."""


class Learner:
    """Absorb experience, update at the pace of the limiter, publish, save, report.

    1. The mirror changes only between updates, in ``absorb``: no window is ever torn.
    2. Nothing waits without a reason: ``snapshot`` says what the loop waits for.
    3. ``run`` ends when the target is reached and every update that its steps pay for is done, or
       soon after ``stop`` is set; a checkpoint of everything is on the disk either way.
    4. A resumed learner continues counters, optimiser, normalisers and the limiter's account.
    5. What other threads want of it is done in its own, ``between`` two updates.
    6. One that another has replaced while it slept finds out before it saves, and writes nothing.

    Attributes:
        unsettled: why the server does not know how much was replayed; empty while it does.
    """

    def __init__(
        self,
        config: LearnerConfig,
        facts: RunFacts,
        *,
        agent: Agent,
        step: UpdateStep,
        mirror: Any,
        client: Any,
        limiter: Any,
        pace: Pace,
        publisher: Publisher | NoPublisher,
        recorder: Recorder,
        fence: int,
        reseeder: Reseeder | ShardedReseeder | None = None,
    ) -> None:
        self.config, self.facts = config, facts
        self.agent, self.step, self.mirror, self.client = agent, step, mirror, client
        self.limiter, self.pace, self.publisher = limiter, pace, publisher
        self.recorder, self.fence, self.reseeder = recorder, fence, reseeder
        self.updates = 0
        self.stop, self.between = threading.Event(), Errands()
        self.outcome = ""
        self._values: dict[str, float] = {}
        self.unsettled = ""
        self.standing = Standing(self)
        self.checkpoint_failures = 0
        self.skipped_updates = 0
        if facts.lockstep:
            # So that what is behind the last row written can be told from it, see `_latents`.
            assert mirror.inserted_steps == 0, "a lockstep learner starts with an empty mirror"
            for key in LATENTS & mirror.columns.keys():
                mirror.columns[key].zero_()
        self._generation = 0
        self._throttle = Throttle(next(agent.parameters()).device)
        start = time.monotonic()
        self._published_at, self._published_update = -math.inf, -1
        self._saved_at, self._saved_steps = start, 0
        self._logged_at, self._logged_update = start, 0
        self._video_at, self._settle_at = start, -math.inf

    @property
    def env_steps(self) -> int:
        """Environment steps that this learner has seen in the log."""
        return int(self.mirror.inserted_steps)

    @property
    def replayed_steps(self) -> int:
        """Steps trained on: a pure function of the number of updates."""
        return self.updates * self.config.batch_size * self.config.batch_length

    @property
    def ratio(self) -> float:
        """Replayed steps per environment step, since the account began."""
        return self.replayed_steps / max(1, self.env_steps - self.limiter.i0)

    def run(self) -> str:
        """Train to the end, and return how it ended: ``finished`` or ``stopped``.

        Raises:
            LearnerError: training diverged.
            LearnerReplaced: another learner has taken over this replay.
        """
        self._publish_if_due()
        self._settle(now=True)
        try:
            while not (self.stop.is_set() or self._complete()):
                self._absorb()
                if self.pace.may_update(self.updates):
                    self._update()
                else:
                    self._wait()
                self._publish_if_due()
                self._checkpoint_if_due()
                self._log_if_due()
                self._settle()
                self.between.run()
        finally:
            self.between.close()
        return self._finish()

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Continue from a checkpoint, on a mirror that has been rebuilt from the log.

        Raises:
            LearnerError: it holds another agent.
        """
        state = saved.state
        try:
            self.agent.load_state_dict(state["agent"])
        except RuntimeError as error:
            raise LearnerError(
                f"checkpoint {saved.path} holds another agent: {error}; it was written by another "
                "version of this program: continue it with that one, or choose another --run-dir"
            ) from error
        self.mirror.restore_online(state["online"])
        priorities = _with_held(state.get("priorities", {}), torch.Tensor.numpy)
        self.mirror.restore_priorities(priorities)
        self.updates = self._logged_update = int(state["updates"])
        self._saved_steps = int(state["env_steps"])
        torch.set_rng_state(state["rng"].cpu())
        if state["rng_cuda"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all([rng.cpu() for rng in state["rng_cuda"]])
        if self.facts.lockstep:
            self._restore_latents(state["latents"])

    def share_replay(self, client: ShardedClient, limiter: Any, reseeder: ShardedReseeder) -> None:
        """Go on with more replay servers than before; for an errand `between` updates."""
        self.client, self.reseeder = client, reseeder
        self.limiter = self.pace.limiter = limiter

    def continue_account(self, env_steps: int) -> None:
        """Count on from so many environment steps where a server has lost its data and is empty."""
        log.error(
            "replay_lost %d of the %d environment steps of the checkpoint are not there any more: "
            "training goes on with at least %d steps",
            env_steps - self.env_steps,
            env_steps,
            self.limiter.min_size_steps,
        )
        continue_account(
            self.client,
            self.mirror,
            fence=self.fence,
            inserted_steps=env_steps,
            replayed_steps=self.replayed_steps,
            budget_steps=self.budget(),
        )

    def snapshot(self) -> Snapshot:
        """Return what the run is doing now. Safe to call from another thread."""
        return self.standing.snapshot()

    def save(self) -> Path | None:
        """Write a checkpoint of everything. Returns None, and counts, if the disk refuses.

        Raises LearnerReplaced if another has taken over, as the server or the folder says.
        """
        self._settle(now=True)
        begin = time.monotonic()
        with self.recorder.clock.during("checkpoint"):
            self._take_metrics()
            try:
                path = checkpoint.save(
                    self.facts.directory / "checkpoints",
                    self._state(),
                    fence=self.fence,
                    update=self.updates,
                    env_steps=self.env_steps,
                    keep=self.config.keep_checkpoints,
                    config_hash=self.facts.config_hash,
                )
            except checkpoint.CheckpointError as error:
                self.checkpoint_failures += 1
                log.error("checkpoint_failed error=%s", error)
                return None
            except ReplayFenced as error:
                raise LearnerReplaced(f"{error}; this one stops") from error
        self.recorder.exporter.update(
            {
                "checkpoint_seconds": time.monotonic() - begin,
                "checkpoint_bytes": sum(file.stat().st_size for file in path.iterdir()),
                "checkpoint_last_success_timestamp_seconds": time.time(),
            },
            {},
        )
        return path

    def _complete(self) -> bool:
        """Whether the target is reached and no update is owed for the steps that led there."""
        if self.env_steps < self.facts.target_steps or not self.pace.at_rest(self.updates):
            return False
        return self.limiter.drift(self.env_steps, self.updates) < self.limiter.batch_steps

    def _absorb(self) -> None:
        with self.recorder.clock.during("update"):
            self._settle_step()
        with self.recorder.clock.during("data_wait"):
            self.recorder.score(self.mirror.absorb())

    def _settle_step(self) -> None:
        """Hand latents and losses of the last update to the mirror, before it changes."""
        self.step.settle()
        if self.mirror.prioritised and (found := self.step.take_losses()) is not None:
            self.mirror.write_priorities(*found, self._generation)

    def _update(self) -> None:
        batch, seed = self.config.batch_size, self.facts.seed
        with self.recorder.clock.during("compile" if self.step.compiling else "update"):
            self._generation = self.mirror.generation
            uniforms, starts = self.mirror.draw(seed, self.updates, batch)
            self.step(uniforms, starts, _mix(seed, self.updates))
            self.updates += 1
            self._throttle.submitted()

    def _wait(self) -> None:
        self._settle(now=True)
        warm = self.mirror.size_steps >= self.limiter.min_size_steps
        with self.recorder.clock.during("environments" if warm else "warmup"):
            self.pace.more(self.updates, WAIT_S)

    def _publish_if_due(self) -> None:
        if self.facts.lockstep:
            return  # every round begins with a publication of its own
        config, now = self.config, time.monotonic()
        behind = self.updates - self._published_update
        # Without updates there is nothing new to publish, unless it has not arrived: actors wait
        # for the first weights.
        wanted = behind > 0 or self.publisher.stats.failed is not None
        late = now - self._published_at >= config.publish_every_s and wanted
        if not late and behind < config.publish_every_updates:
            return
        with self.recorder.clock.during("publish"):
            if self.publisher.publish(self.updates):
                self._published_at, self._published_update = now, self.updates
                self.recorder.note_published((self.fence, self.updates), self.env_steps)

    def _checkpoint_if_due(self) -> None:
        if self._checkpoint_due():
            self.save()
            self._saved_at, self._saved_steps = time.monotonic(), self.env_steps
            self.pace.saved()

    def _checkpoint_due(self) -> bool:
        every = self.config.checkpoint_every_steps
        by_steps = every > 0 and self.env_steps // every > self._saved_steps // every
        if self.facts.lockstep:
            return by_steps and self.pace.at_rest(self.updates)
        return by_steps or time.monotonic() - self._saved_at >= self.config.checkpoint_every_s

    def _log_if_due(self) -> None:
        now = time.monotonic()
        if now - self._logged_at < self.config.log_every_s:
            return
        self._logged_at = now
        self._restore_if_replaced()
        with self.recorder.clock.during("log"):
            self._take_metrics()
            self.standing.export(self._values)
            self._logged_update = self.updates
        every = self.config.video_every_s
        if every and now - self._video_at >= every and self.updates > 0:
            with self.recorder.clock.during("log"):
                self._video()
            self._video_at = now

    def _settle(self, now: bool = False) -> None:
        """Tell the server how much was replayed, and how many inserts that pays for."""
        moment = time.monotonic()
        if moment < self._settle_at and not now:
            return
        with self.recorder.clock.during("settle"):
            try:
                self._settle_or_restore()
            except ReplayFenced as error:
                raise LearnerReplaced(f"{error}; this one stops") from error
            except ReplayUnavailable as error:
                log.warning("settle_failed error=%s", error)
                # Several servers are named one by one, see `Standing`.
                why = "no replay server answers" if self.client.shards else str(error)
                self.unsettled = f"inserts wait: {why}"
                self._settle_at = moment + SETTLE_RETRY_S
                return
        self.unsettled, self._settle_at = "", moment + SETTLE_EVERY_S

    def _settle_or_restore(self) -> None:
        try:
            self.client.settle(self.fence, self.replayed_steps, self.budget())
        except ReplayMissing:
            if self.reseeder is None:
                raise
            self._restore_replay(self.reseeder)

    def _restore_replay(self, reseeder: Reseeder | ShardedReseeder) -> None:
        """Put the replay that the server has lost back, as far as the mirror has it."""
        events = reseeder.run(self.replayed_steps, self.budget(), self.stop.is_set)
        self.recorder.score(events)

    def _restore_if_replaced(self) -> None:
        """Look whether somebody else has emptied the server and created the replay anew."""
        if self.reseeder is None:
            return
        try:
            if self.reseeder.replaced():
                self._restore_replay(self.reseeder)
        except ReplayFenced as error:
            raise LearnerReplaced(f"{error}; this one stops") from error
        except ReplayUnavailable as error:
            log.debug("replay_unknown error=%s", error)

    def budget(self) -> int:
        """Return the total of inserted steps up to which actors are admitted."""
        if self.facts.lockstep:
            return UNLIMITED  # its actors step when they are asked to
        # The chunk that crosses the target must still fit, or the target is never reached.
        last = self.facts.target_steps + self.limiter.room_steps - 1
        return min(self.limiter.budget(self.updates), max(last, self.env_steps))

    def _finish(self) -> str:
        """Save, log and say how the run ended."""
        with self.recorder.clock.during("data_wait"):
            self.step.settle()
        if self.updates > self._logged_update:
            self._take_metrics()
            self.standing.export(self._values)
            self._logged_update = self.updates
        if self.save() is None:
            raise LearnerError(
                "the final checkpoint could not be written (see the log); earlier ones are kept: "
                "mend the disk and start again with the same run directory"
            )
        self.outcome = "finished" if self._complete() else "stopped"
        return self.outcome

    def _take_metrics(self) -> None:
        """Fetch the metrics since the last time from the device; a diverged run ends here."""
        self._values = self.step.take_metrics() or self._values
        skipped = self.step.take_skipped()
        if not skipped.updates:
            return
        self.skipped_updates += skipped.updates
        saved = save_batch(
            self.facts.directory / "skipped", self.updates, self.step.skipped_window()
        )
        log.warning(
            "updates_skipped count=%d in_a_row=%d total=%d batch=%s reason=%s",
            skipped.updates,
            skipped.in_a_row,
            self.skipped_updates,
            saved or "none",
            "a loss or a gradient was not finite",
        )
        if skipped.in_a_row >= SKIPPED_IN_A_ROW:
            raise LearnerError(
                f"training diverged before update {self.updates}: {skipped.in_a_row} updates in a "
                "row had a loss or a gradient that was not finite, and were skipped"
                f"{f'; the last batch of them is in {saved}' if saved else ''}. Parameters and "
                "the last checkpoint are finite: resume it with another --seed, a lower learning "
                "rate (--agent.optim.*), or --learner.precision fp32"
            )

    def _video(self) -> None:
        """Write moving pictures of the last windows; the run's randomness is untouched."""
        open_loop: Any = getattr(self.agent, "open_loop", None)
        if open_loop is None:
            return
        self.step.settle()
        with torch.random.fork_rng():
            window = {k: v.to(self.step.device) for k, v in self.step.sample().items()}
            found = open_loop(make_batch(window, self.agent), VIDEO_CONTEXT)
        if not found:
            return
        folder = self.facts.directory / "videos"
        written = write_videos(folder, found, VIDEO_CONTEXT, self.env_steps)
        for name, (gif, size) in written.items():
            self.recorder.board.animation(name, gif, size, self.env_steps)

    def _state(self) -> dict[str, Any]:
        """Return everything that a checkpoint holds."""
        self._settle_step()
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        state = {
            "agent": self.agent.state_dict(),
            "updates": self.updates,
            "env_steps": self.env_steps,
            "replayed_steps": self.replayed_steps,
            "episodes": self.recorder.episodes,
            "fence": self.fence,
            "limiter": {
                "ratio": str(self.limiter.train_ratio),
                "i0": self.limiter.i0,
                "budget": self.limiter.budget(self.updates),
            },
            "online": self.mirror.online_state(),
            "priorities": _with_held(self.mirror.priority_state(), torch.from_numpy),
            "rng": torch.get_rng_state(),
            "rng_cuda": cuda,
            "config_hash": self.facts.config_hash,
        }
        if self.facts.lockstep:
            state["latents"] = self._latents()
        return state

    def _latents(self) -> dict[str, torch.Tensor]:
        """Return the stored latents, which the log has only as the actors first wrote them.

        Rows that were never written are zero, and those behind the last written one left out.
        """
        found = {key: self.mirror.columns[key] for key in LATENTS & self.mirror.columns.keys()}
        if not found:
            return {}
        written = found["deter"].any(-1).nonzero()
        rows = int(written[-1]) + 1 if len(written) else 0
        return {key: values[:rows].clone() for key, values in found.items()}

    def _restore_latents(self, latents: dict[str, torch.Tensor]) -> None:
        for key, values in latents.items():
            self.mirror.columns[key][: len(values)].copy_(values)


def _with_held(priorities: dict[str, Any], convert: Callable[[Any], Any]) -> dict[str, Any]:
    """Return priorities with their arrays converted: a checkpoint holds tensors, a mirror numpy."""
    if not priorities:
        return {}
    return priorities | {"held": [(sid, at, convert(x)) for sid, at, x in priorities["held"]]}


def _mix(seed: int, update: int) -> int:
    """Return a seed for one update, far from those of its neighbours and of other runs."""
    return int(np.random.SeedSequence((seed, update)).generate_state(1, np.uint64)[0] >> 1)
