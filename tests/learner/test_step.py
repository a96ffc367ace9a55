import copy
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dreamer.agent import Agent, make_agent, record_columns
from dreamer.config import AgentConfig, OptimConfig, V3Config
from dreamer.presets import AGENTS, agent_config
from dreamer.spaces import ActionSpace, BoxAction, DiscreteAction, ImageSpec, ObsSpace, VectorSpec
from learner.batch import make_batch
from learner.step import COMPILE_PAYS, WARM_UP, Mode, UpdateStep, resolve_mode
from replay_service import Column, Schema
from replay_service.storage import DeviceStorage, window_rows

ROOT = Path(__file__).parents[2]
OBS: ObsSpace = {"image": ImageSpec(shape=(16, 16, 1)), "vector": VectorSpec(shape=(3,))}
ACTIONS: ActionSpace = {
    "action.turn": DiscreteAction(classes=3),
    "action.push": BoxAction(low=(-1.0,), high=(1.0,)),
}
CONFIG = replace(agent_config("v3", "debug"), optim=OptimConfig(lr=1e-3, warmup=0))
B, T, PAGE, PAGES = 3, 4, 4, 6
ANY = np.full(B, -1)


@dataclass
class Records:
    """A mirror of two streams: pages 0 → 2 → 3 → 5 and 1 → 4, full of random records."""

    columns: dict[str, Tensor]
    valid_cumsum: Tensor
    next_page: Tensor
    page_steps: int = PAGE


def make_records(device: str = "cpu", config: AgentConfig = CONFIG, obs: ObsSpace = OBS) -> Records:
    columns = [Column(*column) for column in record_columns(config, obs, ACTIONS)]
    storage = DeviceStorage(
        Schema(tuple(columns)),
        rows=PAGE * PAGES,
        pages=PAGES,
        placement="ram" if device == "cpu" else "cuda",
        device=device,
        directory=None,
    )
    rng, rows = np.random.default_rng(0), PAGE * PAGES
    shape = obs["image"].shape if "image" in obs else ()
    values: dict[str, np.ndarray] = {
        "image": rng.integers(0, 256, (rows, *shape), np.uint8),
        "vector": rng.normal(size=(rows, 3)).astype(np.float32),
        "action.turn": rng.integers(0, 3, rows, np.int32),
        "action.push": rng.normal(size=(rows, 1)).astype(np.float32),
        "reward": np.arange(rows, dtype=np.float32),
        **{name: np.zeros(rows, bool) for name in ("is_first", "is_last", "is_terminal")},
    }
    values["is_first"][[0, 4, 12]] = values["is_last"][11] = True
    if config.context:
        values["deter"] = rng.uniform(-1, 1, (rows, 16)).astype(np.float16)
        values["stoch"] = rng.integers(0, 4, (rows, 4), np.uint8)
    storage.write(0, {column.name: values[column.name] for column in columns})
    # A window has 1 + T records: the first stream of 16 has 12 starts, the second of 8 has 4.
    storage.host_cumsum[:] = np.cumsum([4, 4, 4, 4, 0, 0])
    storage.host_next_page[:] = [2, 4, 3, 5, -1, -1]
    storage.publish_index()
    return Records(storage.columns, storage.valid_cumsum, storage.next_page)


def make_test_agent(
    device: str = "cpu", config: AgentConfig = CONFIG, obs: ObsSpace = OBS
) -> Agent:
    torch.manual_seed(0)
    return make_agent(config, obs, ACTIONS).to(device)


def make_step(agent: Agent, records: Records, mode: Mode = "auto") -> UpdateStep:
    return UpdateStep(agent, records, batch_size=B, batch_length=T, mode=mode)


def draws(update: int) -> np.ndarray:
    return np.random.default_rng(update).uniform(size=B)


def rows_of(uniforms: np.ndarray, explicit: np.ndarray, records: Records, length: int) -> Tensor:
    return window_rows(
        torch.from_numpy(uniforms),
        torch.from_numpy(explicit),
        records.valid_cumsum,
        records.next_page,
        PAGE,
        length,
    )


def test_windows_follow_the_pages_of_one_stream() -> None:
    records = make_records()
    step = make_step(make_test_agent(), records)
    step(np.array([0.0, 0.26, 0.99]), np.array([-1, -1, 3]), seed=0)
    # Starts: row 0 of page 0, the first of page 1, and row 3 which replaces the last draw.
    windows = step.sample()["reward"].int().tolist()
    assert windows == [[0, 1, 2, 3, 8], [4, 5, 6, 7, 16], [3, 8, 9, 10, 11]]


def test_a_step_is_the_agents_update_on_the_sampled_windows() -> None:
    records, agent = make_records(), make_test_agent()
    twin = copy.deepcopy(agent)
    step = make_step(agent, records)
    for update in range(3):
        rows = rows_of(draws(update), ANY, records, 1 + T)
        window = {name: column[rows] for name, column in records.columns.items()}
        step(draws(update), ANY, seed=update)
        torch.manual_seed(update)
        twin.update(make_batch(window, twin))
    for (name, ours), theirs in zip(
        agent.state_dict().items(), twin.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), name


def test_latents_are_written_back_to_the_trained_rows_only() -> None:
    records, agent = make_records(), make_test_agent()
    twin = copy.deepcopy(agent)
    before = {name: column.clone() for name, column in records.columns.items()}
    uniforms = np.array([0.0, 0.4, 0.99])
    rows = rows_of(uniforms, ANY, records, 1 + T)
    assert len(rows.unique()) == rows.numel(), "the windows of this test do not overlap"
    make_step(agent, records)(uniforms, ANY, seed=1)
    torch.manual_seed(1)
    _, latents = twin.update(make_batch({k: v[rows] for k, v in before.items()}, twin))
    for name, column in records.columns.items():
        want = before[name].clone()
        if name in latents:
            want[rows[:, 1:].flatten()] = latents[name].flatten(0, 1)
            assert not torch.equal(want, before[name])
        assert torch.equal(column, want), name


def test_an_agent_without_stored_latents_writes_nothing_back() -> None:
    config = replace(CONFIG, context=0)
    records, agent = make_records(config=config), make_test_agent(config=config)
    before = {name: column.clone() for name, column in records.columns.items()}
    step = make_step(agent, records)
    step(draws(0), ANY, seed=0)
    step.settle()
    assert step.sample()["reward"].shape == (B, T)
    assert all(torch.equal(column, before[name]) for name, column in records.columns.items())


def test_metrics_are_means_since_the_last_call() -> None:
    records, agent = make_records(), make_test_agent()
    twin = copy.deepcopy(agent)
    step = make_step(agent, records)
    assert step.take_metrics() == {}
    for count in (3, 1):
        seen: list[dict[str, Tensor]] = []
        for update in range(count):
            rows = rows_of(draws(update), ANY, records, 1 + T)
            window = {name: column[rows] for name, column in records.columns.items()}
            step(draws(update), ANY, seed=update)
            torch.manual_seed(update)
            seen.append(twin.update(make_batch(window, twin))[0])
        taken = step.take_metrics()
        assert set(taken) == set(seen[0]) - {"finite"}
        for name, value in taken.items():
            mean = sum(float(metrics[name]) for metrics in seen) / count
            assert value == pytest.approx(mean, rel=1e-4, abs=1e-12), name
    assert step.take_metrics() == {}


def test_an_update_that_is_not_finite_is_skipped_counted_and_kept() -> None:
    records, agent = make_records(), make_test_agent()
    step = make_step(agent, records)
    step(draws(0), ANY, seed=0)
    good, rows = copy.deepcopy(agent.state_dict()), rows_of(draws(1), ANY, records, 1 + T)
    poisoned = records.columns["reward"][rows[0, 2]].clone()
    records.columns["reward"][rows[0, 2]] = torch.nan
    before = {name: column.clone() for name, column in records.columns.items()}
    for _ in range(2):
        step(draws(1), ANY, seed=1)
    assert all(math.isfinite(value) for value in step.take_metrics().values())
    assert step.take_metrics() == {}
    assert step.take_skipped() == (2, 2)
    after = agent.state_dict()
    fixed = [name for name in good if "slow" not in name]  # slow copies follow what there is
    assert all(torch.equal(good[name], after[name]) for name in fixed)
    assert torch.equal(before["deter"], records.columns["deter"])
    window = step.skipped_window()
    assert torch.isnan(window["reward"][0, 2]) and window["reward"].shape == rows.shape
    records.columns["reward"][rows[0, 2]] = torch.nan
    step(draws(1), ANY, seed=1)
    assert step.take_skipped() == (1, 3)  # the row of bad luck goes on
    records.columns["reward"][rows[0, 2]] = poisoned
    step(draws(1), ANY, seed=1)
    assert step.take_skipped() == (0, 3) and step.take_skipped() == (0, 0)
    assert step.take_metrics()


def test_equal_seeds_and_draws_give_equal_steps_whatever_happened_outside() -> None:
    states = []
    for noise in (1, 2):
        agent = make_test_agent()
        step = make_step(agent, make_records())
        for update in range(2):
            torch.manual_seed(noise)
            step(draws(update), ANY, seed=update)
        states.append(agent.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_the_mode_follows_the_device_and_the_work_ahead() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert resolve_mode("auto", cpu, COMPILE_PAYS - 1) == resolve_mode("auto", cpu) == "eager"
    assert resolve_mode("auto", cuda) == "graph"
    assert resolve_mode("compile", cpu) == resolve_mode("compile", cuda) == "compile"
    assert resolve_mode("eager", cuda) == "eager"


def test_without_the_headers_of_python_nothing_is_compiled(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    assert resolve_mode("auto", torch.device("cpu"), COMPILE_PAYS) == "eager"
    assert "python3-dev" in caplog.text


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
def test_a_long_run_on_a_cpu_compiles() -> None:
    assert resolve_mode("auto", torch.device("cpu"), COMPILE_PAYS) == "compile"


BROKEN = """#!/bin/sh
case " $* " in *" --version "*) exec g++ --version ;; esac
echo "x.cpp:1:1: error: this compiler is broken" >&2
exit 1
"""
LONG_RUN = """
import logging, torch
logging.basicConfig()
from learner.step import COMPILE_PAYS, resolve_mode
print(resolve_mode("auto", torch.device("cpu"), COMPILE_PAYS))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("/nowhere/c++", "there is no C++ compiler '/nowhere/c++'"),
        ("/bin/false", "No working C++ compiler found"),
        ("BROKEN", "error: this compiler is broken"),
    ],
)
def test_a_compiler_that_does_not_work_is_one_line_and_the_run_is_eager(
    compiler: str, reason: str, tmp_path: Path
) -> None:
    broken = tmp_path / "c++"
    broken.write_text(BROKEN)
    broken.chmod(0o700)
    # Torch reads the name of the compiler once per process.
    done = subprocess.run(
        [sys.executable, "-c", LONG_RUN],
        cwd=ROOT,
        env={**os.environ, "CXX": compiler.replace("BROKEN", str(broken))},
        capture_output=True,
        text=True,
        timeout=120,
    )
    (said,) = done.stderr.splitlines()
    assert done.stdout == "eager\n" and done.returncode == 0, said
    assert "updates_not_compiled mode=eager reason=" in said and reason in said
    assert len(said) < 500


def test_a_graph_without_cuda_is_refused() -> None:
    with pytest.raises(ValueError, match="'graph' needs a CUDA device, got 'cpu'"):
        make_step(make_test_agent(), make_records(), mode="graph")


Run = tuple[list[dict[str, float]], dict[str, Tensor], dict[str, Tensor]]


def run(
    mode: Mode, device: str, updates: int, config: AgentConfig = CONFIG, obs: ObsSpace = OBS
) -> Run:
    """Return the metrics of every update, the agent's state and the records at the end."""
    agent, records = make_test_agent(device, config, obs), make_records(device, config, obs)
    step, metrics = make_step(agent, records, mode), []
    for update in range(updates):
        step(draws(update), ANY, seed=update)
        metrics.append(step.take_metrics())
    return metrics, agent.state_dict(), records.columns


def assert_same_run(left: Run, right: Run, rtol: float) -> None:
    for ours, theirs in zip(left[0], right[0], strict=True):
        assert ours == pytest.approx(theirs, rel=rtol, abs=1e-5)
    for name, value in left[1].items():
        # A gradient of rounding noise alone is divided by its own size: no two runs share it.
        if not name.startswith("optimiser."):
            torch.testing.assert_close(value, right[1][name], rtol=rtol, atol=1e-5, msg=name)
    for name, column in left[2].items():
        torch.testing.assert_close(column, right[2][name], rtol=1e-2, atol=1e-2, msg=name)


@pytest.fixture
def same_random_numbers() -> Iterator[None]:
    """Let compiled code draw the random numbers of eager code."""
    from torch._inductor import config

    with config.patch(fallback_random=True):
        yield
    torch._dynamo.reset()


def shallow(config: V3Config) -> V3Config:
    """Return a network of few layers and a short imagination: fewer kernels to compile."""
    return replace(
        config,
        rssm=replace(config.rssm, prior_layers=1),
        encoder=replace(config.encoder, layers=1),
        decoder=replace(config.decoder, layers=1),
        critic=replace(config.critic, layers=1),
        actor=replace(config.actor, layers=1),
        behaviour=replace(config.behaviour, imag_horizon=3),
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
# Torch's compiler warns about its own code.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.usefixtures("same_random_numbers")
def test_compiled_and_eager_steps_give_the_same_losses_and_parameters() -> None:
    config = shallow(CONFIG)
    obs: ObsSpace = {"vector": OBS["vector"]}
    modes: tuple[Mode, ...] = ("compile", "eager")
    runs = [run(mode, "cpu", 3, config, obs) for mode in modes]
    assert_same_run(*runs, rtol=2e-3)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", AGENTS)
def test_a_captured_graph_gives_the_same_losses_and_parameters(name: str) -> None:
    updates, config = WARM_UP + 3, agent_config(name, "debug")
    obs = OBS | {"image": ImageSpec(shape=(64, 64, 3))}
    runs = [run(mode, "cuda", updates, config, obs) for mode in ("graph", "compile")]
    assert_same_run(*runs, rtol=2e-3)
