"""Tasks of a few steps whose optimum, and whose ceiling for weaker agents, is known."""

from __future__ import annotations

from typing import Any

import numpy as np

from dreamer.spaces import (
    ActionSpace,
    BoxAction,
    DiscreteAction,
    ImageSpec,
    ObsSpace,
    VectorSpec,
)
from tests.learning.harness import Obs


class Remember:
    """A cue is shown once; three blank steps later the matching action earns 3.

    The optimum is 3. Without memory the cue is gone, and no policy earns more than 3/2 on average.
    Cue and reward are large beside the unit variance of the likelihoods of V1 and V2: what is worth
    less than its KL is rightly forgotten.
    """

    obs_space: ObsSpace = {"vector": VectorSpec(shape=(3,))}
    action_space: ActionSpace = {"action": DiscreteAction(classes=2)}
    blanks = 3

    def reset(self, rng: np.random.Generator) -> Obs:
        """Draw a cue and show it."""
        self.cue, self.now = int(rng.integers(2)), 0
        return self._seen()

    def step(self, action: Any) -> tuple[Obs, float, bool, bool]:
        """Wait, or judge the answer."""
        self.now += 1
        if self.now <= self.blanks:
            return self._seen(), 0.0, False, False
        return self._seen(), 3.0 * float(action == self.cue), True, True

    def _seen(self) -> Obs:
        vector = np.zeros(3, np.float32)
        if self.now == 0:
            vector[self.cue] = 3.0
        vector[2] = float(self.now == self.blanks)  # time to answer
        return {"vector": vector}


class Reach:
    """Move a point on a line into a target in six steps, each of which earns 4 − 4·distance.

    A step covers up to 0.5, targets are at ±0.75 and 0.1 wide on each side: the optimum leaves
    distances 0.15, 0, 0, 0, 0, 0 and earns 23.4. Standing still earns 8.4.
    """

    obs_space: ObsSpace = {"vector": VectorSpec(shape=(3,))}
    action_space: ActionSpace = {"action": BoxAction(low=(-1.0,), high=(1.0,))}
    steps = 6

    def reset(self, rng: np.random.Generator) -> Obs:
        """Put the point at 0 and the target at one of two places."""
        self.target = 0.75 if rng.integers(2) else -0.75
        self.place, self.now = 0.0, 0
        return self._seen()

    def step(self, action: Any) -> tuple[Obs, float, bool, bool]:
        """Move by half the action."""
        self.place += 0.5 * float(np.clip(action[0], -1.0, 1.0))
        self.now += 1
        last = self.now == self.steps
        distance = max(0.0, abs(self.place - self.target) - 0.1)
        return self._seen(), 4.0 - 4.0 * distance, last, last

    def _seen(self) -> Obs:
        left = 1.0 - self.now / self.steps
        # Large beside the unit variance of the likelihoods of V1 and V2, so that places are seen.
        return {"vector": np.array([4.0 * self.place, 4.0 * self.target, left], np.float32)}


class Slippery:
    """Two doors, five times: one pays 1 with certainty, the other 2 with probability 0.3.

    The optimum is 5. An agent that imagines its luck, and not the chance, takes the other door and
    earns 3.
    """

    obs_space: ObsSpace = {"vector": VectorSpec(shape=(2,))}
    action_space: ActionSpace = {"action": DiscreteAction(classes=2)}
    steps = 5

    def reset(self, rng: np.random.Generator) -> Obs:
        """Begin at the doors."""
        self.rng, self.now = rng, 0
        return self._seen(0.0)

    def step(self, action: Any) -> tuple[Obs, float, bool, bool]:
        """Pay what the door pays, which is seen afterwards."""
        self.now += 1
        paid = 1.0 if action == 0 else 2.0 * float(self.rng.random() < 0.3)
        last = self.now == self.steps
        return self._seen(paid), paid, last, last

    def _seen(self, paid: float) -> Obs:
        return {"vector": np.array([paid, 1.0 - self.now / self.steps], np.float32)}


class Catch:
    """Catch a ball that falls through a picture of 16×16 pixels, or 64×64 for agents that need it.

    Four columns, three moves before the ball lands. The optimum is 1, standing still earns 1/4.
    """

    action_space: ActionSpace = {"action": DiscreteAction(classes=3)}
    rows, columns = 4, 4

    def __init__(self, side: int = 16) -> None:
        self.side = side
        self.obs_space: ObsSpace = {"image": ImageSpec(shape=(side, side, 1))}

    def reset(self, rng: np.random.Generator) -> Obs:
        """Drop a ball in a random column."""
        self.ball, self.paddle, self.row = int(rng.integers(self.columns)), 1, 0
        return self._seen()

    def step(self, action: Any) -> tuple[Obs, float, bool, bool]:
        """Move the paddle left, not at all or right; the ball falls."""
        self.paddle = int(np.clip(self.paddle + int(action) - 1, 0, self.columns - 1))
        self.row += 1
        last = self.row == self.rows - 1
        return self._seen(), float(last and self.paddle == self.ball), last, last

    def _seen(self) -> Obs:
        cell = self.side // 4
        image = np.zeros((self.side, self.side, 1), np.uint8)
        for row, column, shade in ((3, self.paddle, 128), (self.row, self.ball, 255)):
            image[row * cell : (row + 1) * cell, column * cell : (column + 1) * cell] = shade
        return {"image": image}
