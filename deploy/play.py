"""`dreamfleet play`: watch a run's agent in a window, in the terminal or as a video."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from numpy.typing import NDArray
from rich.markup import escape

from deploy.config import FILE_NAME, ConfigError, TrainConfig, load_config
from deploy.evaluate import (
    SEED_OFFSET,
    Arrays,
    Env,
    Episode,
    mode_of,
    play,
    policy_of,
    reconstruction_of,
    require_checkpoint,
)
from deploy.film import VIDEO_WIDTH, frame_of
from deploy.progress import console, count, number
from deploy.screens import LONGEST_FILM, Closed, Film, Pace, Screen, Terminal, Window, has_display
from deploy.status import require_run


@dataclass(frozen=True, kw_only=True)
class PlayOptions:
    """Watch a run's newest valid checkpoint play, in real time."""

    run_dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")]
    """Run directory."""
    episodes: int = 3
    """Episodes to play; Ctrl-C, or closing the window, ends it before."""
    window: bool = False
    """Watch in a window. Without one of these three: a window where there is a display, else the
    terminal, else a video in the run's videos/."""
    terminal: bool = False
    """Watch in the terminal: coloured characters, as large as it is."""
    video: Path | None = None
    """Write an animated GIF to this file instead."""
    mode: Literal["paper", "sample", "greedy"] = "paper"
    """Sample actions or take the most likely ones; paper does what the agent's publication did."""
    model: bool = False
    """Also show the images that the agent sees, beside what its model makes of them."""
    speed: float = 1.0
    """How many times as fast as real time."""
    seed: int | None = None
    """Seed of environment and policy, counted up with each episode; None takes that of eval."""

    def __post_init__(self) -> None:
        if self.episodes < 1:
            raise ConfigError(f"--episodes must be at least 1, got {self.episodes}")
        if not 0 < self.speed < float("inf"):
            raise ConfigError(f"--speed must be above 0, got {self.speed}; 1 is real time")
        if self.video is not None and self.video.suffix.lower() != ".gif":
            raise ConfigError(f"--video writes animated GIF: name it .gif, got {self.video}")
        asked = [name for name in ("window", "terminal", "video") if getattr(self, name)]
        if len(asked) > 1:
            raise ConfigError(
                f"there is one place to watch at a time, got --{' and --'.join(asked)}"
            )


def watch(options: PlayOptions) -> int:
    """Play and show it, then say how the episodes went.

    Blocks for as long as the episodes take in real time, unless they go into a video.

    Raises:
        ConfigError: there is no run, no checkpoint in it, nothing to see, or nowhere to show it.
        EnvError: the environment, or its library, is not there.
    """
    config = load_config(require_run(options.run_dir) / FILE_NAME)
    place = _place(options)
    found = require_checkpoint(options.run_dir)
    if place != "window":
        # Pictures are drawn into memory; without a screen SDL would otherwise complain.
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    from actors.envs import make_env

    env = make_env(config.env, config.environment, config.seed)
    with closing(env):
        show = _Show(config, found, options, env)
        rate = env.decision_rate * options.speed
        with closing(_screen(place, options, config.env, found, rate)) as screen:
            episodes = show.play(screen, Pace(1 / rate))
    _report(episodes, found, screen)
    return 0


class _Show:
    """Episodes of one environment, one after the other, on a screen."""

    def __init__(self, config: TrainConfig, found: Any, options: PlayOptions, env: Any) -> None:
        self._env, self._name, self._episodes = env, config.env, options.episodes
        self._mode = mode_of(config, options.mode)
        self._seed = config.seed + SEED_OFFSET if options.seed is None else options.seed
        self._policy = policy_of(config, found, env, self._seed)
        self._model: Callable[[], Any] = dict
        if options.model:
            self._model = reconstruction_of(config, found, env, self._policy) or dict
        self._title, self._step = "", 0

    def play(self, screen: Screen, pace: Pace) -> list[Episode]:
        """Return the episodes that were played to their ends."""

        def look(env: Env, obs: Arrays, ret: float) -> None:
            self._step += 1
            if not screen.live or pace.wait():
                picture = self._picture(env, obs, None if screen.live else VIDEO_WIDTH)
                screen.show(picture, f"{self._title}, step {self._step}, return {number(ret)}")

        done: list[Episode] = []
        try:
            for i in range(self._episodes):
                self._title, self._step = f"episode {i + 1} of {self._episodes}", 0
                seed = self._seed + i
                done += play(self._policy, [self._env], 1, seed=seed, mode=self._mode, watch=look)
        except (Closed, KeyboardInterrupt):
            pass  # whoever watches has seen enough
        return done

    def _picture(self, env: Env, obs: Arrays, width: int | None) -> NDArray[np.uint8]:
        picture = frame_of(env, obs, self._model(), width=width)
        if picture is None:
            raise ConfigError(
                f"{self._name} draws nothing, and its agent sees no image: there is nothing to "
                "watch; `dreamfleet eval` gives its scores (an environment of yours is drawn if "
                'its render_mode is "rgb_array" and render() returns a picture)'
            )
        return picture


def _place(options: PlayOptions) -> str:
    """Return where to watch: window, terminal or video."""
    if options.window and not has_display():
        raise ConfigError(
            "there is no display (neither DISPLAY nor WAYLAND_DISPLAY is set); "
            "use --terminal, or --video PATH"
        )
    if options.terminal and not console().is_terminal:
        raise ConfigError("the output is no terminal to draw in; use --video PATH")
    if options.video or options.terminal:
        return "video" if options.video else "terminal"
    return "window" if has_display() else "terminal" if console().is_terminal else "video"


def _screen(place: str, options: PlayOptions, title: str, found: Any, rate: float) -> Screen:
    if place == "window":
        return Window(title)
    if place == "terminal":
        return Terminal(console())
    name = f"play-{found.manifest['env_steps']:010d}.gif"
    return Film(options.video or options.run_dir / "videos" / name, 1000 / rate)


def _report(episodes: list[Episode], found: Any, screen: Screen) -> None:
    facts = found.manifest
    trained = f"{count(facts['env_steps'])} steps, {count(facts['update'])} updates"
    console().print(f"checkpoint {found.path.name} ({trained})", soft_wrap=True)
    for i, episode in enumerate(episodes):
        line = f"episode {i + 1}: return [bold green]{number(episode.ret)}[/]"
        console().print(f"{line}, {episode.length} steps, {episode.end}")
    if isinstance(screen, Film):
        cut = f" (cut: it is full at {count(LONGEST_FILM)} frames)" if screen.full else ""
        console().print(f"video {escape(str(screen.path))}{cut}", soft_wrap=True)
