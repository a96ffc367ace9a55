"""Batches of updates that were skipped, kept so that somebody can look at them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

log = logging.getLogger(__name__)

KEPT = 3
"""Batches that stay on the disk; older ones make room."""


def save_batch(directory: Path, update: int, window: Mapping[str, Tensor]) -> Path | None:
    """Write ``directory/<update>.npz`` with a column per array, and return its path.

    Blocks while the disk writes. A disk that refuses costs the batch, not the run: that is logged,
    and None returned.
    """
    path = directory / f"{update:09d}.npz"
    try:
        directory.mkdir(exist_ok=True)
        columns: dict[str, Any] = {name: x.cpu().numpy() for name, x in window.items()}
        np.savez_compressed(path, **columns)
        for old in sorted(directory.glob("*.npz"))[:-KEPT]:
            old.unlink()
    except OSError as error:
        log.warning("skipped_batch_not_saved path=%s error=%s", path, error)
        return None
    return path
