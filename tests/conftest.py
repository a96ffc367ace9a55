"""What all tests share."""

from __future__ import annotations

import atexit
import logging
import os
import sys
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

import pytest

# Before torch is imported, and for every process of a test: the nets are so small that threads only
# wait for each other, on a busy machine many times longer than the work takes.
os.environ.setdefault("OMP_NUM_THREADS", "1")


STARTERS = {"EmbeddedServer", "replay_server", "find_binary", "Sentinel", "subprocess"} | {
    "private_ray",
    "empty_cluster",
}
"""Whoever names one of these starts a process. Tests that do so otherwise say it themselves."""
MARKED = ("integration", "learning", "faults", "slow")
"""What `make test-fast` leaves out."""
ASKED = {"git", "uname", "ldconfig", "gcc", "cc", "ld", "objdump"}
"""Programs that answer and end: about the repository, and to `platform` and `ctypes`."""


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Forget what earlier tests have started."""
    _started.clear()


@pytest.fixture(autouse=True)
def _no_process_without_a_mark(request: pytest.FixtureRequest) -> Iterator[None]:
    """Keep tests that start processes, for which a busy machine waits, out of the fast ones."""
    yield
    if not any(map(request.node.get_closest_marker, MARKED)):
        assert not _started, f"this test starts processes, mark it integration: {_started}"


_started: list[str] = []


def _note_process(event: str, args: tuple[Any, ...]) -> None:
    if event in ("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn"):
        program = os.path.basename(os.fsdecode(args[0])) if args else event
        if program not in ASKED:
            _started.append(program)


sys.addaudithook(_note_process)


def starts_processes(function: Any, seen: set[Any] | None = None) -> bool:
    """Whether a test or fixture names what starts a process, itself or in a helper of the tests."""
    seen = set() if seen is None else seen
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    if not isinstance(function, FunctionType) or function in seen:
        return False
    seen.add(function)
    names = set(_names(function.__code__))
    if names & STARTERS:
        return True
    called = (function.__globals__.get(name) for name in names)
    helpers = [one for one in called if str(getattr(one, "__module__", "")).startswith("tests.")]
    return any(starts_processes(helper, seen) for helper in helpers)


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _names(inner)


@pytest.fixture(autouse=True)
def _restored_logging() -> Iterator[None]:
    """Undo what a command did to the root logger: its handler writes to a stream of that test."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests that start processes; skip those that need a CUDA device where there is none."""
    for item in items:
        if isinstance(item, pytest.Function) and any(map(starts_processes, _functions(item))):
            item.add_marker(pytest.mark.integration)
    wanting = [item for item in items if item.get_closest_marker("cuda")]
    if not wanting:
        return
    import torch

    if not torch.cuda.is_available():
        for item in wanting:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def _functions(item: pytest.Function) -> Iterator[Any]:
    """Yield a test and the fixtures that it uses."""
    yield item.function
    for fixtures in item._fixtureinfo.name2fixturedefs.values():
        yield from (fixture.func for fixture in fixtures)


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
