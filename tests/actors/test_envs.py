"""Adapters against the real environments."""

import sys
from typing import Any

import numpy as np
import pytest

from actors.envs import EnvConfig, EnvError, env_spaces, make_env
from actors.envs.base import Env
from actors.spaces import Arrays, random_actions
from dreamer.spaces import BoxAction, DiscreteAction, DiscreteSpec, ImageSpec, VectorSpec

VECTORS = {"obs": "vector"}
IMAGES = {"obs": "image"}


def make(env_id: str, **choices: Any) -> Env:
    return make_env(env_id, EnvConfig(**choices), 7)


def play(env: Env, steps: int, seed: int = 0) -> list[tuple[Arrays, float, bool, bool]]:
    """Take random steps, resetting where needed; the answers, each checked against the spaces."""
    rng, answers, over = np.random.default_rng(seed), [], True
    for _ in range(steps):
        if over:
            obs: Arrays = env.reset()
        obs, reward, terminated, truncated = env.step(random_actions(env.action_space, rng))
        answers.append((obs, reward, terminated, truncated))
        over = terminated or truncated
    return answers


@pytest.mark.parametrize(
    ("env_id", "choices", "obs", "action"),
    [
        ("CartPole-v1", {}, {"vector": VectorSpec(shape=(4,))}, DiscreteAction(classes=2)),
        (
            "Pendulum-v1",
            {},
            {"vector": VectorSpec(shape=(3,))},
            BoxAction(low=(-2.0,), high=(2.0,)),
        ),
        ("ale:Pong", {}, {"image": ImageSpec(shape=(64, 64, 3))}, DiscreteAction(classes=18)),
        (
            "ale:Pong",
            {"image_size": 96, "grayscale": True, "all_actions": False},
            {"image": ImageSpec(shape=(96, 96, 1))},
            DiscreteAction(classes=6),
        ),
        (
            "minigrid:Empty-5x5-v0",
            {},
            {"direction": DiscreteSpec(classes=4), "image": ImageSpec(shape=(64, 64, 3))},
            DiscreteAction(classes=7),
        ),
        (
            "minigrid:MiniGrid-Empty-5x5-v0",
            VECTORS,
            {"direction": DiscreteSpec(classes=4), "symbols": VectorSpec(shape=(980,))},
            DiscreteAction(classes=7),
        ),
        (
            "dmc:cartpole-balance",
            {},
            {"position": VectorSpec(shape=(3,)), "velocity": VectorSpec(shape=(2,))},
            BoxAction(low=(-1.0,), high=(1.0,)),
        ),
        ("crafter:reward", {}, {"image": ImageSpec(shape=(64, 64, 3))}, DiscreteAction(classes=17)),
    ],
)
def test_suite_has_the_published_spaces_and_valid_steps(
    env_id: str, choices: dict[str, Any], obs: dict[str, Any], action: Any
) -> None:
    env = make(env_id, **choices)
    assert env.obs_space == obs
    assert env.action_space == {"action": action}
    first = env.reset()
    assert first.keys() == obs.keys()
    play(env, 20)
    env.close()


@pytest.mark.parametrize(
    ("env_id", "choices"),
    [
        ("CartPole-v1", {}),
        ("ale:Pong", {}),
        ("dmc:cartpole-balance", {}),
        ("minigrid:DoorKey-5x5-v0", VECTORS),
        pytest.param("crafter:reward", {}, marks=pytest.mark.slow),
    ],
)
def test_the_same_seed_gives_the_same_episode_and_another_seed_another(
    env_id: str, choices: dict[str, Any]
) -> None:
    env, other = make(env_id, **choices), make(env_id, **choices)

    def run(which: Env, seed: int) -> bytes:
        rng = np.random.default_rng(0)
        seen = [which.reset(seed)]
        seen += [which.step(random_actions(which.action_space, rng))[0] for _ in range(8)]
        return b"".join(obs[key].tobytes() for obs in seen for key in sorted(obs))

    first = run(env, 3)
    assert run(other, 3) == first, "two environments differ"
    assert run(env, 3) == first, "the seed does not start everything anew"
    assert any(run(env, seed) != first for seed in (4, 5, 6))
    env.close()
    other.close()


@pytest.mark.parametrize(
    ("env_id", "repeat", "rate"),
    [
        ("CartPole-v1", None, 50),
        ("CartPole-v1", 2, 25),
        ("tests.actors.zoo:Counting", None, 30),
        ("ale:Pong", None, 15),
        ("dmc:cartpole-balance", None, 50),
        ("crafter:reward", None, 5),
        ("minigrid:Empty-5x5-v0", None, 10),
    ],
)
def test_decisions_per_second_are_those_of_real_time(
    env_id: str, repeat: int | None, rate: float
) -> None:
    env = make(env_id, action_repeat=repeat)
    assert env.decision_rate == pytest.approx(rate)
    env.close()


def test_seed_of_making_is_that_of_the_first_episode_only() -> None:
    env, other = make("CartPole-v1"), make("CartPole-v1")
    first, second = env.reset()["vector"], env.reset()["vector"]
    np.testing.assert_array_equal(other.reset()["vector"], first)
    np.testing.assert_array_equal(other.reset()["vector"], second)
    assert not np.array_equal(first, second)


def test_cartpole_falls_and_is_terminated() -> None:
    ends = [answer for answer in play(make("CartPole-v1"), 200) if answer[2] or answer[3]]
    assert ends and all(terminated and not truncated for _, _, terminated, truncated in ends)


def test_pendulum_is_truncated_by_its_own_limit_and_by_ours() -> None:
    steps = play(make("Pendulum-v1"), 200)
    assert [i for i, answer in enumerate(steps) if answer[3]] == [199]
    steps = play(make("Pendulum-v1", time_limit=7), 21)
    assert [i for i, answer in enumerate(steps) if answer[3]] == [6, 13, 20]
    assert not any(answer[2] for answer in steps)


def test_action_repeat_sums_rewards_and_stops_at_the_end() -> None:
    env = make("CartPole-v1", action_repeat=4)
    answers = play(env, 40)
    assert env.action_repeat == 4
    assert {reward for _, reward, _, _ in answers} > {4.0}
    assert all(0 < reward <= 4 for _, reward, _, _ in answers)


def test_dmc_ends_after_a_thousand_frames_and_is_never_terminal() -> None:
    env = make("dmc:cartpole-balance", action_repeat=20)
    answers = play(env, 50)
    assert [i for i, answer in enumerate(answers) if answer[2] or answer[3]] == [49]
    assert answers[-1][3] and not answers[-1][2]
    assert max(reward for _, reward, _, _ in answers) > 5.0
    env.close()


def test_dmc_repeats_twice_by_default() -> None:
    assert make("dmc:cartpole-balance").action_repeat == 2


def test_dmc_draws_images_beside_its_vectors() -> None:
    env = make("dmc:cartpole-balance", obs="both", image_size=32, fast_render=True)
    obs = env.reset()
    assert obs.keys() == {"position", "velocity", "image"}
    assert obs["image"].shape == (32, 32, 3) and obs["image"].std() > 5
    picture = env.render()
    assert picture is not None and picture.shape == (240, 320, 3)
    env.close()


def test_dmc_camera_follows_the_published_rule() -> None:
    from actors.envs.dmc import make as make_raw

    assert make_raw("quadruped-walk", EnvConfig())._camera == 2
    assert make_raw("cup-catch", EnvConfig())._camera == 0
    assert make_raw("cup-catch", EnvConfig(camera=1))._camera == 1


def test_atari_truncates_at_its_cap_and_terminates_at_game_over() -> None:
    from actors.envs import atari

    env = atari.make("Pong", EnvConfig(sticky=0.0, noops=0))
    env.reset(1)
    env._frames = atari.CAP_FRAMES - 6
    assert env.step(0)[2:] == (False, False)
    assert env.step(0)[2:] == (False, True), "the cap is no death"
    env.reset(None)
    ends = next(answer[2:] for answer in (env.step(0) for _ in range(5000)) if any(answer[2:]))
    assert ends == (True, False)


def test_atari_waits_a_random_number_of_frames() -> None:
    from actors.envs import atari

    def waits(noops: int) -> set[int]:
        env = atari.make("Pong", EnvConfig(sticky=0.0, noops=noops))
        env.reset(5)
        frames = set()
        for _ in range(6):
            env.reset(None)
            frames.add(env._ale.getEpisodeFrameNumber())
        return frames

    assert len(waits(0)) == 1
    drawn = waits(30)
    assert len(drawn) > 2 and max(drawn) - min(drawn) <= 30


def test_atari_merges_the_last_two_frames() -> None:
    from actors.envs import atari

    env = atari.make("Pong", EnvConfig(sticky=0.0, noops=0))
    env.reset(0)
    for _ in range(30):
        env.step(2)
    merged = np.maximum(env._screens[0], env._screens[1])
    assert (env._screens[0] != env._screens[1]).any(), "the two frames differ"
    assert env.render().shape == (210, 160, 3)
    assert (merged >= env._screens[0]).all()


def test_crafter_dies_terminally_and_its_limit_truncates() -> None:
    from actors.envs.crafter import make as make_raw

    env = make_raw("reward", EnvConfig())
    env.reset(1)
    env._env._player.health = 0
    assert env.step(0)[2:] == (True, False)
    env._env._player.health = 9
    env._env._step = 9999
    assert env.step(0)[2:] == (False, True)
    assert env.render().shape == (600, 600, 3)


def test_class_of_a_module_gets_its_arguments() -> None:
    env = make("zoo:Counting", kwargs='{"length": 3}')
    env.reset()
    ends = [env.step({"action": np.array(0, np.int32)})[2] for _ in range(3)]
    assert ends == [False, False, True]
    assert env.render() is None


def test_images_of_other_sizes_are_resized() -> None:
    env = make("zoo:Everything", image_size=16)
    assert env.obs_space["camera"] == ImageSpec(shape=(16, 16, 3))
    assert env.reset()["camera"].shape == (16, 16, 3)


@pytest.mark.parametrize(
    ("env_id", "words"),
    [
        ("CartPol-v1", "did you mean CartPole-v1"),
        ("CartPole-v99", "unknown environment"),
        ("ale:Pongg", "did you mean pong"),
        ("dmc:walker_walk", "did you mean walker-walk"),
        ("minigrid:DoorKei-5x5-v0", "did you mean MiniGrid-DoorKey-5x5-v0"),
        ("crafter:fun", "crafter:reward"),
        ("no_such_module:Env", "no module"),
        ("zoo:Countin", "did you mean Counting"),
        ("zoo:annotations", "is no class"),
        ("", "unknown environment"),
    ],
)
def test_unknown_environment_is_refused_with_a_hint(env_id: str, words: str) -> None:
    with pytest.raises(EnvError, match=words):
        make(env_id)


def test_missing_library_names_the_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for name in ("actors.envs.crafter", "crafter"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "crafter", None)
    with pytest.raises(EnvError, match=r"pip install 'dreamfleet\[crafter\]'"):
        make("crafter:reward")


def test_spaces_can_be_asked_for_alone() -> None:
    obs, action, repeat = env_spaces("CartPole-v1", EnvConfig(action_repeat=3))
    assert (set(obs), set(action), repeat) == ({"vector"}, {"action"}, 3)


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"image_size": 4}, "environment.image_size must be >= 8, got 4"),
        ({"action_repeat": 0}, "--environment.action-repeat"),
        ({"time_limit": 0}, "time_limit"),
        ({"noops": -1}, "noops"),
        ({"sticky": 1.0}, "probability below 1"),
        ({"kwargs": "[1]"}, "JSON object"),
        ({"kwargs": "{"}, "not JSON"),
    ],
)
def test_bad_choice_is_refused(choices: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        EnvConfig(**choices)


def test_a_library_that_is_missing_is_named_with_the_way_to_get_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # What importing finds where it is not installed; the suite imports it when it makes one.
    monkeypatch.setitem(sys.modules, "dm_control", None)
    with pytest.raises(EnvError, match=r"need dm_control.*make setup.*dreamfleet\[dmc\]"):
        make_env("dmc:cartpole-balance", EnvConfig())
