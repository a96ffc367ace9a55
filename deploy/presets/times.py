"""How long a run's updates take, where an update like them has been measured.

Every measurement is one of docs/results.md and names its words there, so that a test can compare.
What has not been measured has no row, and gets no number: widths do not scale in a simple way.
"""

from __future__ import annotations

from dataclasses import dataclass

from deploy.config import TrainConfig

CPU = "two CPU cores"
GPU = "an H200"
VECTORS = 0
"""Side in pixels of what an agent sees that gets no image."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The time of one update on one machine, with what it was measured for."""

    machine: str
    """Where; docs/results.md says more about it."""
    agents: tuple[str, ...]
    """Keys of the agent registry."""
    size: str
    """Published size."""
    side: int
    """Side in pixels of the images, or `VECTORS`."""
    batch: int
    """Replayed steps of the update, B·T."""
    ms: float
    """Milliseconds."""
    at_most: bool = False
    """Whether it took less: the machine had other work, or waited for environments."""
    section: str
    """Heading in docs/results.md."""
    words: tuple[str, ...]
    """What stands there, with all the numbers that the milliseconds come from."""


_GPU_TABLE = "Milliseconds per update on a GPU"
_CPU_TABLE = "Milliseconds per update on the CPU"
_FIRST_MINUTES = "First minutes on a GPU"
# Seven runs shared one GPU, and drew their own environments.
_RATES = ("Seven trainings at once on that one H200", "9 to 11 updates/s each")

MEASURED = (
    Measured(
        machine=GPU, agents=("v3",), size="1m", side=VECTORS, batch=16 * 64, ms=9.5,
        section=_GPU_TABLE, words=("| 24 numbers | 1m | 465 | 316 | **9.5** |",),
    ),
    Measured(
        machine=GPU, agents=("v3",), size="1m", side=64, batch=16 * 64, ms=16.3,
        section=_GPU_TABLE, words=("| 64×64×3 | 1m | 500 | 242 | **16.3** |",),
    ),
    Measured(
        machine=GPU, agents=("v3",), size="12m", side=64, batch=16 * 64, ms=20.5,
        section=_GPU_TABLE, words=("| 64×64×3 | 12m | 422 | 218 | **20.5** |",),
    ),
    Measured(
        machine=GPU, agents=("v3",), size="50m", side=64, batch=16 * 64, ms=32.8,
        section=_GPU_TABLE, words=("| 64×64×3 | 50m | 529 | 290 | **32.8** |",),
    ),
    Measured(
        machine=GPU, agents=("v1",), size="dmc", side=64, batch=50 * 50, ms=1000 / 9, at_most=True,
        section=_FIRST_MINUTES, words=(*_RATES, "`v1-dmc-vision`"),
    ),
    Measured(
        machine=GPU, agents=("v2",), size="dmc", side=64, batch=16 * 50, ms=1000 / 9, at_most=True,
        section=_FIRST_MINUTES, words=(*_RATES, "--preset v2-dmc-vision --device cuda`"),
    ),
    Measured(
        machine=GPU, agents=("v3-2023",), size="s", side=64, batch=16 * 64, ms=1000 / 9,
        at_most=True, section=_FIRST_MINUTES, words=(*_RATES, "`v3-2023-dmc-vision`"),
    ),
    Measured(
        machine=GPU, agents=("pro",), size="dmc", side=64, batch=50 * 51, ms=1000 / 9, at_most=True,
        section=_FIRST_MINUTES, words=(*_RATES, "`pro-dmc-vision` on cheetah-run"),
    ),
    Measured(
        machine=CPU, agents=("v3",), size="1m", side=VECTORS, batch=16 * 64, ms=434,
        section=_CPU_TABLE, words=("| 24 numbers | 1m | compile | 434 ",),
    ),
    Measured(
        machine=CPU, agents=("v3",), size="1m", side=64, batch=16 * 64, ms=1316,
        section=_CPU_TABLE, words=("| 64×64×3 | 1m | eager | 1,316 |",),
    ),
    Measured(
        machine=CPU, agents=("v3",), size="12m", side=64, batch=16 * 64, ms=7601,
        section=_CPU_TABLE, words=("| 64×64×3 | 12m | eager | 7,601 |",),
    ),
    Measured(
        machine=CPU, agents=("v3",), size="tiny", side=VECTORS, batch=16 * 32, ms=210,
        section="CartPole-v1", words=("4.5 to 4.9 updates/s, 210 ms for one",),
    ),
    Measured(
        machine=CPU, agents=("v1", "v2", "v3-2023"), size="tiny", side=VECTORS, batch=16 * 32,
        ms=25 * 60_000 / 2731, at_most=True,
        section="DeepMind Control within minutes: the `…-balance` presets",
        words=("15 to 25 minutes on a machine that others used too", "what 2,731 updates are"),
    ),
    Measured(
        machine=CPU, agents=("pro",), size="tiny", side=64, batch=8 * 16, ms=12 * 60_000 / 2744,
        at_most=True, section="DreamerPro from pixels: an empty room",
        words=("2,744 updates, 10 to 12 minutes",),
    ),
)  # fmt: skip


def expected_time(config: TrainConfig) -> str:
    """Return in words how long the updates of a run take, on every machine that is known."""
    times = []
    for found in MEASURED:
        if not _alike(found, config):
            continue
        ratio = config.learner.batch_size * config.learner.batch_length / found.batch
        if found.machine == GPU:
            # The kernels of a smaller batch are as many, and take about as long to start.
            ratio = max(1.0, ratio)
        seconds = config.target_updates * found.ms * ratio / 1000
        about = "at most" if found.at_most else "about"
        times.append(f"{about} {in_words(seconds)} on {found.machine}")
    return ", ".join(times) or "time not measured"


def image_side(config: TrainConfig) -> int:
    """Return the side in pixels of the images that the agent sees, as far as a preset can know."""
    shown = config.environment
    dmc = config.env.startswith("dmc:") and shown.obs in ("image", "both")
    image = dmc or config.env.startswith(("ale:", "crafter:", "minigrid:"))
    return shown.image_size if image else VECTORS


def in_words(seconds: float) -> str:
    """Return a time with two digits that matter, in minutes, hours or days."""
    minutes = seconds / 60
    for unit, length, most in (("minutes", 1, 90), ("hours", 60, 48 * 60)):
        if minutes < most:
            return f"{float(f'{minutes / length:.2g}'):g} {unit}"
    return f"{float(f'{minutes / 1440:.2g}'):,g} days"


def _alike(found: Measured, config: TrainConfig) -> bool:
    """Return whether an update of the run is like the measured one but for its batch."""
    # On GPUs bfloat16 was measured.
    other = found.machine == GPU and config.learner.precision == "fp32"
    return (
        config.agent.name in found.agents
        and (config.size, image_side(config)) == (found.size, found.side)
        and not other
    )
