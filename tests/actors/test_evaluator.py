"""Evaluation actors in this process: whole episodes, fixed weights, nothing into replay."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from cluster import Cupboard, make_spec, until
from shaky import LENGTH

from actors.evaluator import Evaluator
from dreamer.weights import pack
from replay_service import ReplayClient

NOWHERE = cast(ReplayClient, SimpleNamespace(url="redis://127.0.0.1:1"))


@pytest.fixture
def start() -> Iterator[Any]:
    """Return a function that starts an evaluation actor which is stopped after the test."""
    actors: list[Evaluator] = []

    def started(env: str = "Steady", **changes: Any) -> tuple[Evaluator, Cupboard]:
        spec = replace(make_spec(NOWHERE, env), envs=1, split="eval", episodes=3, **changes)
        cupboard = Cupboard(pack({"w": torch.zeros(1)}, (1, 0)))
        actors.append(Evaluator(spec, cupboard))
        return actors[-1], cupboard

    yield started
    for actor in actors:
        actor.stop(drain=False)


def rests(actor: Evaluator) -> bool:
    stats = actor.stats()
    assert not stats["error"], stats["trace"]
    return "newer weights" in stats["blocked"]


def test_a_round_is_whole_episodes_with_one_version_and_needs_no_replay(start: Any) -> None:
    actor, cupboard = start()
    until(lambda: rests(actor))
    cupboard.weights = pack({"w": torch.ones(1)}, (1, 7))
    until(lambda: len(actor.stats()["scores"]) == 6 and rests(actor))
    scores = actor.stats()["scores"]
    assert [score["number"] for score in scores] == [1, 2, 3, 4, 5, 6]
    assert [score["version"] for score in scores] == [[1, 0]] * 3 + [[1, 7]] * 3
    want = {"return": LENGTH * (LENGTH + 1) / 2, "length": LENGTH, "end": "terminated"}
    assert all(want.items() <= score.items() for score in scores)
    stats = actor.stats()
    assert stats["split"] == "eval" and stats["phase"] == "acting" and not stats["inserted_steps"]


def test_an_episode_that_the_environment_did_not_survive_is_no_score(start: Any) -> None:
    actor, _ = start("Raises")
    until(lambda: rests(actor))
    stats = actor.stats()
    assert stats["env_restarts"]["crash"] >= 2
    assert [score["length"] for score in stats["scores"]] == [LENGTH] * 3


def test_rounds_keep_their_distance(start: Any) -> None:
    actor, cupboard = start(rest_s=0.6)
    until(lambda: len(actor.stats()["scores"]) == 3)
    begin = time.monotonic()
    cupboard.weights = pack({"w": torch.ones(1)}, (1, 7))
    until(lambda: len(actor.stats()["scores"]) == 6)
    assert time.monotonic() - begin > 0.3


def test_it_stops_while_it_rests(start: Any) -> None:
    actor, _ = start(rest_s=3600.0)
    until(lambda: "next evaluation" in actor.stats()["blocked"])
    begin = time.monotonic()
    assert actor.stop(drain=False)["phase"] == "stopped"
    assert time.monotonic() - begin < 3.0
