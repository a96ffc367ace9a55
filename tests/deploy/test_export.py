"""The exported agent acts as the policy does, and needs nothing of this package."""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.envs import EnvConfig, env_spaces, make_env
from deploy.cli import main
from deploy.config import FILE_NAME, save_config
from deploy.presets import preset
from dreamer.agent import make_agent
from dreamer.export import DESCRIPTION, export_acting
from dreamer.policy import Policy
from dreamer.presets import agent_config, sized
from learner import checkpoint
from tests.deploy.untrained import sampled_episode

pytestmark = pytest.mark.integration
EXAMPLE = Path(__file__).parents[2] / "examples" / "run_exported.py"
ALONE = """
import runpy, sys
OURS = {"dreamer", "replay_service", "actors", "learner", "deploy"}
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
assert not OURS & {name.partition(".")[0] for name in sys.modules}
"""


@pytest.mark.parametrize("name, mode", [("v1", "greedy"), ("v2", "sample"), ("pro", "greedy")])
def test_exported_step_takes_the_actions_of_the_policy(name: str, mode: str) -> None:
    obs_space, action_space, _ = env_spaces("CartPole-v1", EnvConfig())
    config = sized(agent_config(name, "debug"), "debug")
    policy = Policy(config, obs_space, action_space, seed=3)
    data = export_acting(policy, obs_space, action_space, envs=2, mode=mode)
    files = {DESCRIPTION: ""}
    act = torch.export.load(io.BytesIO(data), extra_files=files).module()
    state: list[Any] = [torch.zeros(s) for s in json.loads(files[DESCRIPTION])["state"].values()]
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(3).get_state()
    taken = []
    for step in range(12):
        obs = {key: rng.normal(size=(2, 4)).astype(np.float32) for key in obs_space}
        first = np.array([step == 0, step in (0, 7)])
        torch.set_rng_state(generator)
        actions, *state = act(
            {key: torch.from_numpy(x) for key, x in obs.items()}, torch.from_numpy(first), *state
        )
        generator = torch.get_rng_state()
        want, _ = policy.step(obs, first, mode)
        assert np.array_equal(actions["action"].numpy(), want["action"])
        assert np.allclose(state[0].numpy(), policy.latents()[0].numpy(), atol=1e-5)
        taken.append(tuple(want["action"]))
    assert len(set(taken)) > 1


def test_run_is_exported_and_played_without_this_package(tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = dataclasses.replace(preset("v3-cartpole", "debug"), run_dir=run)
    save_config(config, run / FILE_NAME)
    env = make_env(config.env, config.environment, 5)
    torch.manual_seed(1)
    agent = make_agent(config.agent, env.obs_space, env.action_space)
    counters = {"fence": 1, "update": 7, "env_steps": 70}
    checkpoint.save(run / "checkpoints", {"agent": agent.state_dict()}, keep=3, **counters)
    assert main(["export", str(run), "--mode", "sample"]) == 0
    done = subprocess.run(
        [sys.executable, "-I", "-c", ALONE, str(EXAMPLE), str(run / "agent.pt2"), config.env, "5"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    policy = Policy(config.agent, env.obs_space, env.action_space, seed=5)
    policy.load_state_dict(agent.policy_tensors())
    env.close()
    assert found == sampled_episode(policy, config, 5) and len(set(found["actions"])) == 2
