"""Configuration of an agent: plain frozen data, free of torch, validated where it is built.

Configs stop at constructors: layers take numbers, and only ``agent.py`` and the agents' own files
read these classes. Sizes of the published models are in ``presets.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from dreamer.ranges import require_ranges


@dataclass(frozen=True, kw_only=True)
class RSSMConfig:
    """Recurrent state-space model."""

    deter: int = 8192
    """Width D of the deterministic state."""
    hidden: int = 1024
    """Width U of the hidden layers around the recurrent core."""
    stoch: int = 32
    """Number S of stochastic groups."""
    classes: int = 64
    """Classes K of each stochastic group."""
    blocks: int = 8
    """Blocks of the block-diagonal recurrent weights."""
    prior_layers: int = 2
    """Hidden layers of the prior p(z|h)."""
    post_layers: int = 1
    """Hidden layers of the posterior q(z|h, e)."""
    unimix: float = 0.01
    """Share of the uniform distribution mixed into every categorical."""

    def __post_init__(self) -> None:
        require_ranges(self, "agent.rssm")
        if self.deter % self.blocks:
            raise ValueError(
                f"rssm.deter must be a multiple of rssm.blocks, got {self.deter} and "
                f"{self.blocks}; try --agent.rssm.deter "
                f"{self.blocks * max(1, self.deter // self.blocks)}"
            )
        if not 2 <= self.classes <= 256:
            raise ValueError(
                f"rssm.classes must be 2..256 (a replay record keeps one byte per group), "
                f"got {self.classes}"
            )

    def latent_bytes(self) -> int:
        """Return the bytes of a state in a replay record: half precision, a byte per group."""
        return 2 * self.deter + self.stoch


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Observation encoder: one convolutional tower per image size, one MLP for all vectors."""

    depth: int = 64
    """Base number of channels d; stage i has ``depth * mults[i]``."""
    mults: tuple[int, ...] = (2, 3, 4, 4)
    """Channel multiple of each stage; every stage halves the image."""
    kernel: int = 5
    """Convolution kernel in pixels."""
    layers: int = 3
    """Hidden layers of the vector MLP."""
    units: int = 1024
    """Width of the vector MLP."""

    def __post_init__(self) -> None:
        _check_odd("encoder.kernel", self.kernel, "so that images keep their size")


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Observation decoder, the mirror image of the encoder."""

    depth: int = 64
    """Base number of channels d."""
    mults: tuple[int, ...] = (2, 3, 4, 4)
    """Channel multiple of each stage; every stage doubles the image."""
    kernel: int = 5
    """Convolution kernel in pixels."""
    layers: int = 3
    """Hidden layers of the vector MLP."""
    units: int = 1024
    """Width of the vector MLP and half the width of the image stem's stochastic branch."""
    blocks: int = 8
    """Blocks of the image stem's deterministic branch."""

    def __post_init__(self) -> None:
        require_ranges(self, "agent.decoder")
        _check_odd("decoder.kernel", self.kernel, "so that images keep their size")
        width = self.depth * self.mults[-1]
        if width % self.blocks:
            raise ValueError(
                f"decoder.depth times the last of decoder.mults must be a multiple of "
                f"decoder.blocks, got {self.depth}·{self.mults[-1]} and {self.blocks}; "
                "try another --agent.decoder.depth"
            )


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """MLP that predicts one scalar from the latent feature."""

    layers: int = 1
    """Hidden layers."""
    units: int = 1024
    """Hidden width."""
    outscale: float = 1.0
    """Multiple of the initialiser's standard deviation in the output layer; 0 starts at zero."""
    bins: int = 255
    """Bins of a two-hot head; ignored by the Bernoulli head."""

    def __post_init__(self) -> None:
        _check_odd("bins", self.bins, "so that the middle one is zero")


@dataclass(frozen=True, kw_only=True)
class ActorNetConfig:
    """Policy network."""

    layers: int = 3
    """Hidden layers."""
    units: int = 1024
    """Hidden width."""
    outscale: float = 0.01
    """Multiple of the initialiser's standard deviation in the output layer."""
    min_std: float = 0.1
    """Smallest standard deviation of a continuous action."""
    max_std: float = 1.0
    """Largest standard deviation of a continuous action."""
    unimix: float = 0.01
    """Share of the uniform distribution mixed into discrete actions."""

    def __post_init__(self) -> None:
        if self.min_std > self.max_std:
            raise ValueError(
                f"actor.min_std must be <= actor.max_std, got {self.min_std} and {self.max_std}; "
                "set --agent.actor.min-std or --agent.actor.max-std"
            )


@dataclass(frozen=True, kw_only=True)
class BehaviourConfig:
    """Actor and critic learning in imagination."""

    imag_horizon: int = 15
    """Imagined steps H from every replayed state."""
    discount_horizon: float = 333.0
    """Horizon in steps; the discount is 1 - 1 / horizon."""
    lambda_: float = 0.95
    """Mix of n-step returns."""
    entropy: float = 3e-4
    """Weight of the policy's entropy bonus, per nat."""
    slow_rate: float = 0.02
    """Share of the fast critic moved into the slow critic after every update."""
    slow_regulariser: float = 1.0
    """Weight of the critic's pull towards the slow critic's mean."""
    return_rate: float = 0.01
    """Rate of the running return percentiles."""
    return_low: float = 0.05
    """Lower return percentile as a share."""
    return_high: float = 0.95
    """Upper return percentile as a share."""
    return_limit: float = 1.0
    """Smallest divisor of the advantage: small returns are never blown up."""

    def __post_init__(self) -> None:
        if self.imag_horizon < 1:
            raise ValueError(f"behaviour.imag_horizon must be >= 1 step, got {self.imag_horizon}")
        if self.discount_horizon <= 1:
            raise ValueError(
                f"behaviour.discount_horizon must be > 1 step, got {self.discount_horizon}"
            )


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """LaProp with adaptive gradient clipping, one group for all modules."""

    lr: float = 4e-5
    """Learning rate after the warm-up."""
    warmup: int = 1000
    """Updates over which the learning rate ramps from 0."""
    beta1: float = 0.9
    """Decay of the momentum."""
    beta2: float = 0.999
    """Decay of the squared gradient."""
    eps: float = 1e-20
    """Added to the root of the squared gradient."""
    agc: float = 0.3
    """Largest gradient norm as a share of the parameter norm, per tensor."""
    agc_floor: float = 1e-3
    """Smallest parameter norm that the clipping assumes."""


@dataclass(frozen=True, kw_only=True)
class LossScales:
    """Weight of every loss; the names are those of the losses."""

    rec: float = 1.0
    """Reconstruction, for every observation key."""
    rew: float = 1.0
    """Reward."""
    con: float = 1.0
    """Continuation."""
    dyn: float = 1.0
    """KL that trains the prior."""
    rep: float = 0.1
    """KL that trains the posterior."""
    policy: float = 1.0
    """Actor."""
    value: float = 1.0
    """Critic in imagination."""
    repval: float = 0.3
    """Critic on replay, with gradient into the world model."""


@dataclass(frozen=True, kw_only=True)
class ExplorationConfig:
    """What actors add to the policy's actions while they collect experience."""

    noise: float = 0.0
    """Standard deviation of normal noise on continuous actions, in units of their range [-1, 1]."""
    epsilon: float = 0.0
    """Share of discrete actions that are replaced by uniform ones."""
    random_start: bool = False
    """Whether all actions are uniform until the first update, as before DreamerV3 of 2024."""
    half_life_updates: int = 0
    """Updates in which noise and epsilon fall by half; 0 keeps them as they are."""
    floor: float = 0.0
    """What neither noise nor epsilon falls below, unless it is 0 from the start."""

    def at(self, updates: int) -> tuple[float, float]:
        """Return noise and epsilon of a policy that has seen so many updates (DreamerV1)."""
        if not self.half_life_updates:
            return self.noise, self.epsilon
        left = 0.5 ** (max(0, updates) / self.half_life_updates)
        noise, epsilon = (
            max(amount * left, min(amount, self.floor)) for amount in (self.noise, self.epsilon)
        )
        return noise, epsilon

    def __post_init__(self) -> None:
        if self.half_life_updates < 0 or self.floor < 0.0:
            raise ValueError(
                "exploration.half_life_updates and exploration.floor must be >= 0, got "
                f"{self.half_life_updates} and {self.floor}"
            )
        if self.noise < 0.0:
            raise ValueError(f"exploration.noise must be >= 0, got {self.noise}")
        if not 0.0 <= self.epsilon <= 1.0:
            raise ValueError(f"exploration.epsilon is a share in [0, 1], got {self.epsilon}")


@dataclass(frozen=True, kw_only=True)
class AgentConfig:
    """What the options of every agent have in common; each agent has a class of its own."""

    name: str
    """Which agent; set by the preset."""
    context: int = 0
    """Records before the trained window whose stored latent starts it: 1, or 0 for none stored."""
    evaluation: Literal["sample", "greedy"] = "sample"
    """How the paper's evaluation acts."""
    exploration: ExplorationConfig = field(default_factory=ExplorationConfig)
    """Noise on the actors' actions."""

    def __post_init__(self) -> None:
        # Here, and not in every part: only the whole knows by which flag a part is set.
        require_ranges(self, "agent")
        if self.context not in (0, 1):
            raise ValueError(
                f"context is 1 (windows start from the stored latent of the record before) or 0 "
                f"(they start afresh), got {self.context}"
            )

    def latent_bytes(self) -> int:
        """Return the bytes of the state that a replay record keeps, 0 if it keeps none.

        What a run costs is shown without loading torch, which `dreamer.agent.record_columns` needs.
        """
        if self.context:
            raise NotImplementedError(f"{type(self).__name__} does not say how large a state is")
        return 0


@dataclass(frozen=True, kw_only=True)
class V3Config(AgentConfig):
    """DreamerV3 as published in Nature (2025)."""

    name: str = "v3"
    """Which agent; set by the preset."""
    context: int = 1
    """Records before the trained window whose stored latent starts it: 1, or 0 for zeros."""
    rssm: RSSMConfig = field(default_factory=RSSMConfig)
    """Recurrent state-space model."""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    """Observation encoder."""
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    """Observation decoder."""
    reward: HeadConfig = field(default_factory=lambda: HeadConfig(outscale=0.0))
    """Reward head."""
    cont: HeadConfig = field(default_factory=HeadConfig)
    """Continuation head."""
    critic: HeadConfig = field(default_factory=lambda: HeadConfig(layers=3, outscale=0.0))
    """Critic."""
    actor: ActorNetConfig = field(default_factory=ActorNetConfig)
    """Policy."""
    behaviour: BehaviourConfig = field(default_factory=BehaviourConfig)
    """Learning in imagination."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimiser."""
    scales: LossScales = field(default_factory=LossScales)
    """Loss weights."""
    free_nats: float = 1.0
    """KL below which neither dyn nor rep has a gradient, per replayed step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rssm.deter % self.decoder.blocks:
            raise ValueError(
                f"rssm.deter must be a multiple of decoder.blocks, got {self.rssm.deter} and "
                f"{self.decoder.blocks}; try --agent.decoder.blocks {self.rssm.blocks}"
            )

    def latent_bytes(self) -> int:
        """Return the bytes of the state that a replay record keeps, 0 if it keeps none."""
        return self.rssm.latent_bytes() if self.context else 0


def _check_odd(name: str, value: int, reason: str) -> None:
    if value < 1 or value % 2 == 0:
        raise ValueError(f"{name} must be odd {reason}, got {value}; try {max(1, value + 1)}")
