from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageSequence

from deploy.cli import main
from deploy.config import ConfigError, with_values
from deploy.evaluate import EvalOptions, play, statistics_of
from deploy.presets import preset
from dreamer.presets import AGENTS, agent_config, sized
from learner.gif import caption_of
from tests.deploy.untrained import save

Arrays = dict[str, NDArray[Any]]


class Countdown:
    """An environment whose n-th episode takes n steps and pays one for each."""

    def __init__(self, terminates: bool = True) -> None:
        self.length, self.clock, self.terminates = 0, 0, terminates
        self.seeds: list[int | None] = []

    def reset(self, seed: int | None = None) -> Arrays:
        self.seeds.append(seed)
        self.length, self.clock = self.length + 1, 0
        return {"vector": np.zeros(2, np.float32)}

    def step(self, action: Arrays) -> tuple[Arrays, float, bool, bool]:
        assert action["action"].shape == ()
        self.clock += 1
        over = self.clock == self.length
        obs = {"vector": np.full(2, self.clock, np.float32)}
        return obs, 1.0, over and self.terminates, over and not self.terminates

    def render(self) -> None:
        return None


class Scribe:
    """A policy that writes down where it was told that episodes begin."""

    def __init__(self) -> None:
        self.firsts: list[list[bool]] = []
        self.modes: set[str] = set()

    def step(
        self, obs: Arrays, is_first: NDArray[np.bool_], mode: str = "sample"
    ) -> tuple[Arrays, Arrays]:
        assert obs["vector"].shape == (len(is_first), 2)
        self.firsts.append(is_first.tolist())
        self.modes.add(mode)
        return {"action": np.zeros(len(is_first), np.int32)}, {}


def test_every_environment_plays_its_share_to_the_end() -> None:
    episodes = play(Scribe(), [Countdown(), Countdown(), Countdown()], 7)
    assert [episode.length for episode in episodes] == [1, 2, 3, 1, 2, 1, 2]
    assert [episode.ret for episode in episodes] == [1, 2, 3, 1, 2, 1, 2]


def test_no_more_environments_are_used_than_episodes() -> None:
    envs = [Countdown(), Countdown()]
    assert len(play(Scribe(), envs, 1)) == 1
    assert not envs[1].seeds


def test_policy_is_told_of_every_first_step_and_the_mode() -> None:
    scribe = Scribe()
    play(scribe, [Countdown()], 3, mode="greedy")
    assert [first for (first,) in scribe.firsts] == [True, True, False, True, False, False]
    assert scribe.modes == {"greedy"}


def test_each_environment_starts_from_its_own_seed() -> None:
    envs = [Countdown(), Countdown()]
    play(Scribe(), envs, 4, seed=70)
    assert [env.seeds for env in envs] == [[70, None], [71, None]]


def test_end_says_whether_the_episode_terminated() -> None:
    assert [e.end for e in play(Scribe(), [Countdown(terminates=False)], 1)] == ["truncated"]
    assert [e.end for e in play(Scribe(), [Countdown()], 1)] == ["terminated"]


def test_first_episode_of_the_first_environment_is_watched() -> None:
    seen = []
    play(Scribe(), [Countdown(), Countdown()], 4, watch=lambda env, *_: seen.append(env))
    assert len(seen) == 1


def test_statistics_are_those_of_the_returns() -> None:
    numbers = statistics_of(play(Scribe(), [Countdown()], 3))
    assert numbers == pytest.approx(
        {"mean": 2, "std": (2 / 3) ** 0.5, "min": 1, "max": 3, "mean_length": 2}
    )


def test_nothing_to_play_is_refused(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match="--episodes must be at least 1, got 0"):
        EvalOptions(run_dir=tmp_path, episodes=0)


@pytest.mark.integration
def test_checkpoint_is_played_scored_and_filmed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, preset("v3-cartpole", "debug"), update=7)
    line = f"eval {tmp_path} --episodes 3 --envs 2 --video --mode greedy"
    assert main(line.split()) == 0
    result = json.loads((tmp_path / "eval.json").read_text())
    assert (result["updates"], result["env_steps"], result["mode"]) == (7, 70, "greedy")
    assert len(result["episodes"]) == 3 and 0 < result["mean"] <= 500
    assert "CartPole-v1" in capsys.readouterr().out
    assert (tmp_path / "videos" / "eval-0000000070.gif").read_bytes()[:3] == b"GIF"


@pytest.mark.integration
def test_the_film_of_an_agent_that_sees_has_its_reconstruction(tmp_path: Path) -> None:
    config = with_values(preset("v3-minigrid", "debug"), {"environment.time_limit": 12})
    save(tmp_path, config, update=3)
    assert main(f"eval {tmp_path} --episodes 1 --envs 1 --video".split()) == 0
    (path,) = (tmp_path / "videos").glob("eval-*.gif")
    with Image.open(path) as film:
        frame = np.asarray(film.convert("RGB")).astype(float)
        assert film.n_frames == 12
    height, width, _ = frame.shape
    # The environment as it is drawn, what is seen and what is decoded, each as high as the first.
    assert width >= 3 * height - 64
    decoded = frame[:, -height // 2 :]
    assert abs(decoded.mean() - 127) < 30  # of an untrained decoder: grey


@pytest.mark.integration
@pytest.mark.parametrize("drawn", [True, False], ids=["drawn", "not drawn"])
@pytest.mark.parametrize("name", AGENTS)
def test_the_film_of_every_agent_has_what_there_is_to_see(
    name: str, drawn: bool, tmp_path: Path
) -> None:
    env = f"tests.deploy.untrained:{'Drawn' if drawn else 'Pixels'}"
    agent = sized(agent_config(name, "debug"), "debug")
    config = replace(preset("v3-cartpole", "debug"), env=env, agent=agent)
    save(tmp_path, with_values(config, {"environment.image_size": 64}), update=1)
    assert main(f"eval {tmp_path} --episodes 1 --envs 1 --video".split()) == 0
    (path,) = (tmp_path / "videos").glob("eval-*.gif")
    with Image.open(path) as film:
        frames = [np.asarray(f.convert("RGB")).astype(int) for f in ImageSequence.Iterator(film)]
    decodes = name in ("v1", "v2", "v3-2023", "v3")
    pictures = ["drawn"] * drawn + ["seen"] * (decodes or not drawn) + ["decoded"] * decodes
    assert [frame.shape for frame in frames] == 3 * [(64, 68 * len(pictures) - 4, 3)]
    for step, frame in enumerate(frames):
        parts = {kind: frame[:, 68 * i : 68 * i + 64] for i, kind in enumerate(pictures)}
        want = {"drawn": 250 - 10 * step, "seen": 80 * step}
        assert all((parts[kind] == want[kind]).all() for kind in want if kind in parts)
        # Of an untrained decoder: grey, more or less.
        assert not decodes or abs(parts["decoded"].mean() - 127) < 40
    assert ("what its model makes of that" in caption_of(path)) == decodes


@pytest.mark.integration
def test_same_seed_gives_the_same_scores(tmp_path: Path) -> None:
    save(tmp_path, preset("v3-cartpole", "debug"), update=1)
    scores = []
    for _ in range(2):
        assert main(f"eval {tmp_path} --episodes 4 --seed 5".split()) == 0
        scores.append(json.loads((tmp_path / "eval.json").read_text())["episodes"])
    assert scores[0] == scores[1]


@pytest.mark.integration
def test_damaged_checkpoint_gives_way_to_the_one_before(
    tmp_path: Path,
) -> None:
    config = preset("v3-cartpole", "debug")
    save(tmp_path, config, update=1)
    with (save(tmp_path, config, update=2) / "state.pt").open("r+b") as file:
        file.seek(500)
        file.write(b"damage")
    assert main(f"eval {tmp_path} --episodes 1".split()) == 0
    assert json.loads((tmp_path / "eval.json").read_text())["updates"] == 1
