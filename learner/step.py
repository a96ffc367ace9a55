"""One training step: sample from the mirror, update, write latents back, add up metrics.

The whole step reads and writes fixed tensors only, so on CUDA it is one captured graph: the host
sets 2·B numbers and replays it.
"""

from __future__ import annotations

import logging
import os
import shutil
import sysconfig
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dreamer.agent import Agent
from learner.batch import make_batch
from replay_service import storage

log = logging.getLogger(__name__)

Mode = Literal["auto", "eager", "compile", "graph"]


class Skipped(NamedTuple):
    """What happened to the updates since the last time that somebody asked."""

    updates: int
    """Updates that were skipped because a loss or a gradient was not finite."""
    in_a_row: int
    """Length of the longest run of them, earlier ones that it continues included."""


# Updates that run uncaptured before the capture: they compile, choose algorithms and allocate.
WARM_UP = 3
# Updates from which compiling pays on a CPU: it takes 60 to 120 s and saves two fifths of 0.2 to
# 0.7 s per update from vectors.
COMPILE_PAYS = 1_500


class MirrorTensors(Protocol):
    """What a step needs from the replay mirror."""

    columns: dict[str, Tensor]
    valid_cumsum: Tensor
    next_page: Tensor
    page_steps: int


class UpdateStep:
    """Callable that trains on one batch.

    1. Never synchronises with the host on the device placement; metrics wait on the device.
    2. A pure function of (agent, mirror, uniforms, explicit starts, seed): no hidden state.
    3. Writes latents back before it returns control of the mirror (`settle`).
    4. An update that is not finite leaves the agent and the mirror as they were; it is counted on
       the device, and its rows are kept for `skipped_window`.
    """

    def __init__(
        self,
        agent: Agent,
        mirror: MirrorTensors,
        *,
        batch_size: int,
        batch_length: int,
        mode: Mode = "auto",
        updates: int = 0,
    ) -> None:
        self.agent, self.mirror = agent, mirror
        self.window = batch_length + agent.config.context
        self.device = next(agent.parameters()).device
        self.mode = resolve_mode(mode, self.device, updates)
        if self.mode in ("compile", "graph"):
            # Nobody asked for a compiler that turns out not to work: what it refuses runs eagerly.
            torch._dynamo.config.suppress_errors = mode == "auto"
            agent.compile_parts()
        where = mirror.valid_cumsum.device
        self._uniforms = torch.zeros(batch_size, dtype=torch.float64, device=where)
        self._explicit = torch.full((batch_size,), -1, dtype=torch.int64, device=where)
        self._rows = torch.zeros(batch_size, self.window, dtype=torch.int64, device=where)
        self._staged: dict[str, Tensor] | None = None
        self._latents: dict[str, Tensor] = {}
        self._captured: dict[str, Tensor] = {}
        self._names: list[str] = []
        self._sums: Tensor | None = None
        self._calls, self._losses_new = 0, False
        # Updates that counted, that were skipped, skipped in a row now, and at most in a row.
        self._tally = torch.zeros(4, device=self.device)
        # The rows where the agent can read them: a captured graph cannot reach the host's memory.
        self._own_rows = self._rows.to(self.device)
        self._bad_rows = torch.zeros_like(self._own_rows)
        self._graph: Any = None

    @property
    def compiling(self) -> bool:
        """Whether the next update is one that compiles, which takes a minute or two on a CPU."""
        return self._calls < {"eager": 0, "compile": 1}.get(self.mode, WARM_UP + 1)

    @property
    def remote(self) -> bool:
        """Whether the mirror lives on another device than the agent."""
        return self.mirror.valid_cumsum.device.type != self.device.type

    def __call__(
        self, uniforms: NDArray[np.float64], explicit: NDArray[np.int64], seed: int
    ) -> None:
        """Train on one batch.

        Args:
            uniforms: (B,) in [0, 1): one uniform draw over all valid starts for each window.
            explicit: (B,) row numbers that replace the draw where they are >= 0.
            seed: of all sampling inside the update.
        """
        self._uniforms.copy_(torch.from_numpy(uniforms), non_blocking=True)
        self._explicit.copy_(torch.from_numpy(explicit), non_blocking=True)
        torch.manual_seed(seed)
        if self.remote:
            self._stage()
        if self.mode != "graph" or self._calls < WARM_UP:
            self._run()
        else:
            if self._graph is None:
                self._capture()
            self._graph.replay()
            self._latents = self._captured
        self._calls += 1
        self._losses_new = True

    def settle(self) -> None:
        """Finish the write-back of a mirror on another device; call before the mirror changes."""
        if self.remote and self._latents:
            storage.write_back(
                self.mirror.columns,
                self._rows[:, self.agent.config.context :],
                {key: value.to(self._rows.device) for key, value in self._latents.items()},
            )
            self._latents = {}

    def take_metrics(self) -> dict[str, float]:
        """Return the means over the updates that counted since the last call, and start over.

        One transfer from the device; {} where no update counted.
        """
        if self._sums is None:
            return {}
        *sums, count = torch.cat([self._sums, self._tally[:1]]).tolist()
        self._sums.zero_()
        self._tally[0] = 0.0
        if not count:
            return {}
        return {name: total / count for name, total in zip(self._names, sums, strict=True)}

    def take_skipped(self) -> Skipped:
        """Return how many updates were skipped since the last call, and start over."""
        _, count, _, longest = self._tally.tolist()
        self._tally[1] = 0.0
        self._tally[3] = self._tally[2]
        return Skipped(int(count), int(longest))

    def skipped_window(self) -> dict[str, Tensor]:
        """Return the windows of the last update that was skipped, {column: (B, C+T, …)}.

        They are read from the mirror now, so what was evicted since is replaced by newer records.
        """
        rows = self._bad_rows.to(self._rows.device)
        return storage.gather(self.mirror.columns, rows)

    def take_losses(self) -> tuple[NDArray[np.int64], NDArray[np.float32]] | None:
        """Return the rows (B, T) of the last update and the model's loss of each step, once.

        Waits for the device. None if there was no update since the last call.
        """
        if not self._losses_new:
            return None
        self._losses_new = False
        assert self.agent.step_loss is not None
        rows = self._rows[:, self.agent.config.context :]
        losses = self.agent.step_loss.float().reshape(-1, *rows.shape).mean(0)
        return rows.cpu().numpy(), losses.cpu().numpy()

    def sample(self) -> dict[str, Tensor]:
        """Gather the windows that the current draws select, {column: (B, C+T, …)}."""
        mirror = self.mirror
        rows = storage.window_rows(
            self._uniforms,
            self._explicit,
            mirror.valid_cumsum,
            mirror.next_page,
            mirror.page_steps,
            self.window,
        )
        self._rows.copy_(rows)
        return storage.gather(mirror.columns, self._rows)

    def _stage(self) -> None:
        window = self.sample()
        if self._staged is None:
            self._staged = {
                key: torch.empty_like(value, device=self.device) for key, value in window.items()
            }
        for key, value in window.items():
            self._staged[key].copy_(value, non_blocking=True)
        self._own_rows.copy_(self._rows, non_blocking=True)

    def _run(self) -> None:
        window = self._staged if self._staged is not None else self.sample()
        metrics, latents = self.agent.update(make_batch(window, self.agent))
        fine = metrics.pop("finite")
        context = self.agent.config.context
        latents = {k: torch.where(fine, x, window[k][:, context:]) for k, x in latents.items()}
        self._note(fine, metrics)
        if self.remote:
            self._latents = latents
        elif latents:
            storage.write_back(self.mirror.columns, self._rows[:, context:], latents)

    def _note(self, fine: Tensor, metrics: dict[str, Tensor]) -> None:
        if self._sums is None:
            self._names = list(metrics)
            self._sums = torch.zeros(len(metrics), device=self.device)
        values = torch.stack([metrics[name].float() for name in self._names])
        self._sums += torch.where(fine, values, 0.0)
        good, skipped, in_a_row, longest = self._tally.unbind()
        in_a_row = torch.where(fine, 0.0, in_a_row + 1.0)
        longest = torch.maximum(longest, in_a_row)
        self._tally.copy_(torch.stack([good + fine, skipped + ~fine, in_a_row, longest]))
        self._bad_rows.copy_(torch.where(fine, self._bad_rows, self._own_rows))

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        # The thread that publishes weights uses the device meanwhile; by default whatever another
        # thread does there that a capture cannot hold would end the capture.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._run()
        self._captured = self._latents
        self._graph = graph


def resolve_mode(mode: Mode, device: torch.device, updates: int = 0) -> Mode:
    """Choose how to run, unless asked otherwise.

    On CUDA a captured graph; on the CPU compiled where so many updates are planned that the minute
    or two of compiling pays and the compiler's parts are there, else eager.

    Raises:
        ValueError: a graph was asked for without CUDA.
    """
    check_mode(mode, device)
    if mode != "auto":
        return mode
    if device.type == "cuda":
        return "graph"
    return "compile" if updates >= COMPILE_PAYS and can_compile() else "eager"


def check_mode(mode: Mode, device: torch.device) -> None:
    """Raise ValueError if a graph is asked for without CUDA."""
    if mode == "graph" and device.type != "cuda":
        raise ValueError(
            f"learner.mode 'graph' needs a CUDA device, got {device.type!r}; "
            "use 'eager' or 'compile'"
        )


def can_compile() -> bool:
    """Whether torch.compile works on this machine's CPU; logs why if not, in one line.

    A C++ compiler and Python's headers must be there, and one trivial function must compile: with a
    compiler that does not work every part of the agent would fail, each with pages of warnings.
    """
    name = os.environ.get("CXX", "g++")
    headers = Path(sysconfig.get_path("include"), "Python.h")
    if shutil.which(name) is None:
        reason = f"there is no C++ compiler {name!r}"
    elif not headers.exists():
        reason = f"there is no {headers}, Debian's python3-dev"
    else:
        reason = _trial()
    if reason:
        log.warning("updates_not_compiled mode=eager reason=%s", reason)
    return not reason


def _trial() -> str:
    """Compile one function that no cache has; return why it failed, empty if it did not."""
    number = int.from_bytes(os.urandom(4))
    try:
        torch.compile(lambda x: x + number)(torch.zeros(8))
    # Whatever the compiler, its caches or torch raise means the same: go on without.
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        telling = [line for line in lines if "error:" in line] or lines
        return f"{type(error).__name__}: {' '.join(telling[:1])[:300]}"
    return ""
