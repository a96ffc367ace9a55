"""Environments that misbehave, each in one way, and a few that do not."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces


class Counting(gymnasium.Env):
    """A well-behaved environment: shows the step of the episode, which ends after `length` steps.

    At step `at` of every episode, `misbehave` is called: what it returns takes the answer's place.
    """

    observation_space: spaces.Space = spaces.Box(0, 1000, (2,), np.float32)
    action_space: spaces.Space = spaces.Discrete(2)

    def __init__(self, length: int = 10, at: int = 3) -> None:
        self.length, self.at, self.now = length, at, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.now = 0
        return self.seen(), {}

    def step(self, action: Any) -> Any:
        self.now += 1
        answer = (self.seen(), 1.0, self.now >= self.length, False, {})
        return self.misbehave(answer) if self.now == self.at else answer

    def seen(self) -> Any:
        return np.array([self.now, self.length], np.float32)

    def misbehave(self, answer: Any) -> Any:
        return answer


class Raises(Counting):
    def misbehave(self, answer: Any) -> Any:
        raise RuntimeError("the simulator lost its mind")


class Exits(Counting):
    def misbehave(self, answer: Any) -> Any:
        os._exit(3)


class Segfaults(Counting):
    def misbehave(self, answer: Any) -> Any:
        # The trace that Python would print belongs to nobody who runs the tests.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        ctypes.string_at(0)


class Hangs(Counting):
    def misbehave(self, answer: Any) -> Any:
        time.sleep(3600)


class HangsWithChild(Counting):
    """Hangs, and so does a process that it has started; its number is shown before that."""

    observation_space = spaces.Box(0, 2**31, (1,), np.float64)

    def __init__(self) -> None:
        super().__init__(at=2)
        nap = "import time; time.sleep(3600)"
        self.child = subprocess.Popen([sys.executable, "-c", nap])

    def seen(self) -> Any:
        return np.array([self.child.pid], np.float64)

    def misbehave(self, answer: Any) -> Any:
        self.child.wait()


class ExitsWithChild(HangsWithChild):
    """Exits and leaves the process behind that it has started."""

    def misbehave(self, answer: Any) -> Any:
        os._exit(0)


class FailsToStart(Counting):
    def __init__(self) -> None:
        raise OSError("the licence server is away")


class ExitsAtStart(Counting):
    def __init__(self) -> None:
        os._exit(7)


class HangsAtStart(Counting):
    def __init__(self) -> None:
        time.sleep(3600)


class SlowToStart(Counting):
    def __init__(self) -> None:
        super().__init__()
        time.sleep(0.5)


class NanObservation(Counting):
    def misbehave(self, answer: Any) -> Any:
        return (np.array([np.nan, 0], np.float32), *answer[1:])


class HugeObservation(Counting):
    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float64)

    def misbehave(self, answer: Any) -> Any:
        return (np.array([1e300, 0], np.float64), *answer[1:])


class OutOfBounds(Counting):
    def misbehave(self, answer: Any) -> Any:
        return (np.array([-5, 0], np.float32), *answer[1:])


class WrongShape(Counting):
    def misbehave(self, answer: Any) -> Any:
        return (np.zeros(3, np.float32), *answer[1:])


class Ragged(Counting):
    def misbehave(self, answer: Any) -> Any:
        return ([[1.0], [2.0, 3.0]], *answer[1:])


class NoneObservation(Counting):
    def misbehave(self, answer: Any) -> Any:
        return (None, *answer[1:])


class InfiniteReward(Counting):
    def misbehave(self, answer: Any) -> Any:
        return (answer[0], float("inf"), *answer[2:])


class TextReward(Counting):
    def misbehave(self, answer: Any) -> Any:
        return (answer[0], "much", *answer[2:])


class VectorReward(Counting):
    def misbehave(self, answer: Any) -> Any:
        return (answer[0], np.ones(2), *answer[2:])


class OldStep(Counting):
    """Answers as environments did before Gymnasium 0.26."""

    def misbehave(self, answer: Any) -> Any:
        return (answer[0], 1.0, False, {})


class OldReset(Counting):
    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        return super().reset(seed=seed)[0]


class FlagIsText(Counting):
    def misbehave(self, answer: Any) -> Any:
        return (*answer[:2], "no", False, {})


class FloatImage(Counting):
    observation_space = spaces.Box(0, 255, (16, 16, 3), np.uint8)

    def seen(self) -> Any:
        return np.zeros((16, 16, 3), np.uint8)

    def misbehave(self, answer: Any) -> Any:
        return (answer[0].astype(np.float32), *answer[1:])


class UnknownKey(Counting):
    observation_space = spaces.Dict({"a": spaces.Discrete(3)})

    def seen(self) -> Any:
        return {"a": 1}

    def misbehave(self, answer: Any) -> Any:
        return ({"a": 1, "b": 2}, *answer[1:])


class OutsideDiscrete(Counting):
    observation_space = spaces.Discrete(3)

    def seen(self) -> Any:
        return 1

    def misbehave(self, answer: Any) -> Any:
        return (3, *answer[1:])


class AlwaysNan(Counting):
    """Never shows a valid observation after the first one."""

    def __init__(self) -> None:
        super().__init__(at=1)

    def misbehave(self, answer: Any) -> Any:
        return (np.full(2, np.nan, np.float32), *answer[1:])


class Everything(Counting):
    """Shows and takes one of each kind that an agent can, under names of its own."""

    observation_space = spaces.Dict(
        {
            "camera": spaces.Box(0, 255, (32, 32, 3), np.uint8),
            "speed": spaces.Box(-np.inf, np.inf, (), np.float64),
            "joints": spaces.Box(-1.0, 1.0, (3,), np.float32),
            "mode": spaces.Discrete(4, start=-1),
        }
    )
    action_space = spaces.Dict(
        {
            "gear": spaces.Discrete(3, start=1),
            "wheel": spaces.Box(np.array([[-2.0], [0.0]]), np.array([[2.0], [10.0]]), dtype=float),
            "lights": spaces.MultiBinary(2),
            "radio": spaces.MultiDiscrete([2, 5]),
        }
    )

    def __init__(self) -> None:
        super().__init__(length=4)
        self.taken: list[Any] = []

    def step(self, action: Any) -> Any:
        assert self.action_space.contains(action), action
        self.taken.append(action)
        return super().step(action)

    def seen(self) -> Any:
        return {
            "camera": np.full((32, 32, 3), self.now, np.uint8),
            "speed": float(self.now),
            "joints": np.array([0.1, 0.2, 0.3]),
            "mode": self.now % 4 - 1,
        }


class IgnoresSeed(Counting):
    """Begins every episode at random, whatever seed it is given."""

    def seen(self) -> Any:
        return np.array([self.now, int.from_bytes(os.urandom(1)) + 1], np.float32)
