"""The agent in ONNX acts as the policy does, and needs neither this package nor torch."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from actors.envs import EnvConfig, env_spaces, make_env
from deploy.cli import main
from deploy.config import load_config
from deploy.evaluate import policy_of, require_checkpoint
from deploy.presets import preset
from dreamer.export import DESCRIPTION
from dreamer.onnx import Noise, OnnxError, export_onnx
from dreamer.policy import Policy
from dreamer.presets import agent_config, sized
from tests.deploy.untrained import sampled_episode, save

pytestmark = pytest.mark.integration
EXAMPLE = Path(__file__).parents[2] / "examples" / "run_onnx.py"
ALONE = """
import runpy, sys
OURS = {"dreamer", "replay_service", "actors", "learner", "deploy", "torch"}
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
assert not OURS & {name.partition(".")[0] for name in sys.modules}
"""


def numbers(seed: int) -> Callable[[str, tuple[int, ...]], torch.Tensor]:
    """Return a source of random numbers as the example has them."""
    rng = np.random.default_rng(seed)
    draw = {"uniform": rng.random, "normal": rng.standard_normal}
    return lambda kind, shape: torch.from_numpy(draw[kind](shape, np.float32))


def observed(column: dict[str, Any], rng: np.random.Generator) -> np.ndarray:
    shape = (2, *column["shape"])
    if column["dtype"] == "uint8":
        return rng.integers(0, 255, shape, np.uint8)
    return rng.normal(size=shape).astype(column["dtype"])


def agent(name: str, env: str, **choices: Any) -> tuple[Policy, tuple[Any, Any]]:
    *spaces, _ = env_spaces(env, EnvConfig(**choices))
    torch.manual_seed(1)
    policy = Policy(sized(agent_config(name, "debug"), "debug"), *spaces, seed=3)
    return policy, (spaces[0], spaces[1])


@pytest.mark.parametrize(
    ("name", "env", "mode"),
    [
        ("v3", "CartPole-v1", "sample"),
        ("v3", "tests.deploy.untrained:Pixels", "sample"),
        ("v1", "CartPole-v1", "greedy"),
        ("v2", "tests.deploy.untrained:Pixels", "greedy"),
    ],
)
def test_step_takes_the_actions_of_the_policy(name: str, env: str, mode: str) -> None:
    policy, spaces = agent(name, env)
    act = onnxruntime.InferenceSession(
        export_onnx(policy, *spaces, envs=2, mode=mode), providers=["CPUExecutionProvider"]
    )
    about = json.loads(act.get_modelmeta().custom_metadata_map[DESCRIPTION])
    state = {key: np.zeros(shape, np.float32) for key, shape in about["state"].items()}
    names = [output.name for output in act.get_outputs()]
    rng, generator, taken = np.random.default_rng(0), torch.Generator().manual_seed(3), []
    for step in range(12):
        obs = {key: observed(column, rng) for key, column in about["obs"].items()}
        first = np.array([step == 0, step in (0, 7)])
        feeds = {f"obs.{key}": x for key, x in obs.items()} | {"is_first": first} | state
        for i, noise in enumerate(about["noise"]):
            draw = torch.rand if noise["kind"] == "uniform" else torch.randn
            feeds[f"noise.{i}"] = draw(noise["shape"], generator=generator).numpy()
        found = dict(zip(names, act.run(None, feeds), strict=True))
        want, _ = policy.step(obs, first, mode)
        assert np.allclose(found["action.action"], want["action"], atol=1e-5)
        state = {key: found[f"next.{key}"] for key in state}
        assert np.allclose(state["deter"], policy.latents()[0].numpy(), atol=1e-5)
        taken.append(want["action"].tobytes())
    assert len(set(taken)) > 1


def test_what_has_no_form_in_onnx_is_one_clear_error() -> None:
    policy, spaces = agent("v2", "Pendulum-v1")
    with pytest.raises(OnnxError, match="cannot express this agent's acting: .*ndtri.*--mode gree"):
        export_onnx(policy, *spaces, envs=1, mode="sample")


def test_run_is_exported_and_played_without_this_package_and_torch(tmp_path: Path) -> None:
    run = tmp_path / "run"
    save(run, dataclasses.replace(preset("v3-cartpole", "debug"), run_dir=run), update=7)
    assert main(["export", str(run), "--onnx", "--mode", "sample"]) == 0
    done = subprocess.run(
        [sys.executable, "-I", "-c", ALONE, str(EXAMPLE), str(run / "agent.onnx"), "CartPole-v1"]
        + ["5"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    config = load_config(run / "config.yaml")
    env = make_env(config.env, config.environment, 5)
    policy = policy_of(config, require_checkpoint(run), env, 5)
    with Noise(numbers(5)):
        want = sampled_episode(policy, config, 5)
    env.close()
    assert found == want and len(set(found["actions"])) == 2


def test_missing_library_names_the_extra_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, preset("v3-cartpole", "debug"), update=1)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert main(["export", str(tmp_path), "--onnx"]) == 2
    assert "onnxscript, which is not installed" in capsys.readouterr().err
