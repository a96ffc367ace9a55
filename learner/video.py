"""Open-loop predictions as moving pictures: what happened, what the model imagined, the error."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from learner.files import write_atomically

SHOWN = 6
"""Sequences side by side in one picture."""
FRAME_MS = 100
"""Time for which each frame is shown, in milliseconds."""
_SEEN, _IMAGINED = (60, 180, 75), (230, 80, 60)
_GAP = 2


def prediction_frames(truth: Tensor, model: Tensor, context: int) -> NDArray[np.uint8]:
    """Stack truth, model and error into frames (T, height, width, 3).

    Args:
        truth: (B, T, h, w, c) in [0, 1].
        model: the same shape; the first ``context`` steps saw the truth, the rest is imagined.
        context: steps with a green border; imagined steps have a red one.
    """
    assert truth.shape == model.shape, (truth.shape, model.shape)
    truth, model = truth[:SHOWN].float().cpu(), model[:SHOWN].float().cpu().clamp(0, 1)
    error = (model - truth + 1) / 2
    rows = [_colours(x.numpy()) for x in (truth, model, error)]
    return np.stack([_frame([r[:, t] for r in rows], t < context) for t in range(truth.shape[1])])


def encode_gif(frames: NDArray[np.uint8], frame_ms: int = FRAME_MS) -> bytes:
    """Return frames (T, height, width, 3) as an animated GIF that repeats.

    The format counts in 10 ms, and viewers slow down what is shown for less than 20 ms.
    """
    images = [Image.fromarray(frame) for frame in frames]
    buffer = io.BytesIO()
    images[0].save(
        buffer,
        format="GIF",
        save_all=True,
        append_images=images[1:],
        duration=frame_ms,
        loop=0,
        disposal=1,
    )
    return buffer.getvalue()


def write_videos(
    directory: Path, predictions: Mapping[str, tuple[Tensor, Tensor]], context: int, env_steps: int
) -> dict[str, tuple[bytes, tuple[int, int]]]:
    """Write one GIF for each image key, and an index page that shows them all.

    Returns:
        For each key the GIF's bytes and its (width, height).
    """
    directory.mkdir(parents=True, exist_ok=True)
    written = {}
    for key, (truth, model) in predictions.items():
        frames = prediction_frames(truth, model, context)
        gif = encode_gif(frames)
        write_atomically(directory / f"{key}-{env_steps:010d}.gif", gif)
        written[key] = (gif, (frames.shape[2], frames.shape[1]))
    write_atomically(directory / "index.html", _page(directory).encode())
    return written


def _colours(images: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return (B, T, h, w, 3): grey for one channel, the last three of more (a stack's newest)."""
    channels = images.shape[-1]
    if channels == 3:
        shown = images
    else:
        shown = np.repeat(images[..., -1:], 3, axis=-1)
    return (shown * 255).round().astype(np.uint8)


def _frame(rows: list[NDArray[np.uint8]], seen: bool) -> NDArray[np.uint8]:
    """Return one frame: rows below each other, sequences beside each other, inside a border."""
    bands = [np.concatenate(list(row), axis=1) for row in rows]
    picture = np.concatenate(bands, axis=0)
    height, width, _ = picture.shape
    framed = np.empty((height + 2 * _GAP, width + 2 * _GAP, 3), np.uint8)
    framed[:] = _SEEN if seen else _IMAGINED
    framed[_GAP:-_GAP, _GAP:-_GAP] = picture
    return framed


def _page(directory: Path) -> str:
    names = sorted((path.name for path in directory.glob("*.gif")), reverse=True)
    figures = "\n".join(
        f'<figure><img src="{name}" alt="{name}"><figcaption>{name}</figcaption></figure>'
        for name in names
    )
    return _HTML.format(figures=figures)


_HTML = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Open-loop predictions</title>
<style>
body {{ font: 15px sans-serif; margin: 2em; background: #fafafa; color: #222 }}
img {{ image-rendering: pixelated; min-width: 50%; max-width: 100% }}
figure {{ margin: 2em 0 }} figcaption {{ color: #666 }}
</style>
<h1>Open-loop predictions</h1>
<p>Top row: what happened. Middle: the model, which sees the frames with a green border and imagines
those with a red one under the recorded actions. Bottom: the error; grey is none.
File names end with the environment step.</p>
{figures}
</html>
"""
