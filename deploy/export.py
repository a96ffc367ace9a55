"""`dreamfleet export`: the acting half of a run's agent as one file for torch or ONNX."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import tyro

from deploy.config import FILE_NAME, ConfigError, load_config
from deploy.evaluate import mode_of, policy_of, require_checkpoint
from deploy.progress import console
from deploy.status import require_run


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Write encoder, RSSM and actor of a run's newest checkpoint as one file, for torch or ONNX."""

    run_dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")]
    """Run directory."""
    out: Path | None = None
    """The file; None is agent.pt2 in the run directory, or agent.onnx."""
    onnx: bool = False
    """Write ONNX instead of a torch.export file; its random numbers are inputs."""
    envs: int = 1
    """Environments that one call acts in; the graph has fixed shapes."""
    mode: Literal["paper", "sample", "greedy"] = "paper"
    """Sample actions or take the most likely ones; paper does what the agent's publication does."""

    def __post_init__(self) -> None:
        if self.envs < 1:
            raise ConfigError(f"--envs must be at least 1, got {self.envs}")


def export(options: ExportOptions) -> int:
    """Write the file and say where it is.

    Raises:
        ConfigError: there is no run, no checkpoint in it, or what ONNX needs is not installed.
        OnnxError: ONNX has no form for an operation of this agent.
        OSError: the file cannot be written.
    """
    from actors.envs import make_env
    from dreamer.export import export_acting
    from dreamer.onnx import export_onnx
    from learner.files import write_atomically

    config = load_config(require_run(options.run_dir) / FILE_NAME)
    if options.onnx:
        _require_onnx()
    found = require_checkpoint(options.run_dir)
    env = make_env(config.env, config.environment, config.seed)
    try:
        policy = policy_of(config, found, env, config.seed)
        spaces = env.obs_space, env.action_space
    finally:
        env.close()
    mode = mode_of(config, options.mode)
    write = export_onnx if options.onnx else export_acting
    with console().status(f"exporting {found.path.name} …"):
        data = write(policy, *spaces, envs=options.envs, mode=mode)
    path = options.out or options.run_dir / ("agent.onnx" if options.onnx else "agent.pt2")
    write_atomically(path, data)
    shown = f"{path} ({len(data) / 1e6:.1f} MB): {config.agent.name}, {mode}, checkpoint "
    console().print(shown + found.path.name, highlight=False, soft_wrap=True)
    return 0


def _require_onnx() -> None:
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"--onnx needs {' and '.join(missing)}, which "
            f"{'is' if len(missing) == 1 else 'are'} not installed; run `make setup` in a clone, "
            "or `pip install 'dreamfleet[onnx]'`"
        )
