"""What can be refused before anything of a run has been started, in a second instead of twenty."""

from __future__ import annotations

from deploy.cluster import require_listener
from deploy.config import TrainConfig
from deploy.probe import EnvFacts
from replay_service.ports import require_free_port


def require_startable(config: TrainConfig, facts: EnvFacts, device: str) -> None:
    """Refuse a run that would fail later, when servers and actors have been started for it.

    Blocks for at most 5 s, where nothing answers at the address of Ray.

    Args:
        config: of the run.
        facts: what its environment emits and takes.
        device: that the learner computes on.

    Raises:
        ValueError: the agent does not fit the environment, or the mode of updates the device.
        ReplayConfigError: the port of the metrics is taken.
        ClusterError: nothing answers at the address of Ray.
    """
    import torch

    from dreamer.agent import check_agent
    from learner.step import check_mode

    check_agent(config.agent, facts.obs_space, facts.action_space)
    check_mode(config.learner.mode, torch.device(device))
    if config.learner.metrics_port > 0:
        require_free_port(
            config.learner.metrics_listen,
            config.learner.metrics_port,
            "--learner.metrics-port",
            "choose another port, or 0 for a free one",
        )
    if config.offline is None and config.ray not in ("local", "auto"):
        require_listener(config.ray)
