"""Animated GIFs that say in a comment what they show."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

FRAME_MS = 100
"""Time for which each frame is shown, in milliseconds."""


def encode_gif(frames: NDArray[np.uint8], frame_ms: int = FRAME_MS, caption: str = "") -> bytes:
    """Return frames (T, height, width, 3) as an animated GIF that repeats.

    The format counts in 10 ms, and viewers slow down what is shown for less than 20 ms. The
    caption, in ASCII, is a comment that `caption_of` reads.
    """
    images = [_with_palette(Image.fromarray(frame)) for frame in frames]
    buffer = io.BytesIO()
    images[0].save(
        buffer,
        format="GIF",
        save_all=True,
        append_images=images[1:],
        duration=frame_ms,
        loop=0,
        disposal=1,
        comment=caption.encode("ascii"),
    )
    return buffer.getvalue()


def _with_palette(image: Image.Image) -> Image.Image:
    """Return an image of 256 colours at most, its own where they are few enough.

    Left to the encoder, a frame with many colours takes 600 times as long and looks no better: 20 s
    for a video, in which nothing is trained.
    """
    if image.getcolors(256) is not None:
        return image.convert("P", palette=Image.Palette.ADAPTIVE)
    return image.quantize(256, method=Image.Quantize.FASTOCTREE)


def caption_of(path: Path) -> str:
    """Return what a GIF says that it shows; nothing if it says nothing or cannot be read."""
    try:
        with Image.open(path) as image:
            return bytes(image.info.get("comment", b"")).decode("ascii", "replace")
    except OSError:
        return ""
