import numpy as np
import pytest

from deploy.config import ConfigError
from deploy.film import VIDEO_FRAMES, VIDEO_WIDTH, Camera, frame_of, side_by_side


class Drawing:
    def __init__(self, picture: np.ndarray | None) -> None:
        self.picture = picture

    def render(self) -> np.ndarray | None:
        return self.picture


def grey(side: int, value: int, channels: int = 3) -> np.ndarray:
    return np.full((side, side, channels), value, np.uint8)


def test_small_pictures_are_enlarged_and_centred_beside_large_ones() -> None:
    frame = side_by_side([grey(10, 1), grey(4, 2)])
    assert frame.shape == (10, 10 + 4 + 8, 3)  # a gap of 4, and 4 pixels twice as large
    assert (frame[:, :10] == 1).all() and not frame[:, 10:14].any()
    assert (frame[1:9, 14:] == 2).all() and not frame[[0, 9], 14:].any()


def test_what_is_drawn_seen_and_reconstructed_stand_side_by_side() -> None:
    camera = Camera(lambda: {"image": grey(8, 3, 1)})
    camera(Drawing(grey(8, 1)), {"image": grey(8, 2, 1), "vector": np.zeros(3, np.float32)})
    (frame,) = camera.frames
    assert frame.shape == (8, 3 * 8 + 2 * 4, 3)
    assert [frame[0, x, 0] for x in (0, 12, 24)] == [1, 2, 3]


def test_without_a_decoder_the_drawing_alone_is_filmed_else_what_is_seen() -> None:
    camera = Camera()
    camera(Drawing(grey(8, 1)), {"image": grey(4, 2)})
    camera(Drawing(None), {"image": grey(4, 2)})
    camera(Drawing(None), {"vector": np.zeros(3, np.float32)})
    assert [frame.shape for frame in camera.frames] == [(8, 8, 3), (4, 4, 3)]


def test_films_are_no_wider_and_longer_than_a_video() -> None:
    camera = Camera()
    for _ in range(VIDEO_FRAMES + 3):
        camera(Drawing(grey(VIDEO_WIDTH + 1, 1)), {})
    assert len(camera.frames) == VIDEO_FRAMES
    assert camera.frames[0].shape[1] <= VIDEO_WIDTH


class Broken(Drawing):
    def render(self) -> np.ndarray:
        raise RuntimeError("no GL")


def test_an_environment_that_cannot_draw_is_one_clear_error() -> None:
    with pytest.raises(ConfigError, match="cannot draw itself: RuntimeError: no GL .*doctor"):
        frame_of(Broken(None), {}, {})
