"""An environment in which everything goes wrong now and then, in the middle of its episodes."""

from __future__ import annotations

import os
import random
import time
from typing import Any

import gymnasium
import numpy as np

LENGTH = 20
MOODS = ("raise", "hang", "exit", "nan", *["work"] * 12)


class Moody(gymnasium.Env):
    """Raises, hangs, ends its process or emits NaN at step 7 of some episodes."""

    observation_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)
    count, mood = 0, "work"
    choice = random.Random(0)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode in some mood; every life of an environment has other ones."""
        if seed is not None:
            self.choice = random.Random(seed)
        self.count, self.mood = 0, self.choice.choice(MOODS)
        return np.zeros(2, np.float32), {}

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Take a step, or fail."""
        self.count += 1
        seen = np.full(2, self.count / LENGTH, np.float32)
        if self.count == 7:
            if self.mood == "raise":
                raise RuntimeError("the simulator broke")
            if self.mood == "hang":
                time.sleep(1e6)
            if self.mood == "exit":
                os._exit(3)
            if self.mood == "nan":
                seen[1] = np.nan
        return seen, 1.0, self.count == LENGTH, False, {}
