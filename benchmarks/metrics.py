"""Metrics: what counting and being scraped take of an actor's and of a learner's time."""

from __future__ import annotations

import statistics
import time
import urllib.request
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from rich.table import Table

from actors.envs import env_spaces
from actors.metrics import ActorMetrics
from benchmarks.actors import CASES, stepper
from learner.config import LearnerConfig
from learner.metrics import Exporter
from replay_service import MetricsEndpoint

SCRAPE_EVERY_S = 10.0
"""As in deploy/prometheus/prometheus.yml."""
_COUNTED = {name: 123_456.0 for name in ("env_steps", "env_frames", "insert_wait_seconds")}
_ENDS = {"terminated": 1_000, "truncated": 10}
LOSSES = ("rec", "rew", "con", "dyn", "rep", "policy", "value", "repval")


def run(*, quick: bool = False) -> dict[str, Any]:
    """Measure; blocks for about twenty seconds, or two if quick.

    A share of a thousandth drowns in the noise of two runs that are compared. So each part is timed
    by itself: an actor's counting against its step with the cheapest environment, the learner's
    against the interval at which it counts, and a scrape, in seconds of the processor on both of
    its sides, against the interval of Prometheus.

    Returns:
        {"parts": [{name, count_us, every_ms, scrape_ms, share}]}; `share` is of the time.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    rounds, seconds = (3, 0.3) if quick else (15, 4.0)
    try:
        return {"parts": [_actor(rounds, seconds), _learner(rounds)]}
    finally:
        torch.set_num_threads(before)


def table(result: dict[str, Any]) -> Table:
    """Return the numbers of `run` as a table."""
    shown = Table(title=f"metrics, scraped every {SCRAPE_EVERY_S:.0f} s")
    for name in ("process", "counting, us", "once in, ms", "scrape, ms", "share of the time"):
        shown.add_column(name, justify="left" if name == "process" else "right")
    for part in result["parts"]:
        shown.add_row(
            part["name"],
            f"{part['count_us']:.1f}",
            f"{part['every_ms']:,.2f}",
            f"{part['scrape_ms']:.2f}",
            f"{part['share']:.2%}",
        )
    return shown


def _actor(rounds: int, seconds: float) -> dict[str, Any]:
    """Count as an actor does: once in a step of all its environments."""
    case = CASES[0]
    metrics = ActorMetrics(
        slot=0, env=case.env_id, read=lambda: {**_COUNTED, "episodes": _ENDS, "insert_replies": {}}
    )

    def count() -> None:
        for _ in range(1_000):
            metrics.step(policy_s=1e-3, env_s=1e-4, write_s=1e-5)

    with ExitStack() as stack:
        spaces = env_spaces(case.env_id, case.environment)[:2]
        rate = stepper(stack, case, *spaces).with_policy(seconds)
    counted = _time(count, rounds) / 1_000
    scrape = _scrape(MetricsEndpoint(metrics.registry), rounds)
    return _part("actor, cheapest environment", counted, case.envs / rate, scrape)


def _learner(rounds: int) -> dict[str, Any]:
    """Set what the learner sets each time."""
    exporter = Exporter()
    values = {f"loss/{name}": 1.5 for name in LOSSES} | {f"value_{at}": 0.1 for at in range(40)}
    totals = iter(range(1, 10**9))

    def count() -> None:
        updates = float(next(totals))
        exporter.update({"replay_size_steps": updates, "fence": 1.0}, {"updates": updates})
        exporter.train(values)

    counted = _time(count, rounds)
    scrape = _scrape(MetricsEndpoint(exporter.registry), rounds)
    return _part("learner", counted, LearnerConfig().log_every_s, scrape)


def _part(name: str, counted_s: float, every_s: float, scrape_s: float) -> dict[str, Any]:
    return {
        "name": name,
        "count_us": counted_s * 1e6,
        "every_ms": every_s * 1e3,
        "scrape_ms": scrape_s * 1e3,
        "share": counted_s / every_s + scrape_s / SCRAPE_EVERY_S,
    }


def _time(work: Callable[[], None], rounds: int) -> float:
    """Return the median seconds of a call."""
    taken = []
    for _ in range(rounds):
        begin = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken)


def _scrape(endpoint: MetricsEndpoint, rounds: int) -> float:
    """Return the median seconds of processor that a scrape takes, asking included."""
    taken = []
    try:
        for _ in range(rounds):
            begin = time.process_time()
            url = f"http://127.0.0.1:{endpoint.port}/metrics"
            with urllib.request.urlopen(url, timeout=10) as answer:
                assert b"dreamer_" in answer.read()
            taken.append(time.process_time() - begin)
    finally:
        endpoint.close()
    return statistics.median(taken)
