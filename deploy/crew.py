"""The actors of one run: free, or in turns with the learner (lockstep)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from actors.actor import ActorSpec
from actors.config import EvalConfig, FleetConfig
from actors.fleet import Fleet, Supervision
from actors.roster import HUB, end_named, namespace_of
from actors.standing import Plan, StandingFleet
from actors.weights import HubSource
from deploy.evaluate import SEED_OFFSET
from learner.bound import PhaseClock
from learner.learner import LearnerError
from learner.publish import Publisher
from replay_service import ReplayClient, ShardedClient

log = logging.getLogger(__name__)

PUBLISH_S = 150.0
COLLECT_S = 600.0
DRAIN_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How the actors of a run outlive their learner."""

    run_id: str
    """Of the run directory; no other run shares it."""
    config: FleetConfig

    @property
    def namespace(self) -> str:
        """Where Ray knows hub, fleet and actors of this run by name."""
        return namespace_of(self.run_id)


class Crew:
    """A fleet that is described first and started later, and in lockstep collects in rounds.

    Args:
        spec: what every actor does.
        hub: where they get their weights.
        client: of the replay server.
        actors: how many.
        evaluation: actors that play for scores alone. They go on during a round and a cut, and
            their failures are seen in `stats` and do not end the run.
        cpus_per_actor: slots of Ray that each takes.
        resources: of Ray, which each of them takes from its node.
        standing: how they outlive this process; None ends them with it.
    """

    def __init__(
        self,
        spec: ActorSpec,
        hub: Any,
        client: ReplayClient | ShardedClient,
        *,
        actors: int,
        evaluation: EvalConfig | None = None,
        cpus_per_actor: float = Supervision.cpus_per_actor,
        resources: Mapping[str, float] | None = None,
        standing: Standing | None = None,
    ) -> None:
        assert standing is None or not spec.lockstep, "lockstep needs its learner"
        self._standing = standing
        self._spec, self._hub, self._client, self._actors = spec, hub, client, actors
        self._evaluation = evaluation or EvalConfig()
        self._evaluators: Fleet | StandingFleet | None = None
        self._supervision = Supervision(
            cpus_per_actor=cpus_per_actor, resources_per_actor=resources or {}
        )
        self._on_failure: Callable[[], None] = lambda: None
        self._fleet: Fleet | StandingFleet | None = None
        self._publisher: Publisher | None = None
        self._fence = 0
        self._clock = PhaseClock()

    def bind(self, publisher: Publisher, fence: int, clock: PhaseClock) -> None:
        """Say whose weights a round in lockstep is collected with, and who counts the time."""
        self._publisher, self._fence, self._clock = publisher, fence, clock

    def start(self, on_failure: Callable[[], None]) -> None:
        """Start the actors. The function is called, from a thread, if they cannot work."""
        self._on_failure = on_failure
        self._start_training()
        wanted = self._evaluation
        if wanted.actors:
            spec = replace(
                self._spec,
                envs=1,
                seed=self._spec.seed + SEED_OFFSET,
                mode=self._spec.agent.evaluation,
                lockstep=False,
                split="eval",
                episodes=wanted.episodes,
                rest_s=wanted.every_s,
            )
            self._evaluators = self._described(spec, wanted.actors, None)
            self._evaluators.start()

    def _start_training(self) -> None:
        fleet = self._described(self._spec, self._actors, lambda message: self._on_failure())
        fleet.start()
        self._fleet = fleet

    def _described(
        self, spec: ActorSpec, actors: int, on_failure: Callable[[str], None] | None
    ) -> Fleet | StandingFleet:
        if self._standing is None:
            return Fleet(
                spec,
                HubSource(self._hub),
                actors=actors,
                supervision=self._supervision,
                on_failure=on_failure,
            )
        plan = Plan(
            namespace=self._standing.namespace,
            spec=spec,
            supervision=self._supervision,
            orphan_after_s=self._standing.config.orphan_after_s,
            actors=actors,
        )
        return StandingFleet(plan, fence=self._fence, on_failure=on_failure)

    def scale(self, actors: int) -> None:
        """Let actors join or leave a run that is going on; see `Fleet.scale`.

        Raises:
            FleetError, ValueError: it cannot be done.
        """
        if self._fleet is not None:
            self._fleet.scale(actors)
        self._actors = actors

    def redirect(self, replay_url: str) -> None:
        """Let actors write to these replay servers from now on; see `Fleet.redirect`."""
        self._spec = replace(self._spec, replay_url=replay_url)
        # Those that evaluate write nowhere; the next learner must find that they do what it wants.
        for fleet in (self._fleet, self._evaluators):
            if fleet is not None:
                fleet.redirect(replay_url)

    def check(self) -> None:
        """Raise FleetError if the fleet has failed."""
        if self._fleet is not None:
            self._fleet.check()

    def stats(self) -> list[dict[str, Any]]:
        """Return what every actor says about itself, those that evaluate after the others."""
        fleets = (self._fleet, self._evaluators)
        return [actor for fleet in fleets if fleet is not None for actor in fleet.stats()]

    def summary(self) -> dict[str, Any]:
        """Return what `actors.metrics.FleetMetrics` exports, before the actors start too."""
        if self._fleet is not None:
            return self._fleet.summary()
        return {"desired": self._actors, "states": {}, "restarts": {}, "quarantined": 0}

    def end(self, drain_s: float, *, leave: bool = False) -> None:
        """Stop the actors, and the hub if it would outlive this process.

        Whatever has a newer learner is left to that.

        Args:
            drain_s: time in which they may deliver what they hold.
            leave: leave those that can outlive this process to the next learner.
        """
        if leave and self._standing is not None:
            for fleet in (self._evaluators, self._fleet):
                if isinstance(fleet, StandingFleet):
                    fleet.leave()
            log.warning(
                "fleet_left it goes on, for %.0f s where no learner takes it over, as the same "
                "command does; `dreamfleet stop` ends it",
                self._standing.config.orphan_after_s,
            )
            return
        if self._evaluators is not None:
            self._evaluators.stop(0.0)
        if self._fleet is not None:
            self._fleet.stop(drain_s)
        replaced = isinstance(self._fleet, StandingFleet) and self._fleet.replaced
        if self._standing is not None and not replaced:
            end_named(HUB, self._standing.namespace)

    def collect(self, updates: int) -> int:
        """Collect a chunk from every environment with the weights after so many updates.

        Returns:
            Steps inserted since the beginning, all of which the mirror will receive.

        Raises:
            LearnerError: the weights could not be published.
            FleetError: an actor failed.
        """
        publisher, version = self._publisher, (self._fence, updates)
        assert publisher is not None and isinstance(self._fleet, Fleet), "bind and start come first"
        if publisher.stats.version != version:
            with self._clock.during("publish"):
                publisher.publish(updates)
                arrived = publisher.wait(PUBLISH_S)
            if not arrived or publisher.stats.version != version:
                raise LearnerError(
                    f"weights {version} could not be published, and a run in lockstep cannot go on "
                    "without them; the log says why"
                )
        self._fleet.collect(self._spec.replay.chunk_steps, version, COLLECT_S)
        return self._client.stats().inserted_steps

    def cut(self) -> None:
        """End all episodes and streams, and begin new ones with the seeds of a resumed run."""
        if self._fleet is not None:
            self._fleet.stop(DRAIN_S)
        self._start_training()
