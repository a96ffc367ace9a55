"""An environment that says where it is, and a policy whose actions say what it saw.

Every record can be computed from what its observation says: which environment this is, the number
of the episode and the number of the step. So whatever is lost, repeated, reordered or stitched
together on the way shows in the data itself.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from dreamer.spaces import ActionSpace, MultiDiscreteAction, ObsSpace, VectorSpec
from dreamer.weights import PackedWeights, Version
from replay_service import Column, Schema
from replay_service.schema import REQUIRED

CLASSES = 2**16
LONGEST = 500
OBS_SPACE: ObsSpace = {"vector": VectorSpec(shape=(4,))}
ACTION_SPACE: ActionSpace = {"action": MultiDiscreteAction(classes=(CLASSES,) * 4)}
SCHEMA = Schema(
    (
        Column("vector", "float32", (4,)),
        Column("action", "int32", (4,)),
        *(Column(*row) for row in REQUIRED),
        Column("deter", "float16", (1,)),
    )
)


def episode_length(identity: int, episode: int) -> int:
    """Return the steps of an episode: 1, 500, or anything in between."""
    if episode % 5 < 2:
        return (1, LONGEST)[episode % 5]
    return 1 + int(np.random.SeedSequence((identity, episode)).generate_state(1)[0]) % LONGEST


class CountingEnv(gymnasium.Env):
    """Emits (identity: high and low half, episode, step) and wants the same back as the action.

    The identity is the seed of the first reset.
    """

    observation_space = gymnasium.spaces.Box(0, CLASSES, (4,), np.float32)
    action_space = gymnasium.spaces.MultiDiscrete([CLASSES] * 4)

    def __init__(self) -> None:
        self._identity, self._episode, self._step = 0, -1, 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Begin the next episode."""
        self._identity = self._identity if seed is None else seed
        self._episode, self._step = self._episode + 1, 0
        return self._observation(), {}

    def step(self, action: Any) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Take one step; raises if the action was not chosen after seeing the last observation."""
        seen = self._observation().astype(np.int64)
        if not np.array_equal(seen, action):
            raise RuntimeError(f"the action {action} does not answer the observation {seen}")
        self._step += 1
        over = self._step == episode_length(self._identity, self._episode)
        dies = self._episode % 2 == 0
        reward = reward_of(self._episode, self._step)
        return self._observation(), reward, over and dies, over and not dies, {}

    def _observation(self) -> NDArray[np.float32]:
        high, low = divmod(self._identity, CLASSES)
        return np.array([high, low, self._episode, self._step], np.float32)


class CountingPolicy:
    """Acts by repeating what it sees; its latent counts the steps since the last reset."""

    def __init__(
        self, config: Any, obs_space: ObsSpace, action_space: ActionSpace, *, seed: int
    ) -> None:
        self.version: Version = (-1, -1)
        self._count = np.zeros(0, np.int64)

    def load(self, weights: PackedWeights) -> None:
        """Take a new version."""
        self.version = weights.version

    def step(
        self,
        obs: dict[str, NDArray[Any]],
        is_first: NDArray[np.bool_],
        mode: str,
        held: NDArray[np.bool_] | None = None,
    ) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
        """Choose actions for K environments."""
        if len(self._count) != len(is_first):
            self._count = np.zeros(len(is_first), np.int64)
        count = np.where(is_first, 0, self._count + 1)
        self._count = count if held is None else np.where(held, self._count, count)
        return {"action": obs["vector"].astype(np.int32)}, {
            "deter": self._count[:, None].astype(np.float16)
        }


def reward_of(episode: int, step: int) -> float:
    """Return the reward of arriving at a step."""
    return float(step + 1000 * (episode % 100)) if step else 0.0


class Story:
    """What one environment emits in the right order, as far as it is asked for."""

    def __init__(self, identity: int) -> None:
        self.identity = identity
        self._ends = np.zeros(1, np.int64)

    def position(self, episode: NDArray[np.int64], step: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the number of each record in the stream, from 0; -1 for impossible ones."""
        most = int(episode.max(initial=0))
        while len(self._ends) <= most + 1:
            records = episode_length(self.identity, len(self._ends) - 1) + 1
            self._ends = np.append(self._ends, self._ends[-1] + records)
        place = self._ends[episode] + step
        return np.where((step >= 0) & (place < self._ends[episode + 1]), place, -1)

    def lengths(self, episode: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the steps of each episode; call `position` first."""
        return self._ends[episode + 1] - self._ends[episode] - 1


def read_rows(columns: dict[str, NDArray[Any]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Check whole records against what their observations say.

    Args:
        columns: {name: (N, …)} of the records.

    Returns:
        (N,) identity of the environment and (N,) position in its story.
    """
    seen = columns["vector"].astype(np.int64)
    identity, episode, step = seen[:, 0] * CLASSES + seen[:, 1], seen[:, 2], seen[:, 3]
    position, length = np.full(len(seen), -1), np.zeros(len(seen), np.int64)
    for one in np.unique(identity):
        mine, story = identity == one, Story(int(one))
        position[mine] = story.position(episode[mine], step[mine])
        length[mine] = story.lengths(episode[mine])
    assert (position >= 0).all(), seen[position < 0][:5]
    last = step == length
    want = {
        "is_first": step == 0,
        "is_last": last,
        "is_terminal": last & (episode % 2 == 0),
        "reward": np.where(step > 0, step + 1000 * (episode % 100), 0),
        "action": np.where(last[:, None], 0, seen),
        "deter": step[:, None],
    }
    for name, values in want.items():
        wrong = np.flatnonzero((columns[name] != values).reshape(len(seen), -1).any(1))
        assert not len(wrong), (name, seen[wrong[:3]], columns[name][wrong[:3]])
    return identity, position
