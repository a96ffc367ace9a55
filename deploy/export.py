"""`dreamfleet export`: the acting half of a run's agent as one file that torch alone can run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from deploy.config import FILE_NAME, ConfigError, load_config
from deploy.evaluate import policy_of, require_checkpoint
from deploy.progress import console
from deploy.status import require_run


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Write encoder, RSSM and actor of a run's newest checkpoint as one torch.export file."""

    run_dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")]
    """Run directory."""
    out: Path | None = None
    """The file; None is agent.pt2 in the run directory."""
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
        ConfigError: there is no run, or no checkpoint in it.
        OSError: the file cannot be written.
    """
    from actors.envs import make_env
    from dreamer.export import export_acting
    from learner.files import write_atomically

    config = load_config(require_run(options.run_dir) / FILE_NAME)
    found = require_checkpoint(options.run_dir)
    env = make_env(config.env, config.environment, config.seed)
    try:
        policy = policy_of(config, found, env, config.seed)
        spaces = env.obs_space, env.action_space
    finally:
        env.close()
    mode = config.agent.evaluation if options.mode == "paper" else options.mode
    with console().status(f"exporting {found.path.name} …"):
        data = export_acting(policy, *spaces, envs=options.envs, mode=mode)
    path = options.out or options.run_dir / "agent.pt2"
    write_atomically(path, data)
    shown = f"{path} ({len(data) / 1e6:.1f} MB): {config.agent.name}, {mode}, checkpoint "
    console().print(shown + found.path.name, highlight=False, soft_wrap=True)
    return 0
