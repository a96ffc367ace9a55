"""A run that holds a checkpoint of an untrained agent, and environments for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import Env, spaces

from actors.envs import make_env
from deploy.config import FILE_NAME, TrainConfig, save_config
from dreamer.agent import make_agent
from dreamer.policy import Policy
from learner import checkpoint


class Pixels(Env[Any, Any]):
    """Shows the agent a brighter image at each of three steps, and draws nothing else."""

    observation_space = spaces.Box(0, 255, (8, 8, 3), np.uint8)
    action_space = spaces.Discrete(2)
    metadata = {"render_fps": 10}

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        self.steps = 0
        return self._seen(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        return self._seen(), 1.0, self.steps == 3, False, {}

    def _seen(self) -> Any:
        return np.full((8, 8, 3), 80 * self.steps, np.uint8)


class Drawn(Pixels):
    """Draws itself too, darker at each step."""

    render_mode = "rgb_array"

    def render(self) -> Any:
        return np.full((64, 64, 3), 250 - 10 * self.steps, np.uint8)


class Unseen(Pixels):
    """Shows numbers only."""

    observation_space = spaces.Box(-1, 1, (2,), np.float32)

    def _seen(self) -> Any:
        return np.zeros(2, np.float32)


def save(directory: Path, config: TrainConfig, update: int) -> Path:
    """Leave a run with a checkpoint of an untrained agent."""
    save_config(config, directory / FILE_NAME)
    env = make_env(config.env, config.environment, 0)
    agent = make_agent(config.agent, env.obs_space, env.action_space)
    env.close()
    state = {"agent": agent.state_dict()}
    counters = {"fence": 1, "update": update, "env_steps": 10 * update}
    return checkpoint.save(directory / "checkpoints", state, keep=3, **counters)


def sampled_episode(policy: Policy, config: TrainConfig, seed: int) -> dict[str, Any]:
    """Play an episode, sampling actions; return what the examples print of theirs."""
    env = make_env(config.env, config.environment, seed)
    seen, actions, rewards, over = env.reset(seed), list[int](), 0.0, False
    while not over:
        obs = {key: x[None] for key, x in seen.items()}
        chosen, _ = policy.step(obs, np.array([not actions]), "sample")
        actions.append(int(chosen["action"][0]))
        seen, reward, terminated, truncated = env.step({"action": chosen["action"][0]})
        rewards, over = rewards + reward, terminated or truncated
    env.close()
    return {"return": rewards, "actions": actions}
