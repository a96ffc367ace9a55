"""Budgets of bytes that say when they run out, and which option would change that."""

from __future__ import annotations

import logging

log = logging.getLogger(__name__)

WARN_SHARE = 0.80
ERROR_SHARE = 0.95
_CALM_SHARE = 0.75


class ByteBudget:
    """Watches how much of a budget is used.

    It warns once at 80 % and logs an error once at 95 %, and again only after it was below 75 %.

    Args:
        name: of what is watched, for messages.
        advice: what to do, naming the option to change.
    """

    def __init__(self, name: str, advice: str) -> None:
        self.share = 0.0
        self._name, self._advice = name, advice
        self._said = 0.0

    def watch(self, used_bytes: int, limit_bytes: int) -> float:
        """Take a reading and return the share that is used; a limit of 0 is none."""
        self.share = share = used_bytes / limit_bytes if limit_bytes else 0.0
        if share < _CALM_SHARE:
            self._said = 0.0
        for level, say in ((ERROR_SHARE, log.error), (WARN_SHARE, log.warning)):
            if share >= level:
                if self._said < level:
                    say(
                        "byte_budget name=%s used=%d limit=%d share=%.0f%% advice=%s",
                        self._name,
                        used_bytes,
                        limit_bytes,
                        100 * share,
                        self._advice,
                    )
                    self._said = level
                break
        return share
