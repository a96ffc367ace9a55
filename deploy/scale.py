"""`dreamfleet scale`: let actors join or leave a training that runs.

The wish is a file in the run directory, which the training looks at every second: it needs no port,
and whoever may write there may scale.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from deploy.config import FILE_NAME, ConfigError, TrainConfig, load_config, save_config
from deploy.left import scale_left
from deploy.progress import console
from deploy.status import read_status, require_run

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
    """Let actors join or leave a training that runs; those that leave deliver what they hold."""

    run_dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")]
    """Run directory."""
    actors: int = 1
    """Actor processes that the training should have. It keeps the number when it is continued."""
    timeout_s: float = 120.0
    """Seconds to wait until all that join have begun to act; 0 does not wait for that."""

    def __post_init__(self) -> None:
        if not 1 <= self.actors <= MOST_ACTORS:
            raise ConfigError(f"--actors must be 1 to {MOST_ACTORS}, got {self.actors}")
        if not self.timeout_s >= 0:
            raise ConfigError(f"--timeout-s must be at least 0, got {self.timeout_s}")


def scale(options: ScaleOptions) -> int:
    """Have a running training change its number of actors, and show what becomes of them.

    Returns:
        0 if as many as wanted act, 1 if some do not yet at the end of the timeout.

    Raises:
        ConfigError: no run, none that is running, or one in lockstep.
    """
    config = load_config(require_run(options.run_dir) / FILE_NAME)
    if _require_scalable(options, config):
        said = scale_left(options.run_dir, config, options.actors)
        save_config(replace(config, actors=options.actors), options.run_dir / FILE_NAME)
        console().print(f"{options.actors} actors wanted, the learner is away: {said}")
        return 0
    pause = threading.Event()
    _give_order(options)
    deadline = time.monotonic() + options.timeout_s
    while True:
        actors = _training_actors(read_status(options.run_dir))
        settled = _settled(actors, options.actors)
        if settled or time.monotonic() >= deadline:
            break
        pause.wait(_LOOK_S)
    console().print(f"{options.actors} actors wanted, {config.actors} before: {_states(actors)}")
    return 0 if settled or not options.timeout_s else 1


def heed_order(config: TrainConfig, run: Path, crew: Crew) -> None:
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
        save_config(replace(config, actors=actors), run / FILE_NAME)
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
    if config.ray == "local":
        raise ConfigError(
            f"nothing trains in {options.run_dir}; dreamfleet train --run-dir {options.run_dir} "
            f"--actors {options.actors} continues it with that many"
        )
    return True


def _give_order(options: ScaleOptions) -> None:
    """Leave the order, and wait until the training has taken it."""
    from learner.files import write_atomically

    path = options.run_dir / ORDER_FILE
    write_atomically(path, json.dumps({"actors": options.actors}).encode())
    pause, deadline = threading.Event(), time.monotonic() + _TAKEN_S
    while path.exists():
        if time.monotonic() > deadline:
            path.unlink(missing_ok=True)
            raise ConfigError(
                f"the training in {options.run_dir} has not taken the order within {_TAKEN_S:.0f} "
                "s: see `dreamfleet status`, and whether both use the same file system"
            )
        pause.wait(_LOOK_S)


def _training_actors(snapshot: dict[str, Any]) -> list[dict[str, Any]]:
    return [actor for actor in snapshot["per_actor"] if actor.get("split") != "eval"]


def _settled(actors: Sequence[dict[str, Any]], wanted: int) -> bool:
    acting = sum(actor.get("state") in ("acting", "blocked") for actor in actors)
    return acting == len(actors) == wanted


def _states(actors: Sequence[dict[str, Any]]) -> str:
    counted = Counter(str(actor.get("state")) for actor in actors)
    return ", ".join(f"{count} {state}" for state, count in sorted(counted.items())) or "none there"
