"""Frames of 64×64×3 that compress well, as those of Crafter do, or not at all; numpy alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def regular(rng: np.random.Generator, steps: int) -> np.ndarray:
    """Flat background with a small moving block, as in simple games."""
    frames = np.full((steps, 64, 64, 3), 40, np.uint8)
    for i, frame in enumerate(frames):
        x = int(rng.integers(0, 56))
        frame[i % 56 : i % 56 + 6, x : x + 6] = (200, 30, 80)
    return frames


def textured(rng: np.random.Generator, steps: int) -> np.ndarray:
    """Tiles from a small set in changing places, as in Crafter."""
    tiles = rng.integers(0, 256, (12, 8, 8, 3), np.uint8)
    places = rng.integers(0, 12, (steps, 8, 8))
    return np.ascontiguousarray(tiles[places].transpose(0, 1, 3, 2, 4, 5).reshape(steps, 64, 64, 3))


def noise(rng: np.random.Generator, steps: int) -> np.ndarray:
    """Random bytes."""
    return rng.integers(0, 256, (steps, 64, 64, 3), np.uint8)


CONTENT: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "regular": regular,
    "textured": textured,
    "noise": noise,
}


def columns(kind: str, steps: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Return the columns of one stretch of records with such frames."""
    first = np.zeros(steps, np.bool_)
    first[0] = True
    return {
        "image": CONTENT[kind](np.random.default_rng(seed), steps),
        "reward": np.zeros(steps, np.float32),
        "is_first": first,
        "is_last": np.zeros(steps, np.bool_),
        "is_terminal": np.zeros(steps, np.bool_),
        "action": np.zeros(steps, np.int32),
    }
