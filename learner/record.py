"""What a run leaves behind while it trains: rows, curves, gauges, and a snapshot at any moment."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from learner.bound import PhaseClock, shares
from learner.files import JsonLines, read_rows
from learner.metrics import Board, Exporter
from learner.status import Snapshot
from learner.verdict import ActorTimes, Verdict, judge

WINDOW_S = 10.0
"""Time over which rates and shares are taken."""
EPISODES = 20
"""Episodes in the mean return."""
VERSIONS = 1000
"""Publications whose environment steps are remembered for the scores of evaluations."""
ABANDONED = "abandoned"
"""How an episode ends that its environment did not end; its return means nothing."""


class Recorder:
    """Write scores and metrics into a run directory, and remember what a snapshot needs.

    A resumed run appends. Episodes that the scores file already has are not written again, even
    though the mirror meets them again while it is rebuilt from the log. Offline, episodes are those
    of somebody else and are not written, and curves are drawn over updates.
    """

    def __init__(
        self,
        directory: Path,
        *,
        action_repeat: int = 1,
        config_hash: str = "",
        port: int = -1,
        offline: bool = False,
        host: str = "127.0.0.1",
        token_file: Path | None = None,
    ) -> None:
        self.clock = PhaseClock()
        self.exporter = Exporter(config_hash)
        self.port = self.exporter.serve(port, host, token_file) if port >= 0 else None
        self.losses: dict[str, float] = {}
        self.actors: list[dict[str, Any]] = []
        self.actor_times = ActorTimes()
        self.started_at = time.time()
        self.board = Board(directory)
        self._repeat, self._offline = action_repeat, offline
        rows = read_rows(directory / "scores.jsonl")
        scores = [row for row in rows if row["split"] == "train"]
        self.episodes = len(scores)
        self._scored = max((row["env_steps"] for row in scores), default=-1)
        whole = (row["return"] for row in scores if row["end"] != ABANDONED)
        self._returns = deque(whole, maxlen=EPISODES)
        played = (row["return"] for row in rows if row["split"] == "eval")
        self._eval_returns = deque(played, maxlen=EPISODES)
        self._eval_seen: dict[tuple[int, int], int] = {}
        self._published: deque[tuple[tuple[int, int], int]] = deque(maxlen=VERSIONS)
        self._scores = JsonLines(directory / "scores.jsonl")
        self._metrics = JsonLines(directory / "metrics.jsonl")
        self._lock = threading.Lock()
        self._history: deque[tuple[float, int, int, dict[str, float]]] = deque()

    @property
    def return_mean(self) -> float | None:
        """Mean return of the last 20 episodes; None before the first."""
        return float(np.mean(self._returns)) if self._returns else None

    @property
    def eval_mean(self) -> float | None:
        """Mean return of the last 20 evaluation episodes; None before the first."""
        return float(np.mean(self._eval_returns)) if self._eval_returns else None

    def note_published(self, version: tuple[int, int], env_steps: int) -> None:
        """Remember after how many environment steps weights were published."""
        self._published.append((version, env_steps))

    def note_actors(self, actors: list[dict[str, Any]]) -> None:
        """Take what the actors say about themselves; call it about once a second.

        Those that evaluate bring scores, which are written once each.
        """
        for actor in actors:
            if actor.get("split") == "eval":
                self._score_eval(actor, actor.pop("scores", []))
        self.actors = actors
        self.actor_times.note([actor for actor in actors if actor.get("split") != "eval"])

    def _score_eval(self, actor: Mapping[str, Any], scores: Iterable[Mapping[str, Any]]) -> None:
        """Write a row for each new evaluation episode, at the steps its weights had seen."""
        life = int(actor["slot"]), int(actor["life"])
        for score in scores:
            if score["number"] <= self._eval_seen.get(life, 0):
                continue
            self._eval_seen[life] = score["number"]
            version = (int(score["version"][0]), int(score["version"][1]))
            newest = self._history[-1][1] if self._history else 0
            env_steps = dict(self._published).get(version, newest)
            self._eval_returns.append(score["return"])
            self._write_score(
                env_steps,
                score["return"],
                score["length"],
                score["end"],
                f"eval-{life[0]}-{life[1]}",
                version,
                "eval",
            )

    def whole(self) -> Verdict:
        """Return what bounded the run so far, the time before its first update left out."""
        totals = self.clock.totals() | {"warmup": 0.0}
        return judge(shares(totals, dict.fromkeys(totals, 0.0)), self.actor_times.overall())

    def score(self, events: Iterable[Any]) -> None:
        """Write a row for each new episode that the actors finished."""
        if self._offline:
            return
        fresh = [event for event in events if event.env_steps > self._scored]
        for event in fresh:
            self._write_score(
                event.env_steps,
                event.ret,
                event.length,
                event.end,
                event.stream,
                event.version,
                "train",
            )
            if event.end != ABANDONED:
                self._returns.append(event.ret)
            self.episodes += 1
        self._scored = max([self._scored, *(event.env_steps for event in fresh)])

    def _write_score(
        self,
        env_steps: int,
        ret: float,
        length: int,
        end: str,
        actor: str,
        version: tuple[int, int],
        split: str,
    ) -> None:
        row = {
            "env_steps": env_steps,
            "env_frames": env_steps * self._repeat,
            "return": ret,
            "length": length,
            "end": end,
            "actor": actor,
            "policy_version": list(version),
            "split": split,
        }
        with self._lock:
            self._scores.write(row)

    def log(self, env_steps: int, updates: int, values: Mapping[str, float], **facts: Any) -> None:
        """Write one row of metrics, a point of every curve, and the Prometheus gauges."""
        self.losses = dict(values)
        rates, part = self._recent(env_steps, updates)
        general = {"env_steps_per_s": rates[0], "updates_per_s": rates[1], **facts}
        if self.return_mean is not None:
            general["episode_return"] = self.return_mean
        if self.eval_mean is not None:
            general["eval_return"] = self.eval_mean
            self.exporter.update({"eval_return": self.eval_mean}, {})
        row = {"time": time.time(), "env_steps": env_steps, "env_frames": env_steps * self._repeat}
        row |= {"updates": updates, **general, **values}
        row |= {f"share/{phase}": share for phase, share in part.items()}
        found = judge(part, self.actor_times.recent())
        self._metrics.write(row | {"bound_by": found.name})
        numbers = {k: float(v) for k, v in (general | dict(values)).items() if v is not None}
        shown = {f"share/{phase}": share for phase, share in part.items()}
        self.board.scalars(numbers | shown, updates if self._offline else env_steps)
        self.exporter.train(values)
        self.exporter.phases(self.clock.totals())
        self.exporter.bound(found.shares, found.actors_wanted)

    def snapshot(
        self,
        *,
        env_steps: int,
        target_steps: int,
        updates: int,
        ratio_actual: float,
        ratio_target: float,
        version: tuple[int, int],
        weights_age_s: float | None,
        waiting_for: str,
        inserts_wait: str = "",
        replay_servers: Sequence[Mapping[str, Any]] = (),
        target_updates: int | None = None,
        phase: str | None = None,
    ) -> Snapshot:
        """Return what the run is doing now. Safe to call from another thread.

        With a phase given the run is over, and the verdict is about all of it.
        """
        rates, part = self._recent(env_steps, updates)
        found = self.whole() if phase else judge(part, self.actor_times.recent())
        left, rate = max(0, target_steps - env_steps), rates[0]
        if target_updates is not None:
            left, rate = max(0, target_updates - updates), rates[1]
        return Snapshot(
            env_steps=env_steps,
            target_steps=target_steps,
            env_steps_per_s=rates[0],
            updates=updates,
            updates_per_s=rates[1],
            ratio_actual=ratio_actual,
            ratio_target=ratio_target,
            return_mean20=self.return_mean,
            eval_mean20=self.eval_mean,
            episodes=self.episodes,
            losses=self.losses,
            policy_version=version,
            weights_age_s=weights_age_s,
            bound_by=found.name,
            advice="" if self._offline else found.advice,
            target_updates=target_updates,
            shares=part,
            eta_s=left / rate if rate > 0 else None,
            phase=phase or self.clock.phase,
            waiting_for=waiting_for,
            inserts_wait=inserts_wait,
            replay_servers=[dict(server) for server in replay_servers],
            pid=os.getpid(),
            started_at=self.started_at,
            per_actor=self.actors,
            metrics_port=self.port,
        )

    def close(self) -> None:
        """Close every file and stop the endpoint."""
        self._scores.close()
        self._metrics.close()
        self.board.close()
        self.exporter.close()

    def _recent(self, env_steps: int, updates: int) -> tuple[tuple[float, float], dict[str, float]]:
        """Return (steps/s, updates/s) and the share of every phase over the last seconds."""
        now, totals = time.monotonic(), self.clock.totals()
        past = self._history
        with self._lock:
            if not past or now - past[-1][0] > WINDOW_S / 20:
                past.append((now, env_steps, updates, totals))
            while len(past) > 2 and now - past[0][0] > WINDOW_S:
                past.popleft()
            then, steps, done, before = past[0]
        elapsed = max(now - then, 1e-9)
        if elapsed < WINDOW_S / 20:
            return (0.0, 0.0), shares(totals, dict.fromkeys(totals, 0.0))
        return ((env_steps - steps) / elapsed, (updates - done) / elapsed), shares(totals, before)
