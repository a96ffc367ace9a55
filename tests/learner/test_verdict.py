from typing import Any

import pytest

from learner.verdict import CAUSES, ActorShares, ActorTimes, judge

BUSY = ActorShares(environments=0.9, policy=0.1, acting=2)


@pytest.mark.parametrize(
    "part, actors, name, advice",
    [
        ({"update": 0.0}, BUSY, "starting", ""),
        (
            {"environments": 0.75, "update": 0.25},
            BUSY,
            "environments (75%)",
            "about 6 more actors would feed the learner",
        ),
        (
            {"environments": 0.6, "update": 0.4},
            ActorShares(environments=0.9, acting=1),
            "environments (60%)",
            "about 2 more actors would feed the learner",
        ),
        (
            {"environments": 0.99, "update": 0.01},
            BUSY,
            "environments (99%)",
            "many more actors (or a higher train ratio) would feed the learner",
        ),
        (
            {"environments": 0.8, "update": 0.2},
            ActorShares(states={"restarting": 2, "quarantined": 1}),
            "environments (80%)",
            "no actor is acting (1 quarantined, 2 restarting)",
        ),
        (
            {"environments": 0.6, "update": 0.4},
            ActorShares(environments=0.2, policy=0.75, acting=2),
            "policy inference (60%)",
            "actors spend 75% of their time in the policy: let more environments share a call "
            "(--envs-per-actor), or about 3 more actors would feed the learner",
        ),
        (
            {"update": 0.9, "environments": 0.1},
            ActorShares(limiter=0.8, environments=0.2, acting=4),
            "learner (90%)",
            "the learner is the limit: lower the train ratio or use a larger GPU (actors were held "
            "back 80% of the time)",
        ),
    ],
)
def test_verdict_names_the_cause_its_share_and_what_to_do(
    part: dict[str, float], actors: ActorShares, name: str, advice: str
) -> None:
    found = judge(part, actors)
    assert (found.name, found.advice) == (name, advice)


@pytest.mark.parametrize(
    "part, actors, cause, words",
    [
        ({"environments": 0.6, "update": 0.4}, {"limiter": 0.7}, "limiter", "by choice"),
        ({"environments": 0.6, "update": 0.4}, {"replay": 0.6}, "replay", "server's CPU"),
        ({"settle": 0.6, "update": 0.4}, {}, "replay", "network"),
        ({"data_wait": 0.6, "update": 0.4}, {}, "data_wait", "codec"),
        ({"compile": 0.6, "update": 0.4}, {}, "compile", "eager"),
        ({"publish": 0.6, "update": 0.4}, {}, "publish", "publish-every-s"),
        ({"checkpoint": 0.6, "update": 0.4}, {}, "checkpoint", "checkpoint-every-s"),
        ({"log": 0.4, "other": 0.3, "update": 0.3}, {}, "other", "log-every-s"),
        ({"warmup": 0.9, "environments": 0.1}, {}, "warmup", "min-size-steps"),
    ],
)
def test_verdict_tells_every_cause_from_the_others(
    part: dict[str, float], actors: dict[str, float], cause: str, words: str
) -> None:
    found = judge(part, ActorShares(acting=1, **actors))
    assert found.cause == cause and words in found.advice and found.actors_wanted == 0
    assert found.text == f"{CAUSES[cause]} ({found.share:.0%}): {found.advice}"


def test_shares_of_all_causes_add_up_to_one() -> None:
    part = {"update": 0.3, "environments": 0.4, "data_wait": 0.1, "publish": 0.1, "settle": 0.1}
    found = judge(part, ActorShares(limiter=0.1, policy=0.5, environments=0.4, acting=3))
    assert set(found.shares) == set(CAUSES) and sum(found.shares.values()) == pytest.approx(1.0)
    assert found.shares["limiter"] == 0.0 and found.shares["policy"] == pytest.approx(0.4)


def actor(life: int = 0, state: str = "acting", **seconds: float) -> dict[str, Any]:
    return {"slot": 0, "life": life, "state": state, **seconds}


def test_actor_times_are_shares_of_the_acting_time() -> None:
    times = ActorTimes()
    times.note([actor(env_s=5.0, policy_s=5.0)], now=0.0)
    assert times.recent() == ActorShares(acting=1, states={"acting": 1})
    later = actor(env_s=7.0, policy_s=6.0, write_s=3.5, blocked_s=3.0, limited_s=2.0)
    times.note([later], now=10.0)
    found = times.recent()
    assert (found.environments, found.policy, found.limiter) == pytest.approx((0.2, 0.1, 0.2))
    assert found.replay == pytest.approx(0.15)


def test_actor_times_begin_anew_with_a_new_life_and_skip_what_does_not_act() -> None:
    times = ActorTimes()
    times.note([actor(env_s=50.0)], now=0.0)
    times.note([actor(1, env_s=0.5)], now=10.0)
    times.note([actor(1, "starting", env_s=9.0)], now=15.0)
    assert times.overall().environments == 0.0 and times.overall().acting == 0
    times.note([actor(1, env_s=5.5)], now=20.0)
    assert times.overall().environments == pytest.approx(0.5)


def test_recent_shares_forget_what_overall_keeps() -> None:
    times = ActorTimes()
    for second in range(40):
        times.note([actor(policy_s=float(min(second, 20)))], now=float(second))
    assert times.recent().policy == 0.0
    assert times.overall().policy == pytest.approx(20 / 39)
