"""The verdict: what bounds a run, what share of the time that is, and what to do about it."""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from learner.bound import PHASES

WINDOW_S = 10.0
"""Time over which the actors' shares are taken."""
ACTING = ("acting", "blocked")
MOST_MORE = 20
"""Times the present actors above which no number of actors is named: it would be a guess."""

CAUSES = {
    "warmup": "warm-up",
    "environments": "environments",
    "policy": "policy inference",
    "replay": "replay",
    "limiter": "train-ratio limiter",
    "data_wait": "data wait",
    "compile": "compiling",
    "learner": "learner",
    "publish": "weight publishing",
    "checkpoint": "checkpoints",
    "other": "learner loop",
}
"""What can bound a run, with the name that people read. ``limiter``: learner and actors wait for
each other. ``data_wait``: the learner decodes arrived experience. ``replay``: either side waits for
the server."""

_LEARNER_SIDE = {
    "warmup": "warmup",
    "data_wait": "data_wait",
    "compile": "compile",
    "update": "learner",
    "publish": "publish",
    "checkpoint": "checkpoint",
    "settle": "replay",
    "log": "other",
    "other": "other",
}
_ACTOR_SIDE = ("environments", "policy", "replay", "limiter")


@dataclass(frozen=True, kw_only=True)
class ActorShares:
    """Where the time of the acting actors goes, as shares of it."""

    environments: float = 0.0
    """Waiting for environments."""
    policy: float = 0.0
    """Choosing actions."""
    limiter: float = 0.0
    """Not admitted to insert, because training has not caught up."""
    replay: float = 0.0
    """Handing over records, and waiting for the server to take them."""
    acting: int = 0
    """Actors that act, waiting ones included."""
    states: Mapping[str, int] = field(default_factory=dict)
    """All actors by state."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What bounds a run."""

    cause: str = ""
    """One of `CAUSES`; empty while there is nothing to judge."""
    share: float = 0.0
    """Share of the time."""
    advice: str = ""
    """What to do about it."""
    shares: Mapping[str, float] = field(default_factory=dict)
    """Share of every cause; they add up to 1."""
    actors_wanted: int = 0
    """How many more actors would keep the learner busy; 0 where it waits for something else."""

    @property
    def name(self) -> str:
        """The cause and its share, for people."""
        return f"{CAUSES[self.cause]} ({self.share:.0%})" if self.cause else "starting"

    @property
    def text(self) -> str:
        """The whole verdict in one line."""
        return f"{self.name}: {self.advice}" if self.advice else self.name


class ActorTimes:
    """Adds up what the actors say about their time, for a window and for the whole run.

    Call `note` about once a second. An actor that was replaced begins anew.
    """

    _KEYS = ("env_s", "policy_s", "write_s", "blocked_s", "limited_s")

    def __init__(self) -> None:
        self._before: dict[int, tuple[int, float, dict[str, float]]] = {}
        self._recent: deque[tuple[float, dict[str, float]]] = deque()
        self._total: dict[str, float] = {}
        self._states: Counter[str] = Counter()

    def note(self, actors: Sequence[Mapping[str, Any]], now: float | None = None) -> None:
        """Take the newest answers of all actors (`Fleet.stats`) at a monotonic time in seconds."""
        now = time.monotonic() if now is None else now
        spent: dict[str, float] = {}
        self._states = Counter(str(actor.get("state", "acting")) for actor in actors)
        for actor in actors:
            if actor.get("state", "acting") in ACTING:
                _add(spent, self._since_before(actor, now))
        self._recent.append((now, spent))
        while len(self._recent) > 2 and now - self._recent[0][0] > WINDOW_S:
            self._recent.popleft()
        _add(self._total, spent)

    def recent(self) -> ActorShares:
        """Return the shares of about the last ten seconds."""
        spent: dict[str, float] = {}
        for _, part in list(self._recent):
            _add(spent, part)
        return self._shares(spent)

    def overall(self) -> ActorShares:
        """Return the shares since the beginning."""
        return self._shares(self._total)

    def _since_before(self, actor: Mapping[str, Any], now: float) -> dict[str, float]:
        slot, life = int(actor.get("slot", 0)), int(actor.get("life", 0))
        sums = {key: float(actor.get(key) or 0.0) for key in self._KEYS}
        known = self._before.get(slot)
        self._before[slot] = (life, now, sums)
        if known is None or known[0] != life:
            return {}
        spent = {key: max(sums[key] - known[2][key], 0.0) for key in self._KEYS}
        return {**spent, "elapsed_s": now - known[1]}

    def _shares(self, spent: Mapping[str, float]) -> ActorShares:
        acting = sum(self._states[state] for state in ACTING)
        whole = spent.get("elapsed_s", 0.0)
        if whole <= 0:
            return ActorShares(acting=acting, states=dict(self._states))
        # What an actor waits for at this moment is in `blocked_s` already, but not in `write_s`.
        writing = max(spent["write_s"] - spent["blocked_s"], 0.0)
        server = max(spent["blocked_s"] - spent["limited_s"], 0.0)
        return ActorShares(
            environments=min(spent["env_s"] / whole, 1.0),
            policy=min(spent["policy_s"] / whole, 1.0),
            limiter=min(spent["limited_s"] / whole, 1.0),
            replay=min((server + writing) / whole, 1.0),
            acting=acting,
            states=dict(self._states),
        )


def _add(total: dict[str, float], part: Mapping[str, float]) -> None:
    for key, seconds in part.items():
        total[key] = total.get(key, 0.0) + seconds


def judge(part: Mapping[str, float], actors: ActorShares | None = None) -> Verdict:
    """Name what bounds the run.

    The learner's own phases count as they are. Time in which it waits for experience belongs to
    whatever takes most of the actors' time; where that is waiting for the learner, neither side is
    slow, and the band of the train ratio between them is too narrow to hide what lies there.

    Args:
        part: shares of the learner's phases (`learner.bound.shares`).
        actors: shares of the actors' time; None if nothing is known about them.
    """
    if not any(part.values()):
        return Verdict()
    actors = actors or ActorShares()
    found = dict.fromkeys(CAUSES, 0.0)
    for phase in PHASES:
        if phase != "environments":
            found[_LEARNER_SIDE[phase]] += part.get(phase, 0.0)
    idle = part.get("environments", 0.0)
    slowest = max(_ACTOR_SIDE, key=lambda cause: getattr(actors, cause))
    found[slowest] += idle
    cause = max(found, key=lambda name: found[name])
    wanted = _more_actors(idle, actors) if cause in ("environments", "policy") else 0
    return Verdict(
        cause=cause,
        share=found[cause],
        advice=_advice(cause, actors, wanted),
        shares=found,
        actors_wanted=wanted,
    )


def _more_actors(idle: float, actors: ActorShares) -> int:
    """Return how many more actors would fill the time that the learner waits."""
    return math.ceil(actors.acting * idle / max(1.0 - idle, 1e-3) - 1e-9)


def _advice(cause: str, actors: ActorShares, wanted: int) -> str:
    if cause in ("environments", "policy") and actors.states and not actors.acting:
        states = ", ".join(f"{count} {state}" for state, count in sorted(actors.states.items()))
        return f"no actor is acting ({states})"
    feed = f"{_more(wanted, actors.acting)} would feed the learner" if wanted else ""
    if cause == "learner" and actors.limiter > 0.05:
        held = f" (actors were held back {actors.limiter:.0%} of the time)"
        return f"{_ADVICE[cause]}{held}"
    if cause == "policy":
        spent = f"actors spend {actors.policy:.0%} of their time in the policy"
        return f"{spent}: {_ADVICE[cause]}" + (f", or {feed}" if feed else "")
    return feed if cause == "environments" else _ADVICE.get(cause, "")


def _more(wanted: int, acting: int) -> str:
    if wanted > MOST_MORE * acting:
        return "many more actors (or a higher train ratio)"
    return "about 1 more actor" if wanted == 1 else f"about {wanted} more actors"


_ADVICE = {
    "warmup": "training starts when the replay holds --replay.min-size-steps",
    "policy": "let more environments share a call (--envs-per-actor)",
    "replay": "look at the server's CPU, disk and network, or relax --replay.durability",
    "limiter": "by choice: both sides wait for each other; a larger --replay.tolerance-steps, or "
    "smaller chunks, let them overlap",
    "data_wait": "decoding takes the learner's time: a cheaper --replay.codec, or fewer and larger "
    "chunks (--replay.chunk-steps)",
    "compile": "the update is compiled, once, for a minute or two; --learner.mode eager begins at "
    "once and is slower",
    "learner": "the learner is the limit: lower the train ratio or use a larger GPU",
    "publish": "publish less often (--learner.publish-every-s, --learner.publish-every-updates)",
    "checkpoint": "save less often (--learner.checkpoint-every-s), or to a faster disk",
    "other": "log less often (--learner.log-every-s)",
}
