"""`dreamfleet scale`: let actors join or leave a training that runs, and replay servers join it.

The wish is a file in the run directory, which the training looks at every second: it needs no port,
and whoever may write there may scale.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from deploy.config import FILE_NAME, ConfigError, TrainConfig, amend_config, load_config
from deploy.join import order_servers
from deploy.left import scale_left
from deploy.progress import console
from deploy.status import read_status, require_run
from replay_service import shard_of

if TYPE_CHECKING:
    from deploy.crew import Crew

log = logging.getLogger(__name__)

ORDER_FILE = "scale.json"
MOST_ACTORS = 100_000
_TAKEN_S = 30.0
"""Time in which a training that runs must have taken the order."""
_LOOK_S = 0.2


@dataclass(frozen=True, kw_only=True)
class ScaleOptions:
    """Let actors join or leave a training that runs; those that leave deliver what they hold.

    Replay servers may join it too.
    """

    run_dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")]
    """Run directory."""
    actors: int | None = None
    """Actor processes that the training should have. It keeps the number when it is continued."""
    redis: str | None = None
    """Replay servers that the training should have, with commas between their addresses: those that
    it has (embedded for its own), and empty ones that join it. It keeps them when it is
    continued."""
    timeout_s: float = 120.0
    """Seconds to wait until all that join or move have begun to act; 0 does not wait for that."""

    def __post_init__(self) -> None:
        if self.actors is None and self.redis is None:
            raise ConfigError("nothing to change: give --actors, --redis, or both")
        if self.actors is not None and not 1 <= self.actors <= MOST_ACTORS:
            raise ConfigError(f"--actors must be 1 to {MOST_ACTORS}, got {self.actors}")
        if not self.timeout_s >= 0:
            raise ConfigError(f"--timeout-s must be at least 0, got {self.timeout_s}")


def scale(options: ScaleOptions) -> int:
    """Have a running training change its actors or replay servers, and show what becomes of it.

    Returns:
        0 if as many as wanted act, 1 if some do not yet at the end of the timeout.

    Raises:
        ConfigError: no run, none that is running, one in lockstep, or servers that cannot join.
    """
    config = load_config(require_run(options.run_dir) / FILE_NAME)
    if _require_scalable(options, config):
        assert options.actors is not None, "only actors are scaled while the learner is away"
        said = scale_left(options.run_dir, config, options.actors)
        amend_config(options.run_dir / FILE_NAME, actors=options.actors)
        console().print(f"{options.actors} actors wanted, the learner is away: {said}")
        return 0
    settled = True
    if options.redis is not None:
        settled = _scale_servers(options, options.redis, config)
    if options.actors is not None:
        settled = _scale_actors(options, options.actors, config) and settled
    return 0 if settled or not options.timeout_s else 1


def _scale_servers(options: ScaleOptions, redis: str, config: TrainConfig) -> bool:
    urls = order_servers(options.run_dir, redis)

    def moved(actors: Sequence[dict[str, Any]]) -> bool:
        home = [shard_of(f"{config.preset}-a{actor['slot']}", urls) for actor in actors]
        return [actor.get("server") for actor in actors] == home and _acting(actors) == len(actors)

    settled, actors = _wait(options, moved)
    counted = Counter(str(actor.get("server")) for actor in actors)
    console().print(
        f"{len(urls)} replay servers, {len(config.addresses)} before: {_states(actors)}",
        highlight=False,
    )
    for url in urls:
        console().print(
            f"  {url}: {counted[url]} of {len(actors)} actors", highlight=False, soft_wrap=True
        )
    if not all(counted[url] for url in urls):
        console().print(
            "chance has given a server nobody: have several times as many actors as servers",
            soft_wrap=True,
        )
    return settled


def _scale_actors(options: ScaleOptions, wanted: int, config: TrainConfig) -> bool:
    _give_order(options.run_dir, wanted)
    settled, actors = _wait(options, lambda found: _acting(found) == len(found) == wanted)
    console().print(f"{wanted} actors wanted, {config.actors} before: {_states(actors)}")
    return settled


def _wait(
    options: ScaleOptions, settled: Callable[[Sequence[dict[str, Any]]], bool]
) -> tuple[bool, list[dict[str, Any]]]:
    """Wait until the actors are as they should be; return whether they are, and all of them."""
    pause, deadline = threading.Event(), time.monotonic() + options.timeout_s
    while True:
        actors = _training_actors(read_status(options.run_dir))
        done = settled(actors)
        if done or time.monotonic() >= deadline:
            return done, actors
        pause.wait(_LOOK_S)


def heed_order(run: Path, crew: Crew) -> None:
    """Do what the last `dreamfleet scale` has asked of this run, if there is something new.

    The number is kept in ``config.yaml``, so that a continued run has it. An order that cannot be
    carried out is logged and dropped.
    """
    path = run / ORDER_FILE
    if not path.exists():
        return
    try:
        actors = int(json.loads(path.read_text())["actors"])
        crew.scale(actors)
        amend_config(run / FILE_NAME, actors=actors)
        log.info("scaled actors=%d", actors)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        log.warning("scale_refused order=%s error=%s", path, error)
    path.unlink(missing_ok=True)


def _require_scalable(options: ScaleOptions, config: TrainConfig) -> bool:
    """Return whether the learner is away and may have left its actors on a cluster."""
    if config.lockstep:
        raise ConfigError(
            f"{options.run_dir} runs in lockstep, where the number of actors is part of what "
            "happens: start another run with --actors"
        )
    if read_status(options.run_dir)["alive"]:
        return False
    if config.ray == "local" or options.redis is not None:
        asked = {"--actors": options.actors, "--redis": options.redis}
        flags = " ".join(f"{name} {value}" for name, value in asked.items() if value is not None)
        raise ConfigError(
            f"nothing trains in {options.run_dir}; dreamfleet train --run-dir {options.run_dir} "
            f"{flags} continues it so"
        )
    return True


def _give_order(run: Path, actors: int) -> None:
    """Leave the order, and wait until the training has taken it."""
    from learner.files import write_atomically

    path = run / ORDER_FILE
    write_atomically(path, json.dumps({"actors": actors}).encode())
    pause, deadline = threading.Event(), time.monotonic() + _TAKEN_S
    while path.exists():
        if not read_status(run)["alive"]:
            path.unlink(missing_ok=True)
            raise ConfigError(
                f"the training in {run} has ended before it took the order: dreamfleet train "
                f"--run-dir {run} --actors {actors} continues it so"
            )
        if time.monotonic() > deadline:
            path.unlink(missing_ok=True)
            raise ConfigError(
                f"the training in {run} has not taken the order within {_TAKEN_S:.0f} "
                "s: see `dreamfleet status`, and whether both use the same file system"
            )
        pause.wait(_LOOK_S)


def _training_actors(snapshot: dict[str, Any]) -> list[dict[str, Any]]:
    return [actor for actor in snapshot["per_actor"] if actor.get("split") != "eval"]


def _acting(actors: Sequence[dict[str, Any]]) -> int:
    return sum(actor.get("state") in ("acting", "blocked") for actor in actors)


def _states(actors: Sequence[dict[str, Any]]) -> str:
    counted = Counter(str(actor.get("state")) for actor in actors)
    return ", ".join(f"{count} {state}" for state, count in sorted(counted.items())) or "none there"
