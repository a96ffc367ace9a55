import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from learner.video import SHOWN, encode_gif, prediction_frames, write_videos


def pair(batch: int, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    truth = torch.zeros(batch, 8, 16, 16, channels)
    return truth, torch.full_like(truth, 0.5)


def test_frames_stack_truth_model_and_error() -> None:
    frames = prediction_frames(*pair(2, 3), context=5)
    assert frames.shape == (8, 3 * 16 + 4, 2 * 16 + 4, 3)
    inside = frames[0, 2:-2, 2:-2]
    assert (inside[:16] == 0).all()
    assert (inside[16:32] == 128).all()
    assert (inside[32:] == 191).all()


def test_the_border_tells_seen_from_imagined_frames() -> None:
    frames = prediction_frames(*pair(1, 3), context=5)
    corners = frames[:, 0, 0]
    assert (corners[:5] == corners[0]).all()
    assert (corners[5:] == corners[5]).all()
    assert (corners[4] != corners[5]).any()


def test_grey_and_stacked_images_are_shown_grey() -> None:
    for channels in (1, 4):
        assert prediction_frames(*pair(SHOWN + 3, channels), context=5).shape[2] == SHOWN * 16 + 4


def test_a_gif_has_every_frame() -> None:
    frames = np.random.default_rng(0).integers(0, 255, (8, 20, 30, 3), np.uint8)
    image = Image.open(io.BytesIO(encode_gif(frames)))
    assert image.n_frames == 8  # type: ignore[attr-defined]
    assert image.size == (30, 20)


def test_a_page_shows_every_video_newest_first(tmp_path: Path) -> None:
    write_videos(tmp_path, {"image": pair(1, 3)}, 5, 1000)
    written = write_videos(tmp_path, {"image": pair(1, 3)}, 5, 2000)
    page = (tmp_path / "index.html").read_text()
    assert page.index("image-0000002000.gif") < page.index("image-0000001000.gif")
    gif, size = written["image"]
    assert (tmp_path / "image-0000002000.gif").read_bytes() == gif
    assert Image.open(io.BytesIO(gif)).size == size
