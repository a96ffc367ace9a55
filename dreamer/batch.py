"""What one update reads."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from dreamer.rssm import State


class Batch(NamedTuple):
    """B windows of T steps, with the previous action already aligned (``learner/batch.py``).

    At index t: ``obs``, ``reward`` and the flags are what the environment emitted, and
    ``prev_action`` is the flat action that led there, (B, T, A). ``initial`` is the stored latent
    of the record before the window, or zeros.
    """

    obs: dict[str, Tensor]
    prev_action: Tensor
    reward: Tensor
    is_first: Tensor
    is_last: Tensor
    is_terminal: Tensor
    initial: State
