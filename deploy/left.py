"""Actors that a learner has left on a Ray cluster: to look at, to scale, to end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from deploy.config import FILE_NAME, ConfigError, TrainConfig, load_config
from deploy.progress import console, duration
from deploy.rundir import run_id
from deploy.status import read_status, require_run

ANSWER_S = 30.0
"""Time in which a fleet that lives must have answered."""


@dataclass(frozen=True, kw_only=True)
class StopOptions:
    """End the actors and the hub that a learner has left on a Ray cluster."""

    run_dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")]
    """Run directory."""
    ray: str = ""
    """Address of the cluster; empty takes the one that the run was started with."""
    drain_s: float = 10.0
    """Seconds in which the actors may deliver what they hold."""
    look: bool = False
    """Only say what is there."""

    def __post_init__(self) -> None:
        if not self.drain_s >= 0:
            raise ConfigError(f"--drain-s must be at least 0 seconds, got {self.drain_s}")


def stop(options: StopOptions) -> int:
    """End what a run has left on its cluster, and show what that was. Returns 0.

    Raises:
        ConfigError: no run, one whose learner runs, or one that leaves nothing.
        ClusterError: the cluster does not answer.
    """
    from actors.roster import HUB, Roster, end_named, find, names_in, namespace_of
    from actors.standing import end_fleet

    config = load_config(require_run(options.run_dir) / FILE_NAME)
    if not options.look:
        _require_left(options.run_dir)
    namespace = namespace_of(run_id(options.run_dir))
    with cluster_of(config, options.ray):
        names = names_in(namespace)
        if not names:
            console().print(f"nothing of {options.run_dir} is on the cluster", highlight=False)
            return 0
        for split in ("train", "eval"):
            roster = Roster(namespace=namespace, split=split)
            host = find(roster.host, namespace)
            if host is not None:
                console().print(f"{split}: {_described(host)}", highlight=False)
            if not options.look:
                end_fleet(host, roster, options.drain_s)
        if not options.look:
            end_named(HUB, namespace)
            console().print(f"ended: {', '.join(names)}", highlight=False, soft_wrap=True)
    return 0


def scale_left(run: Path, config: TrainConfig, actors: int) -> str:
    """Let actors join or leave a fleet whose learner is away. Returns how it is then.

    Raises:
        ConfigError: there is no such fleet.
        ClusterError: the cluster does not answer.
        FleetError: the fleet has failed.
    """
    import ray

    from actors.roster import Roster, find, namespace_of

    roster = Roster(namespace=namespace_of(run_id(run)), split="train")
    with cluster_of(config):
        host = find(roster.host, roster.namespace)
        if host is None:
            raise ConfigError(
                f"nothing trains in {run} and it has left no actors on the cluster; "
                f"dreamfleet train --run-dir {run} --actors {actors} continues it with that many"
            )
        ray.get(host.scale.remote(actors), timeout=ANSWER_S)
        return _described(host)


@contextmanager
def cluster_of(config: TrainConfig, address: str = "") -> Iterator[None]:
    """Join the cluster of a run for the time of the block.

    Raises:
        ConfigError: the run has a private Ray, whose actors end with their learner.
        ClusterError: nothing answers.
    """
    from deploy.cluster import ray_cluster
    from deploy.sentinel import Sentinel

    if (address or config.ray) == "local":
        raise ConfigError(
            "this run has a Ray of its own (--ray local), whose actors end with their learner: "
            "there is nothing left of it; to end one that trains, press Ctrl-C there"
        )
    with Sentinel() as sentinel, ray_cluster(address or config.ray, cpus=0, sentinel=sentinel):
        yield


def _require_left(run: Path) -> None:
    try:
        snapshot = read_status(run)
    except ConfigError:
        return  # it ended before its first report
    if snapshot["alive"]:
        raise ConfigError(
            f"{run} is being trained by process {snapshot['pid']}, which ends its actors itself: "
            f"kill {snapshot['pid']}, or --look to see them"
        )


def _described(host: Any) -> str:
    import ray

    try:
        found = ray.get(host.look.remote(), timeout=ANSWER_S)
    except ray.exceptions.RayError as error:
        return f"does not answer: {error}"
    states = Counter(str(actor["state"]) for actor in found["stats"])
    # All wait for the same thing; the first one says it for all.
    why = next((f" ({a['blocked']})" for a in found["stats"] if a.get("blocked")), "")
    said = ", ".join(
        f"{count} {state}{why if state == 'blocked' else ''}"
        for state, count in sorted(states.items())
    )
    left = found["orphan_after_s"] - found["learner_away_s"]
    return (
        f"{said}; heard of a learner {duration(found['learner_away_s'])} ago, ends by itself in "
        f"{duration(max(left, 0.0))}" + (f"; failed: {found['failure']}" * bool(found["failure"]))
    )
