"""Each screen shows what it is given, and says when nobody watches."""

from __future__ import annotations

import io
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pygame
import pytest
from PIL import Image
from rich.console import Console

from deploy.config import ConfigError
from deploy.screens import LONGEST_FILM, Closed, Film, HalfBlocks, Pace, Window, fitted

RED, BLUE = (255, 0, 0), (0, 0, 255)


def halves(rows: int, columns: int) -> np.ndarray:
    """A picture that is red above and blue below."""
    picture = np.zeros((rows, columns, 3), np.uint8)
    picture[: rows // 2], picture[rows // 2 :] = RED, BLUE
    return picture


def test_steps_wait_for_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that nothing but waiting moves: on a busy machine every step may be late."""
    slept = [0.0]
    clock = SimpleNamespace(monotonic=lambda: sum(slept), sleep=slept.append)
    monkeypatch.setattr("deploy.screens.time", clock)
    pace = Pace(0.25)
    assert all([pace.wait() for _ in range(4)])
    assert slept[1:] == [0.25] * 4


def test_frames_that_are_late_are_left_out_but_not_all() -> None:
    pace = Pace(1e-9)
    assert [pace.wait() for _ in range(3)] == [True, False, False]
    deadline = time.monotonic() + 5
    while not pace.wait():
        assert time.monotonic() < deadline


def test_pictures_fill_the_room_in_their_proportions() -> None:
    assert fitted(halves(10, 10), 80, 40).shape == (40, 40, 3)
    assert fitted(halves(100, 300), 60, 40).shape == (20, 60, 3)
    assert fitted(halves(1, 200), 20, 40).shape == (2, 20, 3)
    assert (fitted(halves(100, 100), 10, 2)[:, 0] == [RED, BLUE]).all()


def test_a_character_has_the_colours_of_two_pixels() -> None:
    out = io.StringIO()
    shown = Console(
        file=out, force_terminal=True, color_system="truecolor", width=6, height=2, _environ={}
    )
    shown.print(HalfBlocks(halves(2, 2), "a caption"), end="")
    assert out.getvalue() == "  \x1b[38;2;255;0;0;48;2;0;0;255m▀▀\x1b[0m\na capt"


@pytest.fixture
def memory_display(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")


@pytest.mark.usefixtures("memory_display")
def test_window_enlarges_the_picture_and_centres_it() -> None:
    window = Window("a title")
    try:
        window.show(halves(16, 16), "a caption")
        assert pygame.display.get_caption()[0] == "a title: a caption"
        pygame.display.set_mode((100, 60), pygame.RESIZABLE)
        window.show(halves(16, 16), "a caption")
        pixels = pygame.surfarray.array3d(pygame.display.get_surface()).swapaxes(0, 1)
        assert (pixels[:30, 20:80] == RED).all() and (pixels[30:, 20:80] == BLUE).all()
        assert not pixels[:, :20].any() and not pixels[:, 80:].any()
    finally:
        window.close()


@pytest.mark.usefixtures("memory_display")
@pytest.mark.parametrize(
    "event", [{"type": pygame.QUIT}, {"type": pygame.KEYDOWN, "key": pygame.K_ESCAPE}]
)
def test_whoever_closes_the_window_ends_it(event: dict[str, int]) -> None:
    window = Window("a title")
    try:
        window.show(halves(16, 16), "")
        pygame.event.post(pygame.event.Event(event.pop("type"), event))
        with pytest.raises(Closed):
            window.show(halves(16, 16), "")
    finally:
        window.close()


def test_a_display_that_does_not_answer_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SDL_VIDEODRIVER", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setenv("DISPLAY", ":9977")
    with pytest.raises(ConfigError, match="no window can be opened here.*--terminal"):
        Window("a title")


def test_film_leaves_out_what_viewers_would_slow_down(tmp_path: Path) -> None:
    film = Film(tmp_path / "a.gif", 6.0)
    for i in range(9):
        film.show(np.full((4, 4, 3), i * 20, np.uint8), "")
    film.close()
    with Image.open(film.path) as gif:
        assert (gif.n_frames, gif.info["duration"]) == (3, 20)


def test_film_that_is_full_is_written_as_it_is(tmp_path: Path) -> None:
    film = Film(tmp_path / "a.gif", 20.0)
    with pytest.raises(Closed):
        for i in range(LONGEST_FILM + 1):
            film.show(np.full((2, 2, 3), i % 2 * 200, np.uint8), "")
    film.close()
    with Image.open(film.path) as gif:
        assert gif.n_frames == LONGEST_FILM


def test_film_of_nothing_is_no_file(tmp_path: Path) -> None:
    film = Film(tmp_path / "a.gif", 20.0)
    film.close()
    assert not film.path.exists()
