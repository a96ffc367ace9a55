"""Configuration of the agents beside DreamerV3 of 2025: V1, V2, Pro, V3 of January 2023, R2."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from dreamer.config import AgentConfig, ExplorationConfig, V3Config

Gradient = Literal["auto", "reinforce", "dynamics", "both"]
Squash = Literal["identity", "tanh", "sign"]


@dataclass(frozen=True, kw_only=True)
class WorldConfig:
    """Widths of the world model."""

    deter: int = 200
    """Width D of the deterministic state."""
    hidden: int = 200
    """Width of the hidden layers around the recurrent core."""
    stoch: int = 30
    """Width of a Gaussian latent, or number S of categorical groups."""
    classes: int = 0
    """Classes K of each categorical group; 0 makes the latent Gaussian."""
    unimix: float = 0.0
    """Share of the uniform distribution mixed into every categorical."""
    depth: int = 32
    """Base number of channels d of the convolutions."""
    vector_layers: int = 4
    """Hidden layers of the MLPs that embed and reconstruct vectors."""
    vector_units: int = 400
    """Width of those MLPs."""

    def __post_init__(self) -> None:
        if self.classes == 1 or not 0 <= self.classes <= 256:
            raise ValueError(
                f"world.classes must be 2..256 (a replay record keeps one byte per group) or 0 for "
                f"a Gaussian latent, got {self.classes}"
            )
        if not 0.0 <= self.unimix < 1.0:
            raise ValueError(f"world.unimix is a share in [0, 1), got {self.unimix}")

    def latent_bytes(self) -> int:
        """Return the bytes of a state in a replay record: a Gaussian latent in full precision."""
        return 2 * self.deter + (self.stoch if self.classes else 4 * self.stoch)


@dataclass(frozen=True, kw_only=True)
class HeadsConfig:
    """MLPs on the latent feature: hidden layers of each, one width for all."""

    units: int = 400
    """Hidden width."""
    reward_layers: int = 4
    """Hidden layers of the reward head."""
    cont_layers: int = 4
    """Hidden layers of the continuation head."""
    critic_layers: int = 4
    """Hidden layers of the critic."""
    actor_layers: int = 4
    """Hidden layers of the policy."""
    bins: int = 255
    """Bins of two-hot heads, where the agent has them."""


@dataclass(frozen=True, kw_only=True)
class AdamsConfig:
    """Three Adam optimisers: world model, actor, critic."""

    model_lr: float = 6e-4
    """Learning rate of the world model."""
    actor_lr: float = 8e-5
    """Learning rate of the actor."""
    critic_lr: float = 8e-5
    """Learning rate of the critic."""
    eps: float = 1e-7
    """Added to the root of the squared gradient, for the world model."""
    behaviour_eps: float = 1e-7
    """Added to the root of the squared gradient, for actor and critic."""
    model_clip: float = 100.0
    """Largest global norm of the world model's gradient."""
    behaviour_clip: float = 100.0
    """Largest global norm of the actor's and of the critic's gradient."""
    decay: float = 0.0
    """Share by which every parameter shrinks per update, whatever the rate."""


@dataclass(frozen=True, kw_only=True)
class ImaginationConfig:
    """Learning in imagination."""

    horizon: int = 15
    """Imagined steps H from every replayed state."""
    discount: float = 0.99
    """Discount γ per step."""
    lambda_: float = 0.95
    """Mix of n-step returns."""
    entropy: float = 0.0
    """Weight of the policy's entropy bonus, per nat."""
    gradient: Gradient = "auto"
    """Where the actor's gradient comes from: reinforce, dynamics (through the model), both mixed,
    or auto: dynamics if all actions are continuous, else reinforce."""
    mix: float = 0.1
    """Share of the dynamics gradient where both are mixed."""

    def __post_init__(self) -> None:
        if self.horizon < 2:
            raise ValueError(f"imagination.horizon must be >= 2 steps, got {self.horizon}")
        if not 0.0 < self.discount < 1.0:
            raise ValueError(f"imagination.discount must be in (0, 1), got {self.discount}")


@dataclass(frozen=True, kw_only=True)
class V1Config(AgentConfig):
    """DreamerV1 (arXiv:1912.01603v3)."""

    name: str = "v1"
    """Which agent; set by the preset."""
    evaluation: Literal["sample", "greedy"] = "greedy"
    """How the paper's evaluation acts."""
    exploration: ExplorationConfig = field(
        default_factory=lambda: ExplorationConfig(noise=0.3, random_start=True)
    )
    """Noise on the actors' actions."""
    world: WorldConfig = field(default_factory=WorldConfig)
    """World model."""
    heads: HeadsConfig = field(default_factory=lambda: HeadsConfig(
        reward_layers=2, cont_layers=3, critic_layers=3
    ))  # fmt: skip
    """Heads, critic and policy."""
    imagination: ImaginationConfig = field(default_factory=ImaginationConfig)
    """Learning in imagination; the gradient always comes through the model."""
    optim: AdamsConfig = field(default_factory=AdamsConfig)
    """Optimisers."""
    cont: bool = False
    """Whether a head predicts the continuation; without it the discount is constant."""
    rec_scale: float = 1.0
    """Weight of the reconstruction; more where what matters is small in the observation."""
    cont_scale: float = 10.0
    """Weight of the continuation loss."""
    free_nats: float = 3.0
    """Mean KL below which it has no gradient."""
    kl_scale: float = 1.0
    """Weight of the KL."""
    reward: Squash = "identity"
    """Function of the reward that is learned."""

    def latent_bytes(self) -> int:
        """Return the bytes of the state that a replay record keeps, 0 if it keeps none."""
        return self.world.latent_bytes() if self.context else 0


@dataclass(frozen=True, kw_only=True)
class V2Config(AgentConfig):
    """DreamerV2 (arXiv:2010.02193v4)."""

    name: str = "v2"
    """Which agent; set by the preset."""
    evaluation: Literal["sample", "greedy"] = "greedy"
    """How the paper's evaluation acts."""
    exploration: ExplorationConfig = field(
        default_factory=lambda: ExplorationConfig(random_start=True)
    )
    """Noise on the actors' actions."""
    world: WorldConfig = field(default_factory=lambda: WorldConfig(
        deter=1024, hidden=1024, stoch=32, classes=32, depth=48
    ))  # fmt: skip
    """World model."""
    heads: HeadsConfig = field(default_factory=HeadsConfig)
    """Heads, critic and policy."""
    imagination: ImaginationConfig = field(default_factory=lambda: ImaginationConfig(entropy=2e-3))
    """Learning in imagination."""
    optim: AdamsConfig = field(default_factory=lambda: AdamsConfig(
        model_lr=1e-4, actor_lr=8e-5, critic_lr=2e-4, eps=1e-5, behaviour_eps=1e-5, decay=1e-6
    ))  # fmt: skip
    """Optimisers."""
    cont: bool = True
    """Whether a head predicts the continuation; without it the discount is constant."""
    rec_scale: float = 1.0
    """Weight of the reconstruction; more where what matters is small in the observation."""
    cont_scale: float = 1.0
    """Weight of the continuation loss."""
    free_nats: float = 0.0
    """Mean KL below which it has no gradient."""
    kl_scale: float = 1.0
    """Weight of the KL."""
    kl_balance: float = 0.8
    """Share of the KL that trains the prior; the rest trains the posterior."""
    slow_every: int = 100
    """Updates between copies of the critic into the slow critic."""
    reward: Squash = "tanh"
    """Function of the reward that is learned."""
    layer_norm: bool = False
    """Whether every layer has a layer norm (as on Crafter), and not only the recurrent core."""

    def latent_bytes(self) -> int:
        """Return the bytes of the state that a replay record keeps, 0 if it keeps none."""
        return self.world.latent_bytes() if self.context else 0


@dataclass(frozen=True, kw_only=True)
class V3Of2023Config(AgentConfig):
    """DreamerV3 of January 2023 (arXiv:2301.04104v1)."""

    name: str = "v3-2023"
    """Which agent; set by the preset."""
    exploration: ExplorationConfig = field(
        default_factory=lambda: ExplorationConfig(random_start=True)
    )
    """Noise on the actors' actions."""
    world: WorldConfig = field(default_factory=lambda: WorldConfig(
        deter=4096, hidden=1024, stoch=32, classes=32, unimix=0.01, depth=96, vector_layers=5,
        vector_units=1024,
    ))  # fmt: skip
    """World model."""
    heads: HeadsConfig = field(default_factory=lambda: HeadsConfig(
        units=1024, reward_layers=5, cont_layers=5, critic_layers=5, actor_layers=5
    ))  # fmt: skip
    """Heads, critic and policy."""
    imagination: ImaginationConfig = field(
        default_factory=lambda: ImaginationConfig(discount=1.0 - 1.0 / 333.0, entropy=3e-4)
    )
    """Learning in imagination."""
    optim: AdamsConfig = field(default_factory=lambda: AdamsConfig(
        model_lr=1e-4, actor_lr=3e-5, critic_lr=3e-5, eps=1e-8, behaviour_eps=1e-5,
        model_clip=1000.0,
    ))  # fmt: skip
    """Optimisers."""
    free_nats: float = 1.0
    """KL below which neither dyn nor rep has a gradient, per replayed step."""
    rec_scale: float = 1.0
    """Weight of the reconstruction; more where what matters is small in the observation."""
    dyn_scale: float = 0.5
    """Weight of the KL that trains the prior."""
    rep_scale: float = 0.1
    """Weight of the KL that trains the posterior."""
    continuation: Literal["mode", "probability"] = "mode"
    """How imagination reads the continuation head: as 0 or 1, whichever is likelier (as published),
    or as the probability, with which ends that the model is unsure of count in part."""
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
    """Smallest divisor of the advantage."""
    actor_unimix: float = 0.01
    """Share of the uniform distribution mixed into discrete actions."""

    def latent_bytes(self) -> int:
        """Return the bytes of the state that a replay record keeps, 0 if it keeps none."""
        return self.world.latent_bytes() if self.context else 0


@dataclass(frozen=True, kw_only=True)
class PrototypesConfig:
    """Learning the representation from prototypes instead of pixels (DreamerPro)."""

    count: int = 2500
    """Number K of prototypes."""
    size: int = 32
    """Width P of a prototype and of the projections."""
    temperature: float = 0.1
    """Temperature of the students' softmax."""
    eps: float = 0.0125
    """Temperature of the teacher's Sinkhorn assignment; 0.05 outside of DMC."""
    iterations: int = 3
    """Sinkhorn iterations."""
    freeze: int = 10_000
    """Updates for which the prototypes do not move."""
    ema_rate: float = 0.05
    """Share of encoder and projection moved into the teacher's after every update."""
    norm_scale: float = 0.0
    """Weight of the pull of the projections' norms towards 1; 1 for natural backgrounds."""
    shift: float = 3.0
    """Largest shift of a view in pixels, per axis."""
    whole_pixels: bool = False
    """Whether views are shifted by whole pixels."""
    rollout: Literal["augmented", "clean"] = "augmented"
    """Whether everything learns from the two shifted views, or only the prototypes do."""


@dataclass(frozen=True, kw_only=True)
class ProConfig(V2Config):
    """DreamerPro on DreamerV2 (arXiv:2110.14565)."""

    name: str = "pro"
    """Which agent; set by the preset."""
    world: WorldConfig = field(default_factory=lambda: WorldConfig(stoch=32, depth=48))
    """World model."""
    imagination: ImaginationConfig = field(default_factory=lambda: ImaginationConfig(entropy=1e-4))
    """Learning in imagination; the horizon counts the replayed state."""
    optim: AdamsConfig = field(default_factory=lambda: AdamsConfig(
        model_lr=3e-4, eps=1e-5, behaviour_eps=1e-5, decay=1e-6
    ))  # fmt: skip
    """Optimisers."""
    cont: bool = False
    """Whether a head predicts the continuation; without it the discount is constant."""
    free_nats: float = 1.0
    """Mean KL below which it has no gradient."""
    reward: Squash = "identity"
    """Function of the reward that is learned."""
    reward_scale: float = 1.0
    """Weight of the reward loss; 1000 for natural backgrounds."""
    prototypes: PrototypesConfig = field(default_factory=PrototypesConfig)
    """Representation objective."""


@dataclass(frozen=True, kw_only=True)
class ProV3Config(V3Config):
    """DreamerPro's objective on DreamerV3 (2025)."""

    name: str = "pro-v3"
    """Which agent; set by the preset."""
    evaluation: Literal["sample", "greedy"] = "greedy"
    """How the paper's evaluation acts."""
    prototypes: PrototypesConfig = field(default_factory=lambda: PrototypesConfig(
        eps=0.05, norm_scale=1.0, whole_pixels=True, rollout="clean"
    ))  # fmt: skip
    """Representation objective."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.context and self.prototypes.rollout == "augmented":
            raise ValueError(
                "prototypes.rollout 'augmented' has no latent of its own to store, and context is "
                "1; use --agent.context 0 or --agent.prototypes.rollout clean"
            )


@dataclass(frozen=True, kw_only=True)
class ContrastConfig(V3Config):
    """DreamerV3 (2025) that contrasts states with embeddings instead of decoding them."""

    name: str = "infonce"
    """Which agent; set by the preset."""
    evaluation: Literal["sample", "greedy"] = "greedy"
    """How the paper's evaluation acts."""
    objective_scale: float = 1.0
    """Weight of the representation's loss."""


@dataclass(frozen=True, kw_only=True)
class R2Config(ContrastConfig):
    """R2-Dreamer: redundancy reduction (Barlow Twins) instead of reconstruction."""

    name: str = "r2"
    """Which agent; set by the preset."""
    objective_scale: float = 0.05
    """Weight of the representation's loss."""
    redundancy: float = 5e-4
    """Weight of the correlation between different numbers of prediction and embedding."""
