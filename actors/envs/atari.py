"""Atari 2600 games, preprocessed as DreamerV3 does it."""

from __future__ import annotations

import numpy as np
from ale_py import Action, ALEInterface, LoggerMode, roms
from gymnasium import spaces
from numpy.typing import NDArray
from PIL import Image

from actors.envs.config import EnvConfig
from actors.envs.registry import EnvError, nearest

CAP_FRAMES = 108_000
"""Frames (half an hour of play) after which an episode is truncated."""
FRAME_RATE = 60.0
"""Frames per second of the console."""
_LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)


def make(name: str, config: EnvConfig) -> Atari:
    """Make a game by its name, as ``Pong``, ``SpaceInvaders`` or ``space_invaders``."""
    known = {rom.replace("_", ""): rom for rom in roms.get_all_rom_ids()}
    rom = known.get(name.lower().replace("_", "").replace("-", ""))
    if rom is None:
        raise EnvError(f"unknown game ale:{name}{nearest(name.lower(), sorted(known.values()))}")
    return Atari(rom, config)


class Atari:
    """One game: frames skipped, the last two merged, resized, no-ops at the start.

    An episode is terminated by game over alone; lost lives do not matter. Running into the cap of
    108 000 frames is a *truncation*. The published DreamerV3 code marks it as terminal instead,
    which teaches the critic that long survival is worth nothing: a deviation on purpose, which
    concerns only episodes of half an hour.
    """

    def __init__(self, rom: str, config: EnvConfig) -> None:
        self.action_repeat, self.frame_rate = config.action_repeat or 4, FRAME_RATE
        self._rom, self._config = rom, config
        ALEInterface.setLoggerMode(LoggerMode.Error)
        self._ale = ALEInterface()
        self._ale.setFloat("repeat_action_probability", config.sticky)
        self._load(0)
        actions = (
            self._ale.getLegalActionSet() if config.all_actions else self._ale.getMinimalActionSet()
        )
        self._actions: list[Action] = list(actions)
        size, channels = config.image_size, 1 if config.grayscale else 3
        self.observation_space = spaces.Box(0, 255, (size, size, channels), np.uint8)
        self.action_space = spaces.Discrete(len(self._actions))
        height, width = self._ale.getScreenDims()
        self._screens = np.zeros((2, height, width, 3), np.uint8)
        self._frames = 0

    def reset(self, seed: int | None) -> NDArray[np.uint8]:
        """Begin a game, and wait for a random number of frames."""
        if seed is not None:
            self._load(seed)
        self._ale.reset_game()
        if self._config.noops:
            for _ in range(int(self._rng.integers(self._config.noops + 1))):
                self._ale.act(Action.NOOP)
                if self._ale.game_over():
                    self._ale.reset_game()
        self._frames = 0
        self._ale.getScreenRGB(self._screens[0])
        self._screens[1] = 0
        return self._observation()

    def step(self, action: int) -> tuple[NDArray[np.uint8], float, bool, bool]:
        """Repeat the action; the observation merges the last two frames."""
        reward = 0.0
        for frame in range(self.action_repeat):
            reward += self._ale.act(self._actions[action])
            self._frames += 1
            left = self.action_repeat - 1 - frame
            over, capped = self._ale.game_over(), self._frames >= CAP_FRAMES
            if left < 2 or over or capped:
                self._ale.getScreenRGB(self._screens[self._frames % 2])
            if over or capped:
                break
        return self._observation(), reward, over, capped and not over

    def render(self) -> NDArray[np.uint8]:
        """Return the screen in full size."""
        return self._ale.getScreenRGB()

    def close(self) -> None:
        """Do nothing: the emulator is freed with this object."""

    def _load(self, seed: int) -> None:
        # The emulator takes its seed when a game is loaded.
        self._rng = np.random.default_rng(seed)
        self._ale.setInt("random_seed", seed % 2**31)
        self._ale.loadROM(roms.get_rom_path(self._rom))

    def _observation(self) -> NDArray[np.uint8]:
        size = self._config.image_size
        screen = np.maximum(self._screens[0], self._screens[1])
        # The published settings resize with Pillow's bilinear filter.
        picture = Image.fromarray(screen).resize((size, size), Image.Resampling.BILINEAR)
        image = np.asarray(picture)
        if self._config.grayscale:
            return (image @ _LUMINANCE).astype(np.uint8)[..., None]
        return image
