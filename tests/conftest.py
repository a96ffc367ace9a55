"""What all tests share."""

from __future__ import annotations

import atexit
import logging
import os
import sys
from collections.abc import Iterator

import pytest

# Before torch is imported, and for every process of a test: the nets are so small that threads only
# wait for each other, on a busy machine many times longer than the work takes.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def _restored_logging() -> Iterator[None]:
    """Undo what a command did to the root logger: its handler writes to a stream of that test."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests that need a CUDA device where there is none."""
    wanting = [item for item in items if item.get_closest_marker("cuda")]
    if not wanting:
        return
    import torch

    if not torch.cuda.is_available():
        for item in wanting:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_sessionfinish(exitstatus: int) -> None:
    """Remember the outcome for `_leave`."""
    _outcome.append(int(exitstatus))


_outcome: list[int] = []


@atexit.register
def _leave() -> None:
    """End without taking native libraries down. Registered first, so it runs after all others.

    One of four runs of everything ended with signal 11 after its last line, when all was said. The
    process of the tests has Mesa, SDL, MuJoCo and gRPC in it, as none of the product has; which of
    them it was, and whether it was one of them, is not known.
    """
    if _outcome:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_outcome[-1])
