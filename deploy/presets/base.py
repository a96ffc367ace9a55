"""What a preset is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One named configuration: an agent, its published size, and what differs from the defaults."""

    summary: str
    """What it is, and where its numbers come from."""
    agent: str
    """Key of the agent registry."""
    size: str
    """Published size that sets all widths."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """Dotted field of `TrainConfig` → value."""
