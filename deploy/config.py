"""The configuration of a whole run: one tree of frozen data, saved as YAML beside what it made."""

from __future__ import annotations

import hashlib
import json
import math
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from actors.config import ActorConfig, EvalConfig, FleetConfig
from actors.envs import EnvConfig
from dreamer.config import AgentConfig, V3Config
from dreamer.presets import AGENTS
from learner.config import LearnerConfig
from replay_service import ReplayConfig, ReplayConfigError, has_password, split_addresses

FILE_NAME = "config.yaml"
EMBEDDED = "embedded"
"""What stands for the address of a run's own server."""
MOST_SHOWN = 8
"""Differences that an error message spells out."""
_HEADER = """\
# The resolved configuration of this run, as it was started. `dreamfleet train --run-dir` on this
# directory continues with it; `dreamfleet train --help` says what every field means.
"""
_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")
_REDIS = re.compile(r"embedded|rediss?://[^\s,;]+|unix://\S+")
_RAY = re.compile(r"local|auto|[\w.-]+:\d+")

_amending = threading.Lock()

Config = TypeVar("Config")


class ConfigError(ValueError):
    """A configuration cannot be used; the message says what is wrong and how to mend it."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train an agent: environments, replay, learner and everything between them."""

    preset: str = "v3-cartpole"
    """Named configuration to start from; every other flag changes it. With --env alone it is that
    of the environment's suite, else v3. One of v3, v3-cartpole, v3-balance, v3-room,
    v3-dmc-proprio, v3-dmc-vision, v3-atari, v3-atari100k, v3-crafter, v3-minigrid;
    v1-cartpole, v1-balance, v1-dmc-vision, v1-dmc-proprio, v1-atari, v1-atari100k, v1-crafter,
    v1-minigrid; v2-cartpole, v2-balance, v2-room, v2-dmc-vision, v2-dmc-proprio, v2-atari,
    v2-atari100k, v2-crafter, v2-minigrid; v3-2023-cartpole, v3-2023-balance, v3-2023-dmc-vision,
    v3-2023-dmc-proprio, v3-2023-atari, v3-2023-atari100k, v3-2023-crafter, v3-2023-minigrid;
    pro-cartpole, pro-minigrid, pro-doorkey, pro-dmc-vision, pro-dmc-proprio, pro-natural,
    pro-atari, pro-atari100k, pro-crafter, pro-v3-dmc-vision; r2-dmc-vision,
    infonce-dmc-vision."""
    size: str = "200m"
    """Model size that sets all widths: 1m, 12m, 25m, 50m, 100m, 200m or 400m as published (the name
    is the number of parameters), tiny for vectors on a CPU, debug for tests. Earlier agents have
    dmc, atari and full (v2) or xs, s, m, l and xl (v3-2023). Single widths can be changed on top
    (--agent.*)."""
    run_dir: Path | None = None
    """Directory of this run; one that has a run in it is continued. None is
    runs/<preset>[-<env>][-<size>]-<seed>."""
    env: str = "CartPole-v1"
    """Environment: a Gymnasium id, module:Class, ale:<Game>, dmc:<domain>-<task>, crafter:reward or
    minigrid:<Id>."""
    steps: int = 10_000
    """Environment steps (decisions of the agent, of all actors together) at which the run ends."""
    seed: int = 0
    """Seed of networks, policies, environments and sampling."""
    actors: int = 1
    """Actor processes."""
    envs_per_actor: int = 1
    """Environments that each actor steps with one batched policy call."""
    train_ratio: float = 32.0
    """Replayed steps per environment step: how often each step is trained on, on average."""
    device: str = "auto"
    """Where the learner computes: auto, cpu, cuda or cuda:<number>. auto takes CUDA if it works."""
    redis: str = "embedded"
    """Replay server: embedded starts a private one in the run directory; else its address, as
    redis://, rediss:// or unix://. Several addresses, with commas between them, share the work."""
    ray: str = "local"
    """Ray cluster: local starts a private one, auto joins the one this machine belongs to, else
    <host>:<port> of its head."""
    lockstep: bool = False
    """Let actors and learner take turns: the same seed then gives the same run, only slower."""
    offline: str | None = None
    """Train on a replay that is only read, without actors: a run directory, the directory of an
    exported replay, or the address of a server. Takes the environment, and without --preset the
    agent too, from the source, if that brings a configuration."""
    updates: int | None = None
    """Updates at which an offline run ends; None is as many as --steps pay for at --train-ratio."""
    agent: AgentConfig = field(default_factory=V3Config)
    """What learns. The preset chooses the agent."""
    environment: EnvConfig = field(default_factory=EnvConfig)
    """What the environment shows and how it is stepped."""
    actor: ActorConfig = field(default_factory=ActorConfig)
    """How actors run and recover."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Evaluation beside training."""
    fleet: FleetConfig = field(default_factory=FleetConfig)
    """Actors on a Ray cluster while their learner is away."""
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    """What is kept of the experience, and where."""
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    """Batches, weights, checkpoints, reports."""

    def __post_init__(self) -> None:
        for name in ("steps", "actors", "envs_per_actor"):
            if getattr(self, name) < 1:
                flag = name.replace("_", "-")
                raise ConfigError(f"--{flag} must be at least 1, got {getattr(self, name)}")
        if not self.env:
            raise ConfigError("--env is empty; name an environment, such as CartPole-v1")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"--seed must be 0 to 2**32 - 1, got {self.seed}")
        if not 0 < self.train_ratio < 1e6:
            raise ConfigError(
                f"--train-ratio is a number of replayed steps above 0, got {self.train_ratio}"
            )
        if any(has_password(address) for address in self.addresses):
            raise ConfigError(
                "--redis holds a password, which the process list and config.yaml would show: "
                "put it in a file of mode 0600, and give --replay.password-file FILE and the "
                "address without it (redis://user@host:port)"
            )
        if len(self.addresses) > 1 and self.lockstep:
            raise ConfigError(
                f"--lockstep gives the same run again, and with {len(self.addresses)} servers "
                "chunks arrive in an order that nobody sets: give --redis one address"
            )
        if self.updates is not None and (self.offline is None or self.updates < 1):
            raise ConfigError(
                f"--updates {self.updates} is the length of an offline run, at least 1: give "
                "--offline SOURCE too, or the length of a run with actors as --steps"
            )
        if self.offline is not None and self.lockstep:
            raise ConfigError("--lockstep lets actors take turns, and --offline has none: leave it")
        _require_form("device", self.device, _DEVICE, "auto, cpu, cuda or cuda:<number>")
        for address in self.addresses:
            _require_form("redis", address, _REDIS, "embedded, redis://…, rediss://… or unix://…")
        _require_form("ray", self.ray, _RAY, "local, auto or <host>:<port>")
        self._require_learnable()

    @property
    def addresses(self) -> tuple[str, ...]:
        """Addresses of the replay's servers, or `embedded` alone. Raises ConfigError."""
        try:
            return split_addresses(self.redis) or ("",)
        except ReplayConfigError as error:
            raise ConfigError(f"--redis: {error}") from error

    def _require_learnable(self) -> None:
        """Refuse runs that would end before their first update."""
        window = self.learner.batch_length + self.agent.context
        if self.replay.capacity_steps < window:
            raise ConfigError(
                f"--replay.capacity-steps {self.replay.capacity_steps} holds no window of {window} "
                "steps (learner.batch_length + agent.context); raise it"
            )
        if self.offline is None and self.steps < self.replay.min_size_steps:
            raise ConfigError(
                f"--steps {self.steps} ends the run before training starts at "
                f"--replay.min-size-steps {self.replay.min_size_steps}; raise the first or lower "
                "the second"
            )

    @property
    def target_updates(self) -> int:
        """The updates at which a run ends: the given ones, or what its steps pay for."""
        if self.updates is not None:
            return self.updates
        batch = self.learner.batch_size * self.learner.batch_length
        return max(1, math.floor(self.steps * self.train_ratio / batch))

    @property
    def directory(self) -> Path:
        """The run directory: the given one, or one named after what distinguishes this run."""
        if self.run_dir is not None:
            return self.run_dir
        from deploy.presets import PRESETS

        known = PRESETS.get(self.preset)
        parts = [self.preset]
        if known is None or known.values.get("env") != self.env:
            parts.append(re.sub(r"[^\w.-]+", "-", self.env).strip("-"))
        if known is None or known.size != self.size:
            parts.append(self.size)
        if self.offline is not None:
            parts.append("offline")
        return Path("runs") / "-".join([*parts, str(self.seed)])


@dataclass(frozen=True)
class Difference:
    """One field that two configurations disagree on."""

    name: str
    """Dotted name of the field."""
    saved: Any
    """Its value in the first configuration."""
    wanted: Any
    """Its value in the second."""

    def __str__(self) -> str:
        return f"{self.name}: {self.saved!r} there, {self.wanted!r} now"


MAY_CHANGE = frozenset(
    {"preset", "run_dir", "steps", "updates", "actors", "device", "redis", "ray"}
    | {"replay.durability", "replay.listen", "replay.secrets", "replay.take_over"}
    | {"replay.password_file", "replay.ca_file"}
    | {"replay.redis_memory_bytes", "replay.placement", "replay.codec", "replay.flush_age_s"}
    | {"learner.mode", "learner.precision", "learner.threads", "learner.keep_checkpoints"}
    | {"learner.publish_every_s", "learner.publish_every_updates", "learner.metrics_port"}
    | {"learner.metrics_listen", "learner.metrics_token_file", "learner.metrics_host"}
    | {"learner.checkpoint_every_s", "learner.checkpoint_every_steps"}
    | {"learner.log_every_s", "learner.video_every_s"}
)
"""Fields that a run may change when it is continued."""
MAY_CHANGE_ALL = ("actor.", "eval.", "fleet.")
"""Groups of which every field may change too."""


def differences(saved: TrainConfig, wanted: TrainConfig) -> list[Difference]:
    """Return the fields on which two configurations disagree, in the order of the tree."""
    old, new = dict(_leaves(saved)), dict(_leaves(wanted))
    return [Difference(name, old[name], new[name]) for name in new if old[name] != new[name]]


def resume_conflicts(saved: TrainConfig, wanted: TrainConfig) -> list[Difference]:
    """Return the differences that forbid continuing the saved run with the wanted configuration."""
    return [
        found
        for found in differences(saved, wanted)
        if found.name not in MAY_CHANGE and not found.name.startswith(MAY_CHANGE_ALL)
    ]


def require_resumable(saved: TrainConfig, wanted: TrainConfig) -> None:
    """Raise ConfigError, listing the differences, if the run directory holds another run."""
    found = [str(difference) for difference in resume_conflicts(saved, wanted)]
    if found:
        more = [f"{len(found) - MOST_SHOWN} more"] if len(found) > MOST_SHOWN else []
        raise ConfigError(
            f"{wanted.directory} holds a run of another configuration ("
            + "; ".join(found[:MOST_SHOWN] + more)
            + "); choose another --run-dir, or repeat the flags of that run"
        )


def config_hash(config: TrainConfig) -> str:
    """Return 12 hex digits over what defines the run: every field that may not change later."""
    fixed = {
        name: value
        for name, value in _leaves(config)
        if name not in MAY_CHANGE and not name.startswith(MAY_CHANGE_ALL)
    }
    text = json.dumps(fixed, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def with_values(config: Config, values: Mapping[str, Any]) -> Config:
    """Return a copy with dotted fields replaced.

    Raises:
        ConfigError: there is no such field; the nearest name is given.
    """
    return _with_values(config, values, "")


def save_config(config: TrainConfig, path: Path) -> None:
    """Write a configuration as YAML, atomically; without what is meant for one start alone."""
    import yaml

    from learner.files import write_atomically

    config = replace(config, replay=replace(config.replay, take_over=False))
    text = yaml.safe_dump(_converter().unstructure(config), sort_keys=False, width=100)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (_HEADER + text).encode())


def amend_config(path: Path, **changes: Any) -> None:
    """Change fields of a configuration that was saved; any thread of the run may."""
    with _amending:
        save_config(replace(load_config(path), **changes), path)


def load_config(path: Path) -> TrainConfig:
    """Read a configuration written by `save_config` or by hand; missing fields take defaults.

    Raises:
        ConfigError: unreadable, unknown fields (the nearest name is given), or wrong values.
    """
    import yaml

    try:
        data = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds {type(data).__name__}, expected fields of a configuration")
    return from_dict(data, where=str(path))


def from_dict(data: Mapping[str, Any], where: str = "configuration") -> TrainConfig:
    """Build a configuration from nested plain values. Raises ConfigError as `load_config` does."""
    from cattrs import BaseValidationError

    _require_known(replace(TrainConfig(), agent=_agent_of(data, where)), data, where)
    try:
        return _converter().structure(data, TrainConfig)
    except BaseValidationError as error:
        raise ConfigError(f"{where}: " + "; ".join(_reasons(error))) from error


def _agent_of(data: Mapping[str, Any], where: str) -> AgentConfig:
    """Return the published configuration of the agent that the data names."""
    default = TrainConfig().agent
    agent = data.get("agent")
    name = agent.get("name", default.name) if isinstance(agent, Mapping) else default.name
    if name not in AGENTS:
        raise ConfigError(f"{where}: unknown agent.name {name}{nearest(str(name), list(AGENTS))}")
    return AGENTS[name].config


def nearest(name: str, known: list[str]) -> str:
    """Return a hint at the most similar known name, or the empty string."""
    found = get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {found[0]}?" if found else ""


def _require_form(name: str, value: str, form: re.Pattern[str], expected: str) -> None:
    if not form.fullmatch(value):
        raise ConfigError(f"--{name} must be {expected}, got {value!r}")


def _leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for item in fields(config):
        value = getattr(config, item.name)
        if is_dataclass(value):
            yield from _leaves(value, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", value


def _with_values(config: Any, values: Mapping[str, Any], prefix: str) -> Any:
    """Replace all fields of one level at once, so that they are validated together."""
    known = [item.name for item in fields(config)]
    direct: dict[str, Any] = {}
    nested: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        head, _, rest = name.partition(".")
        if head not in known:
            raise ConfigError(f"unknown field {prefix}{head}{nearest(head, known)}")
        if rest:
            nested.setdefault(head, {})[rest] = value
        else:
            direct[head] = value
    for head, inner in nested.items():
        direct[head] = _with_values(getattr(config, head), inner, f"{prefix}{head}.")
    return replace(config, **direct)


def _require_known(config: Any, data: Mapping[str, Any], where: str, prefix: str = "") -> None:
    known = [item.name for item in fields(config)]
    for name, value in data.items():
        if name not in known:
            raise ConfigError(f"{where}: unknown field {prefix}{name}{nearest(str(name), known)}")
        inner = getattr(config, name)
        if is_dataclass(inner):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{where}: {prefix}{name} must hold fields, got {value!r}")
            _require_known(inner, value, where, f"{prefix}{name}.")


def _reasons(error: BaseException, path: str = "") -> Iterator[str]:
    """Yield what is wrong at each leaf of a tree of validation errors."""
    for note in getattr(error, "__notes__", ()):
        path += f".{note.name}" if getattr(note, "name", None) else ""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _reasons(inner, path)
    else:
        yield f"{path.lstrip('.')}: {error}" if path else str(error)


def _converter() -> Any:
    import cattrs

    converter = cattrs.Converter(forbid_extra_keys=True)
    converter.register_unstructure_hook(Path, str)
    converter.register_unstructure_hook(tuple, list)

    def agent(data: Any, _: type[AgentConfig]) -> AgentConfig:
        name = data.get("name", TrainConfig().agent.name)
        return converter.structure(data, type(AGENTS[name].config))

    def whole(agent: AgentConfig) -> dict[str, Any]:
        fields: dict[str, Any] = converter.unstructure(agent, unstructure_as=type(agent))
        return fields

    # The options of an agent have a class of their own; its name says which.
    converter.register_structure_hook_func(lambda kind: kind is AgentConfig, agent)
    converter.register_unstructure_hook_func(lambda kind: kind is AgentConfig, whole)
    return converter
