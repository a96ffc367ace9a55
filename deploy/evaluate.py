"""`dreamfleet eval`: play episodes with a run's newest checkpoint, here, without Ray or Redis."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import numpy as np
import tyro
from numpy.typing import NDArray
from rich.table import Table

from deploy.config import FILE_NAME, ConfigError, TrainConfig, load_config
from deploy.film import Camera, Reconstruct
from deploy.progress import console, count, number
from deploy.status import require_run

SEED_OFFSET = 1_000_003
"""Added to the run's seed, so that evaluation meets no episode that training has met."""

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Play episodes with a run's newest valid checkpoint; print the scores and write eval.json."""

    run_dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")]
    """Run directory."""
    episodes: int = 20
    """Episodes to play."""
    envs: int = 4
    """Environments that are stepped side by side."""
    mode: Literal["paper", "sample", "greedy"] = "paper"
    """Sample actions or take the most likely ones; paper does what the agent's publication did:
    DreamerV3 samples, the earlier agents are greedy."""
    video: bool = False
    """Also write the first episode as an animated GIF into videos/: the environment and, for agents
    that see images, what they see beside what their model makes of it."""
    seed: int | None = None
    """Seed of environments and policy; None takes one that differs from training."""

    def __post_init__(self) -> None:
        for name in ("episodes", "envs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} must be at least 1, got {getattr(self, name)}")


class Env(Protocol):
    """What playing needs of an environment; `actors.envs.make_env` builds them."""

    def reset(self, seed: int | None = None) -> Arrays:
        """Begin an episode and return the first observation."""

    def step(self, action: Arrays) -> tuple[Arrays, float, bool, bool]:
        """Return (observation, reward, terminated, truncated)."""

    def render(self) -> NDArray[np.uint8] | None:
        """Return a picture (h, w, 3), or None where there is none."""


class Player(Protocol):
    """What playing needs of a policy; `dreamer.policy.Policy` is one."""

    def step(
        self, obs: Arrays, is_first: NDArray[np.bool_], mode: str = "sample"
    ) -> tuple[Arrays, Arrays]:
        """Return actions for all environments, and latents."""


@dataclass(frozen=True, kw_only=True)
class Episode:
    """One episode that was played."""

    ret: float
    """Sum of rewards."""
    length: int
    """Decisions."""
    end: str
    """``terminated`` or ``truncated``."""


@dataclass
class _Seat:
    """One environment and the episode that is going on in it."""

    env: Env
    obs: Arrays
    left: int
    ret: float = 0.0
    length: int = 0
    is_first: bool = True
    done: list[Episode] = field(default_factory=list)

    def play(self, action: Arrays) -> None:
        """Take one step; begin the next episode at an end if this seat has some left."""
        self.obs, reward, terminated, truncated = self.env.step(action)
        self.is_first = False
        self.ret += float(reward)
        self.length += 1
        if terminated or truncated:
            end = "terminated" if terminated else "truncated"
            self.done.append(Episode(ret=self.ret, length=self.length, end=end))
            self.left -= 1
            self.ret, self.length = 0.0, 0
            if self.left:
                self.obs, self.is_first = self.env.reset(), True


def evaluate(options: EvalOptions) -> int:
    """Play, print the scores and write them to ``eval.json`` in the run directory.

    Raises:
        ConfigError: there is no run, or no checkpoint in it.
    """
    config = load_config(require_run(options.run_dir) / FILE_NAME)
    found = require_checkpoint(options.run_dir)
    camera = Camera()
    with console().status(f"playing {options.episodes} episodes of {config.env} …"):
        episodes = _play_checkpoint(config, found, options, camera)
    facts = found.manifest
    result = {
        "env": config.env,
        "checkpoint": found.path.name,
        "env_steps": facts["env_steps"],
        "updates": facts["update"],
        "mode": mode_of(config, options.mode),
        **statistics_of(episodes),
        "episodes": [asdict(episode) for episode in episodes],
    }
    _write(options.run_dir / "eval.json", json.dumps(result, indent=2).encode())
    if options.video:
        name = f"eval-{facts['env_steps']:010d}.gif"
        result["video"] = str(_write_video(options.run_dir / "videos" / name, camera) or "-")
    _show(result, options.run_dir)
    return 0


def play(
    policy: Player,
    envs: Sequence[Env],
    episodes: int,
    *,
    seed: int = 0,
    mode: str = "sample",
    watch: Callable[[Env, Arrays, float], None] | None = None,
) -> list[Episode]:
    """Play episodes in several environments side by side.

    Every environment plays its share to the end, however long that takes: taking the episodes that
    end first would favour short ones.

    Args:
        policy: acts in all environments at once.
        envs: the environments; no more are used than there are episodes.
        episodes: how many to play.
        seed: the i-th environment starts from seed + i.
        mode: "sample" or "greedy".
        watch: called with the first environment, its observation and the return so far at every
            step of its first episode, when the policy has seen the observation and the environment
            not yet acted.
    """
    seats = [
        _Seat(env=env, obs=env.reset(seed=seed + i), left=_share(episodes, len(envs), i))
        for i, env in enumerate(envs[:episodes])
    ]
    while any(seat.left for seat in seats):
        obs = {key: np.stack([seat.obs[key] for seat in seats]) for key in seats[0].obs}
        first = np.array([seat.is_first for seat in seats])
        actions, _ = policy.step(obs, first, mode=mode)
        if watch and not seats[0].done:
            watch(seats[0].env, seats[0].obs, seats[0].ret)
        for i, seat in enumerate(seats):
            if seat.left:
                seat.play({key: value[i] for key, value in actions.items()})
    return [episode for seat in seats for episode in seat.done]


def statistics_of(episodes: Sequence[Episode]) -> dict[str, float]:
    """Return mean, spread and extremes of the returns, and the mean length."""
    returns = [episode.ret for episode in episodes]
    return {
        "mean": statistics.fmean(returns),
        "std": statistics.pstdev(returns),
        "min": min(returns),
        "max": max(returns),
        "mean_length": statistics.fmean(episode.length for episode in episodes),
    }


def require_checkpoint(directory: Path) -> Any:
    """Return the newest valid checkpoint of a run. Raises ConfigError if there is none yet."""
    from learner.checkpoint import load_newest

    found = load_newest(directory / "checkpoints")
    if found is None:
        raise ConfigError(f"{directory} has no checkpoint yet; let it train a little longer")
    return found


def _play_checkpoint(
    config: TrainConfig, found: Any, options: EvalOptions, camera: Camera
) -> list[Episode]:
    from actors.envs import make_env

    # Pictures are drawn into memory; without a screen SDL would otherwise complain on each start.
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    seed = config.seed + SEED_OFFSET if options.seed is None else options.seed
    envs: list[Any] = []
    try:
        for i in range(min(options.envs, options.episodes)):
            envs.append(make_env(config.env, config.environment, seed + i))
        policy = policy_of(config, found, envs[0], seed)
        if options.video:
            camera.reconstruct = reconstruction_of(config, found, envs[0], policy)
        return play(
            policy,
            envs,
            options.episodes,
            seed=seed,
            mode=mode_of(config, options.mode),
            watch=(lambda env, obs, _: camera(env, obs)) if options.video else None,
        )
    finally:
        for env in envs:
            env.close()


def mode_of(config: TrainConfig, asked: str) -> str:
    """Return the acting mode: "paper" stands for that of the agent's publication."""
    return config.agent.evaluation if asked == "paper" else asked


def reconstruction_of(config: TrainConfig, found: Any, env: Any, policy: Any) -> Reconstruct | None:
    """Return what draws the model's view of the first environment; None without a decoder."""
    import torch

    from dreamer.agent import make_agent

    agent = make_agent(config.agent, env.obs_space, env.action_space)
    agent.load_state_dict(found.state["agent"])
    if agent.decoder is None or not agent.decoder.groups:
        return None
    decoder = agent.decoder

    def pictures() -> dict[str, NDArray[np.uint8]]:
        deter, stoch = policy.latents()
        with torch.inference_mode():
            model = decoder.images(deter[:1, None], stoch[:1, None])
        return {k: (x[0, 0].clamp(0, 1) * 255).byte().numpy() for k, x in model.items()}

    return pictures


def policy_of(config: TrainConfig, found: Any, env: Any, seed: int) -> Any:
    """Return the acting policy of a checkpoint, for environments with the spaces of ``env``."""
    import torch

    from dreamer.agent import POLICY_PARTS
    from dreamer.policy import Policy
    from dreamer.weights import pack

    # Batches of a few states: more threads only wait for each other.
    torch.set_num_threads(1)
    policy = Policy(config.agent, env.obs_space, env.action_space, seed=seed)
    prefixes = tuple(f"{part}." for part in POLICY_PARTS)
    tensors = {k: v for k, v in found.state["agent"].items() if k.startswith(prefixes)}
    version = (found.manifest["fence"], found.manifest["update"])
    policy.load(pack(tensors, version, dtype=torch.float32))
    return policy


def _write_video(path: Path, camera: Camera) -> Path | None:
    from learner.gif import encode_gif

    if not camera.frames:
        console().print("no video: this environment draws nothing", style="yellow")
        return None
    path.parent.mkdir(exist_ok=True)
    _write(path, encode_gif(np.stack(camera.frames), caption=f"Evaluation: {camera.shows}"))
    return path


def _write(path: Path, data: bytes) -> None:
    from learner.files import write_atomically

    write_atomically(path, data)


def _share(whole: int, parts: int, index: int) -> int:
    parts = min(whole, parts)
    return whole // parts + (index < whole % parts)


def _show(result: dict[str, Any], directory: Path) -> None:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_row("environment", result["env"])
    trained = f"{count(result['env_steps'])} steps, {count(result['updates'])} updates"
    table.add_row("checkpoint", f"{result['checkpoint']} ({trained})")
    spread = f"± {number(result['std'])}, {number(result['min'])} to {number(result['max'])}"
    played = f"over {len(result['episodes'])} episodes, {result['mode']}"
    table.add_row("return", f"[bold green]{number(result['mean'])}[/] {spread} {played}")
    table.add_row("length", number(result["mean_length"]))
    table.add_row("written", str(directory / "eval.json"))
    if "video" in result:
        table.add_row("video", result["video"])
    console().print(table)
