"""Where pictures of a playing agent go: a window, a terminal, or a GIF."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from math import ceil
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.color import Color
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.segment import Segment
from rich.style import Style

from deploy.config import ConfigError

LONGEST_FILM = 1500
"""Frames that a GIF holds at most; they are all in memory until it is written."""
WINDOW_SIDE = 480
"""Smaller pictures are enlarged to about this many pixels when a window opens."""
SHORTEST_MS = 20
"""Time for which viewers show a frame of a GIF at least."""
LONGEST_BLIND_S = 0.25
"""Frames that would come too late are left out, but never for longer than this."""
_UNSEEN = ("dummy", "offscreen")

Picture = NDArray[np.uint8]


class Closed(Exception):
    """Nobody watches any more: the window was closed, or the film is full."""


class Screen(Protocol):
    """Something that shows one picture after the other."""

    live: bool
    """Whether somebody watches now, so that pictures must come in real time."""

    def show(self, picture: Picture, caption: str) -> None:
        """Show a picture (h, w, 3) and a line of text. Raises Closed if nobody watches."""

    def close(self) -> None:
        """Put away what was opened; write what is still to be written."""


class Pace:
    """Lets steps begin at equal distances in time.

    Args:
        period_s: seconds from one step to the next.
    """

    def __init__(self, period_s: float) -> None:
        self._period, self._due, self._drawn = period_s, time.monotonic(), float("-inf")

    def wait(self) -> bool:
        """Wait until the next step is due, and say whether there is time to draw it.

        Blocks for one period at most. Being late is made up for by not drawing; where that is not
        enough, time goes more slowly.
        """
        now = time.monotonic()
        self._due += self._period
        late = now > self._due
        if late and now - self._drawn < LONGEST_BLIND_S:
            return False
        if late:
            self._due = now
        else:
            time.sleep(self._due - now)
        self._drawn = self._due
        return True


class Window:
    """A window of pygame, which can be resized; Escape, Q or its button closes it.

    Raises:
        ConfigError: it cannot be opened.
    """

    live = True

    def __init__(self, title: str) -> None:
        try:
            import pygame
        except ModuleNotFoundError as error:
            raise ConfigError(
                "a window needs pygame, which is not installed: pip install pygame-ce, or use "
                "--terminal, or --video PATH"
            ) from error
        self._pygame: Any = pygame
        self._title = title
        try:
            pygame.display.init()
            # Where no display answers, SDL may quietly draw into memory.
            if pygame.display.get_driver() in _UNSEEN and not os.environ.get("SDL_VIDEODRIVER"):
                raise pygame.error("no display answers")
        except pygame.error as error:
            raise ConfigError(
                f"no window can be opened here ({error}); use --terminal, or --video PATH"
            ) from error
        self._surface: Any = None

    def show(self, picture: Picture, caption: str) -> None:
        """Draw a picture as large as the window allows. Raises Closed."""
        pygame = self._pygame
        height, width = picture.shape[:2]
        if self._surface is None:
            factor = max(1, round(WINDOW_SIDE / height))
            size = width * factor, height * factor
            self._surface = pygame.display.set_mode(size, pygame.RESIZABLE)
        for event in pygame.event.get():
            key = event.key if event.type == pygame.KEYDOWN else None
            if event.type == pygame.QUIT or key in (pygame.K_ESCAPE, pygame.K_q):
                raise Closed
        # An environment that draws with pygame may have opened and closed displays of its own.
        self._surface = pygame.display.get_surface() or self._surface
        room_w, room_h = self._surface.get_size()
        scale = min(room_w / width, room_h / height)
        size = max(1, int(width * scale)), max(1, int(height * scale))
        drawn = pygame.surfarray.make_surface(picture.swapaxes(0, 1))
        corner = (room_w - size[0]) // 2, (room_h - size[1]) // 2
        self._surface.fill((0, 0, 0))
        self._surface.blit(pygame.transform.scale(drawn, size), corner)
        pygame.display.set_caption(f"{self._title}: {caption}")
        pygame.display.flip()

    def close(self) -> None:
        """Close the window."""
        self._pygame.display.quit()


class Terminal:
    """Half a character for each pixel, as large as the terminal, with the text below.

    Args:
        console: shows it; colours are reduced to what its terminal has.
    """

    live = True

    def __init__(self, console: Console) -> None:
        self._live = Live(console=console, screen=True, auto_refresh=False)
        self._live.start()

    def show(self, picture: Picture, caption: str) -> None:
        """Draw a picture over the one before."""
        self._live.update(HalfBlocks(picture, caption), refresh=True)

    def close(self) -> None:
        """Give the terminal back as it was."""
        self._live.stop()


class HalfBlocks:
    """A picture in characters: the upper half of each has one colour, the lower half another."""

    def __init__(self, picture: Picture, caption: str) -> None:
        self._picture, self._caption = picture, caption

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        columns, rows = options.max_width, max((options.height or options.size.height) - 1, 1)
        pixels = fitted(self._picture, columns, 2 * rows)
        margin = Segment(" " * ((columns - pixels.shape[1]) // 2))
        for upper, lower in zip(pixels[::2], pixels[1::2], strict=True):
            yield margin
            yield from _line(upper, lower)
            yield Segment.line()
        yield Segment(self._caption[:columns])


def fitted(picture: Picture, width: int, height: int) -> Picture:
    """Return a picture as large as fits, in its proportions, with an even number of rows."""
    scale = min(width / picture.shape[1], height / picture.shape[0])
    size = max(1, int(picture.shape[1] * scale)), max(2, int(picture.shape[0] * scale) // 2 * 2)
    way = Image.Resampling.BOX if scale < 1 else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(picture).resize(size, way))


def _line(upper: Picture, lower: Picture) -> Iterator[Segment]:
    """Yield one segment for every run of equal cells."""
    cells = np.concatenate([upper, lower], 1)
    starts = np.flatnonzero(np.r_[True, (cells[1:] != cells[:-1]).any(1)])
    for start, end in zip(starts, [*starts[1:], len(cells)], strict=True):
        above, below = cells[start, :3].tolist(), cells[start, 3:].tolist()
        style = Style(color=Color.from_rgb(*above), bgcolor=Color.from_rgb(*below))
        yield Segment("▀" * int(end - start), style)


class Film:
    """An animated GIF, written when it is closed.

    Args:
        path: of the file.
        frame_ms: time for which a frame is shown; viewers show none shorter than 20 ms, so of
            faster ones some are left out.
    """

    live = False

    def __init__(self, path: Path, frame_ms: float) -> None:
        self.path = path
        self._every = ceil(SHORTEST_MS / frame_ms)
        self._frame_ms = round(frame_ms * self._every / 10) * 10
        self._frames: list[Picture] = []
        self._seen = 0

    def show(self, picture: Picture, caption: str) -> None:
        """Keep a picture. Raises Closed when there is no room for it."""
        if self.full:
            raise Closed
        if self._seen % self._every == 0:
            self._frames.append(picture)
        self._seen += 1

    @property
    def full(self) -> bool:
        """Whether there is no room for another frame."""
        return len(self._frames) >= LONGEST_FILM

    def close(self) -> None:
        """Write the file if anything was seen. Raises OSError if it cannot be written."""
        if not self._frames:
            return
        from learner.files import write_atomically
        from learner.gif import encode_gif

        self.path.parent.mkdir(parents=True, exist_ok=True)
        caption = "An episode of dreamfleet play."
        write_atomically(self.path, encode_gif(np.stack(self._frames), self._frame_ms, caption))


def has_display() -> bool:
    """Whether a window could be opened, as far as the environment's variables say."""
    if os.environ.get("SDL_VIDEODRIVER"):
        return True
    named = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    return bool(named) or sys.platform in ("darwin", "win32")
