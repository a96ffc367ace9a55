"""Moving pictures of what an agent learns from: its open-loop predictions, or its views.

Each says what it shows, so that pages can tell predictions, views and films apart.
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dreamer.agent import Pictures
from learner.files import write_atomically
from learner.gif import caption_of, encode_gif

SHOWN = 6
"""Sequences side by side in one picture."""
_SEEN, _IMAGINED, _SHOWN = (60, 180, 75), (230, 80, 60), (128, 128, 128)
_GAP = 2
_PREDICTION = (
    "Top: what happened. Middle: the model, which sees the frames with a green border, the first "
    "{context} of the window and of each episode that begins in it, and imagines those with a red "
    "one under the recorded actions. Bottom: the error; grey is none."
)
_VIEWS = (
    "Top: what happened. Below it: the two views of it that the agent learns from, each shifted at "
    "random. This agent decodes nothing, so that there is no prediction to show."
)


def picture_frames(pictures: Pictures) -> NDArray[np.uint8]:
    """Stack truth and model, and the error of a prediction, into frames (T, height, width, 3).

    Sequences stand beside each other. Steps that a prediction saw have a green border, imagined
    ones a red one; where nothing is predicted all are grey.
    """
    truth, *made = (x[:SHOWN].float().cpu().clamp(0, 1) for x in (pictures.truth, *pictures.made))
    shape = truth.shape[:2]
    borders = np.full((*shape, 3), _SHOWN, np.uint8)
    rows = [truth, *made]
    if pictures.seen is not None:
        seen = pictures.seen[:SHOWN].cpu().numpy()
        borders = np.where(seen[..., None], _SEEN, _IMAGINED).astype(np.uint8)
        rows.append((made[0] - truth + 1) / 2)
    # (B, T, rows·h, w, 3): everything of a sequence below each other.
    stacked = np.concatenate([_colours(row.numpy()) for row in rows], axis=2)
    return np.stack(
        [
            np.concatenate([_framed(stacked[i, t], borders[i, t]) for i in range(shape[0])], axis=1)
            for t in range(shape[1])
        ]
    )


def write_videos(
    directory: Path, found: Mapping[str, Pictures], context: int, env_steps: int
) -> dict[str, tuple[bytes, tuple[int, int]]]:
    """Write one GIF for each image key, and an index page that shows all there are.

    Returns:
        The GIF's bytes and its (width, height), under ``open_loop/<key>`` or ``views/<key>``.
    """
    directory.mkdir(parents=True, exist_ok=True)
    written = {}
    for key, pictures in found.items():
        predicted = pictures.seen is not None
        frames = picture_frames(pictures)
        caption = _PREDICTION.format(context=context) if predicted else _VIEWS
        gif = encode_gif(frames, caption=caption)
        name = key if predicted else f"{key}_views"
        write_atomically(directory / f"{name}-{env_steps:010d}.gif", gif)
        kind = "open_loop" if predicted else "views"
        written[f"{kind}/{key}"] = (gif, (frames.shape[2], frames.shape[1]))
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


def _framed(picture: NDArray[np.uint8], colour: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return a picture (h, w, 3) inside a border."""
    height, width, _ = picture.shape
    framed = np.empty((height + 2 * _GAP, width + 2 * _GAP, 3), np.uint8)
    framed[:] = colour
    framed[_GAP:-_GAP, _GAP:-_GAP] = picture
    return framed


def _page(directory: Path) -> str:
    paths = sorted(directory.glob("*.gif"), key=lambda path: path.name, reverse=True)
    return _HTML.format(figures="\n".join(map(_figure, paths)))


def _figure(path: Path) -> str:
    name, caption = html.escape(path.name), html.escape(caption_of(path))
    return (
        f'<figure><img src="{name}" alt="{name}">'
        f"<figcaption><b>{name}</b> {caption}</figcaption></figure>"
    )


_HTML = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Pictures of the agent</title>
<style>
body {{ font: 15px sans-serif; margin: 2em; background: #fafafa; color: #222 }}
img {{ image-rendering: pixelated; min-width: 50%; max-width: 100% }}
figure {{ margin: 2em 0 }} figcaption {{ color: #666; max-width: 60em }}
</style>
<h1>Pictures of the agent</h1>
<p>The newest of each kind first; names end with the environment step.</p>
{figures}
</html>
"""
