"""What every number of an agent's configuration may be: one table, by the name of the field.

A name means the same in every class, so that one entry serves all of them; what two fields must be
together, and narrower limits of one class, are checked in the class.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple


class Range(NamedTuple):
    """Numbers that a field may have; never NaN or infinite."""

    least: float
    most: float
    open_at: str = ""
    """Which ends are left out: ``[``, ``]``, both or none."""

    def holds(self, value: float) -> bool:
        """Return whether the value is a number in this range."""
        above = value > self.least if "[" in self.open_at else value >= self.least
        below = value < self.most if "]" in self.open_at else value <= self.most
        return above and below and math.isfinite(value)

    def __str__(self) -> str:
        if self.most < math.inf:
            first = "(" if "[" in self.open_at else "["
            last = ")" if "]" in self.open_at else "]"
            return f"in {first}{self.least:g}, {self.most:g}{last}"
        return f"{'>' if '[' in self.open_at else '>='} {self.least:g}"


COUNT, NONE_OR_MORE = Range(1, math.inf), Range(0, math.inf)
POSITIVE, SHARE = Range(0, math.inf, "["), Range(0, 1)
NOT_ALL, NOT_NONE, INSIDE = Range(0, 1, "]"), Range(0, 1, "["), Range(0, 1, "[]")

_BY_RANGE = {
    # Widths, layers, steps and updates
    COUNT: "deter hidden stoch blocks depth mults kernel units bins imag_horizon vector_units "
    "count size iterations slow_every layers post_layers vector_layers reward_layers cont_layers "
    "critic_layers actor_layers",
    Range(2, math.inf): "horizon",
    NONE_OR_MORE: "classes prior_layers context warmup freeze half_life_updates "
    # Weights and amounts, of which there may be none
    "outscale entropy slow_regulariser rec rew con dyn rep policy value repval noise floor "
    "free_nats rec_scale cont_scale kl_scale reward_scale dyn_scale rep_scale norm_scale "
    "objective_scale redundancy shift",
    # What is divided by, and what would stop all learning at 0
    POSITIVE: "min_std max_std return_limit lr model_lr actor_lr critic_lr eps behaviour_eps agc "
    "agc_floor model_clip behaviour_clip temperature",
    Range(1, math.inf, "["): "discount_horizon",
    # Shares
    SHARE: "lambda_ return_low return_high epsilon mix kl_balance",
    NOT_ALL: "unimix actor_unimix beta1 beta2 decay",
    NOT_NONE: "slow_rate return_rate ema_rate",
    INSIDE: "discount",
}
RANGES: dict[str, Range] = {
    name: allowed for allowed, names in _BY_RANGE.items() for name in names.split()
}


def require_ranges(config: Any, prefix: str) -> None:
    """Check every number of a configuration, those of its parts too.

    Raises:
        ValueError: one line that names each flag, what it may be, and what was given.
    """
    if wrong := list(_outside(config, prefix)):
        raise ValueError("; ".join(wrong))


def _outside(config: Any, prefix: str) -> Iterator[str]:
    for item in fields(config):
        value, name = getattr(config, item.name), f"{prefix}.{item.name}"
        if is_dataclass(value):
            yield from _outside(value, name)
        elif item.name in RANGES and is_number(value):
            values = value if isinstance(value, tuple) else (value,)
            allowed = RANGES[item.name]
            if not values or not all(map(allowed.holds, values)):
                flag = name.rstrip("_").replace("_", "-") + "_" * name.endswith("_")
                yield f"--{flag} must be {allowed}, got {value}"


def is_number(value: object) -> bool:
    """Whether a field holds a number, or several."""
    return isinstance(value, int | float | tuple) and not isinstance(value, bool)
