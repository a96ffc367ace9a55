"""Milliseconds per update and where they go, per size, modality and mode.

Prints a table and returns plain data. Every case runs in a process of its own, so that compiled
code, allocator state and peak memory do not leak from one case into the next.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

CASES = (
    ("vectors", "1m", "eager"),
    ("vectors", "1m", "compile"),
    ("pixels", "1m", "eager"),
    ("pixels", "1m", "compile"),
    ("pixels", "12m", "eager"),
    ("pixels", "12m", "compile"),
)
CUDA_CASES = tuple(
    ("pixels", size, mode)
    for size in ("1m", "12m", "50m")
    for mode in ("eager", "compile", "graph")
)


def run(
    cases: tuple[tuple[str, str, str], ...] | None = None,
    *,
    device: str = "cpu",
    batch_size: int = 16,
    batch_length: int = 64,
    repeats: int = 9,
    threads: int = 2,
) -> dict[str, Any]:
    """Measure every case and return {"cases": [...]}, medians in milliseconds."""
    chosen = cases or (CASES if device == "cpu" else CUDA_CASES)
    rows = []
    for modality, size, mode in chosen:
        arguments = [modality, size, mode, device, batch_size, batch_length, repeats, threads]
        command = [sys.executable, "-m", "benchmarks.learner", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            rows.append({"modality": modality, "size": size, "mode": mode, "error": done.stderr})
            continue
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    return {"benchmark": "learner", "cases": rows}


def table(result: dict[str, Any]) -> list[list[str]]:
    """Return header and rows of the result as text."""
    parts = ("data", "observe", "model", "imagination", "behaviour", "backward", "optimiser")
    head = ["modality", "size", "mode", "ms/update", *parts, "GFLOP/s", "peak MiB", "first s"]
    rows = [head]
    for case in result["cases"]:
        names = [case["modality"], case["size"], case["mode"]]
        if "error" in case:
            rows.append([*names, case["error"].strip().splitlines()[-1]])
            continue
        split = [f"{case['split_ms'].get(part, 0.0):.0f}" for part in parts]
        tail = [f"{case['matmul_gflops']:.0f}", f"{case['peak_mib']:.0f}", f"{case['first_s']:.1f}"]
        rows.append([*names, f"{case['update_ms']:.0f}", *split, *tail])
    return rows


def _measure(
    modality: str,
    size: str,
    mode: str,
    device: str,
    batch_size: int,
    batch_length: int,
    repeats: int,
    threads: int,
) -> dict[str, Any]:
    import numpy as np
    import torch

    from dreamer.agent import make_agent
    from dreamer.presets import agent_config
    from dreamer.spaces import BoxAction, ImageSpec, VectorSpec
    from learner.step import UpdateStep
    from learner.tuning import tune_for

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    tune_for(device)
    image = {"image": ImageSpec(shape=(64, 64, 3))}
    obs_space: Any = image if modality == "pixels" else {"vector": VectorSpec(shape=(24,))}
    actions: Any = {"action": BoxAction(low=(-1.0,) * 6, high=(1.0,) * 6)}
    agent = make_agent(agent_config("v3", size), obs_space, actions).to(device)
    if device == "cuda":
        agent.amp = torch.bfloat16
    mirror = _Mirror(agent, device)
    step = UpdateStep(
        agent,
        mirror,
        batch_size=batch_size,
        batch_length=batch_length,
        mode=mode,  # type: ignore[arg-type]
    )
    random = np.random.default_rng(0)
    nothing = np.full(batch_size, -1, np.int64)

    def update() -> None:
        step(random.random(batch_size), nothing, 0)
        if device == "cuda":
            torch.cuda.synchronize()

    begin = time.perf_counter()
    for _ in range(5 if mode == "graph" else 2):
        update()
    first = time.perf_counter() - begin
    whole = [_timed(update) for _ in range(repeats)]
    split = _split(step, repeats) if device == "cpu" else {}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
    square = torch.randn(1024, 1024, device=device)
    rate = median(_timed(lambda: square @ square) for _ in range(20))
    return {
        "modality": modality,
        "size": size,
        "mode": mode,
        "device": device,
        "threads": threads,
        "batch": [batch_size, batch_length],
        "update_ms": 1000 * median(whole),
        "update_ms_min": 1000 * min(whole),
        "split_ms": split,
        "matmul_gflops": 2 * 1024**3 / rate / 1e9,
        "peak_mib": peak,
        "first_s": first,
    }


def _split(step: Any, repeats: int) -> dict[str, float]:
    """Time the phases of one update one after the other, as `Agent.update` runs them."""
    import torch

    from learner.batch import make_batch

    agent, times = step.agent, defaultdict(list)

    def timed(name: str, work: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        result = work()
        times[name].append(1000 * (time.perf_counter() - begin))
        return result

    fine = torch.tensor(True, device=step.device)
    for _ in range(repeats):
        batch = timed("data", lambda: make_batch(step.sample(), agent))
        rollout = timed("observe", partial(agent.observe, batch))
        losses, _ = timed("model", partial(agent.model_losses, batch, rollout))
        dream = timed("imagination", partial(agent.imagine, rollout))
        more, _ = timed("behaviour", partial(agent.behaviour_losses, batch, rollout, dream))
        total = torch.stack([value.mean() for value in (losses | more).values()]).sum()
        (group,) = agent.groups()
        gradient = partial(torch.autograd.grad, total, group.params, materialize_grads=True)
        grads = timed("backward", gradient)
        timed("optimiser", partial(group.optimiser.step, list(grads), fine))
    return {name: median(values) for name, values in times.items()}


class _Mirror:
    """Random records in one long stream, laid out as the replay mirror lays them out."""

    page_steps = 64

    def __init__(self, agent: Any, device: str, rows: int = 4096) -> None:
        import torch

        from dreamer.agent import record_columns

        columns = record_columns(agent.config, agent.obs_space, agent.action_space)
        self.columns = {}
        for name, dtype, shape in columns:
            kind = getattr(torch, dtype)
            values = (
                torch.rand(rows, *shape) if kind.is_floating_point else torch.zeros(rows, *shape)
            )
            if dtype == "uint8" and name != "stoch":
                values = torch.randint(0, 256, (rows, *shape))
            self.columns[name] = values.to(kind).to(device)
        pages = rows // self.page_steps
        links = [*range(1, pages), -1]
        self.next_page = torch.tensor(links, dtype=torch.int64, device=device)
        valid = torch.full((pages,), self.page_steps, dtype=torch.int64, device=device)
        valid[-4:] = 0
        self.valid_cumsum = valid.cumsum(0)


def _timed(work: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


if __name__ == "__main__":
    words, numbers = sys.argv[1:5], [int(word) for word in sys.argv[5:]]
    sys.stdout.write(json.dumps(_measure(*words, *numbers)) + "\n")  # type: ignore[call-arg, arg-type]
