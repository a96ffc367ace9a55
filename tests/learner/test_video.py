import io
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageSequence

from dreamer.agent import Pictures
from learner.gif import caption_of, encode_gif
from learner.video import SHOWN, picture_frames, write_videos


def prediction(batch: int, channels: int, context: int = 5) -> Pictures:
    truth = torch.zeros(batch, 8, 16, 16, channels)
    seen = (torch.arange(8) < context).expand(batch, 8)
    return Pictures(truth, (torch.full_like(truth, 0.5),), seen)


def views() -> Pictures:
    truth = torch.zeros(2, 8, 16, 16, 3)
    return Pictures(truth, (truth + 0.25, truth + 0.75), None)


def test_frames_stack_truth_model_and_error_of_each_sequence() -> None:
    frames = picture_frames(prediction(2, 3))
    assert frames.shape == (8, 3 * 16 + 4, 2 * (16 + 4), 3)
    for left in (2, 22):
        inside = frames[0, 2:-2, left : left + 16]
        assert (inside[:16] == 0).all()
        assert (inside[16:32] == 128).all()
        assert (inside[32:] == 191).all()


def test_the_border_of_each_sequence_tells_what_it_saw_from_what_is_imagined() -> None:
    pictures = prediction(2, 3)
    assert pictures.seen is not None
    seen = pictures.seen.clone()
    seen[1, 6] = True  # another episode begins there
    corners = picture_frames(pictures._replace(seen=seen))[:, 0, [0, 20]]
    green = (corners[..., 1] > corners[..., 0]).T
    assert np.array_equal(green, seen.numpy())


def test_views_stand_below_what_happened_without_error_and_colour() -> None:
    frames = picture_frames(views())
    assert frames.shape == (8, 3 * 16 + 4, 2 * (16 + 4), 3)
    assert frames[0, [2, 18, 34], 2, 0].tolist() == [0, 64, 191]
    assert (frames[:, 0] == 128).all()


def test_grey_and_stacked_images_are_shown_grey() -> None:
    for channels in (1, 4):
        assert picture_frames(prediction(SHOWN + 3, channels)).shape[2] == SHOWN * (16 + 4)


def test_a_gif_has_every_frame_and_says_what_it_shows(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (8, 20, 30, 3), np.uint8)
    for caption in ("", "What it shows: <everything>. " * 20):
        path = tmp_path / "a.gif"
        path.write_bytes(encode_gif(frames, caption=caption))
        with Image.open(path) as image:
            assert image.n_frames == 8  # type: ignore[attr-defined]
            assert image.size == (30, 20)
        assert caption_of(path) == caption
    (tmp_path / "broken.gif").write_bytes(b"GIF89a")
    assert caption_of(tmp_path / "broken.gif") == ""


def test_few_colours_are_kept_and_many_are_close() -> None:
    few = np.arange(4 * 4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 4, 3)
    smooth = np.linspace(0, 255, 64 * 64 * 3).reshape(1, 64, 64, 3).astype(np.uint8)
    many = np.random.default_rng(0).normal(smooth, 8).clip(0, 255).astype(np.uint8)
    for frames, most in ((few, 0), (many, 6)):
        with Image.open(io.BytesIO(encode_gif(frames))) as gif:
            shown = [np.asarray(f.convert("RGB")).astype(int) for f in ImageSequence.Iterator(gif)]
        assert np.abs(np.stack(shown) - frames).mean() <= most


class Captions(HTMLParser):
    """Notes the text below every picture of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, str] = {}
        self.name = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.name = dict(attrs).get("src") or self.name

    def handle_data(self, data: str) -> None:
        self.found[self.name] = self.found.get(self.name, "") + data


def captions(page: Path) -> dict[str, str]:
    parser = Captions()
    parser.feed(page.read_text())
    return parser.found


def test_a_page_shows_every_video_newest_first(tmp_path: Path) -> None:
    write_videos(tmp_path, {"image": prediction(1, 3)}, 5, 1000)
    written = write_videos(tmp_path, {"image": prediction(1, 3)}, 5, 2000)
    names = [name for name in captions(tmp_path / "index.html") if name]
    assert names == ["image-0000002000.gif", "image-0000001000.gif"]
    gif, size = written["open_loop/image"]
    path = tmp_path / "image-0000002000.gif"
    assert path.read_bytes() == gif
    with Image.open(path) as image:
        assert image.size == size


def test_the_page_calls_views_views_and_films_films(tmp_path: Path) -> None:
    frames = np.zeros((2, 8, 8, 3), np.uint8)
    (tmp_path / "eval-0000000005.gif").write_bytes(encode_gif(frames, caption="Evaluation: <it>"))
    assert [*write_videos(tmp_path, {"image": views()}, 5, 1000)] == ["views/image"]
    write_videos(tmp_path, {"image": prediction(1, 3)}, 4, 2000)
    found = captions(tmp_path / "index.html")
    below = found["image_views-0000001000.gif"]
    assert "two views" in below and "imagine" not in below and "green" not in below
    assert "the first 4 of the window" in found["image-0000002000.gif"]
    assert "Evaluation: <it>" in found["eval-0000000005.gif"]
    assert "imagine" not in found[""]
