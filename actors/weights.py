"""Fresh weights for a policy, fetched aside and swapped in between two steps."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import ray
from ray.exceptions import RayError

from dreamer.weights import PackedWeights, Version, WeightsError

log = logging.getLogger(__name__)

NEVER: Version = (-1, -1)
_FIRST_DELAY_S = 0.25
_LONGEST_DELAY_S = 10.0


class LoadsWeights(Protocol):
    """The part of a policy that takes weights."""

    version: Version

    def load(self, weights: PackedWeights) -> None:
        """Swap in weights, all or none; raises WeightsError and keeps the old ones."""
        ...


class WeightSource(Protocol):
    """Where newer weights come from."""

    def fetch(self, newer_than: Version, timeout_s: float) -> PackedWeights | None:
        """Block until there are newer weights, at most about `timeout_s`; None if there are none.

        Raises:
            WeightSourceError: if the source cannot be reached now.
        """
        ...


class WeightSourceError(RuntimeError):
    """Weights cannot be fetched now; trying again later may help."""


class HubSource:
    """Weights of a `WeightHub`.

    Args:
        hub: its handle; None looks it up first.
        grace_s: time beyond the long poll in which the hub must have answered.
        find: returns the handle of the hub there is now, and raises ValueError if there is none.
            Called again after each failure: another hub may have taken the place of the first.
    """

    def __init__(
        self, hub: Any = None, grace_s: float = 15.0, find: Callable[[], Any] | None = None
    ) -> None:
        assert hub is not None or find is not None, "a hub, or a way to find it"
        self._hub, self._grace_s, self._find = hub, grace_s, find

    def fetch(self, newer_than: Version, timeout_s: float) -> PackedWeights | None:
        """Long-poll the hub; see `WeightSource`."""
        try:
            if self._hub is None and self._find is not None:
                self._hub = self._find()
            answer = self._hub.wait_newer.remote(newer_than, timeout_s)
            found = ray.get(answer, timeout=timeout_s + self._grace_s)
            if found is None:
                return None
            buffer, manifest = ray.get(found[0], timeout=self._grace_s)
        except (RayError, ValueError) as error:
            if self._find is not None:
                self._hub = None
            raise WeightSourceError(f"the weight hub does not answer: {error}") from error
        return PackedWeights(buffer=buffer, manifest=manifest)


@dataclass
class RefreshStats:
    """What refreshing has done so far."""

    applied: int = 0
    """Versions that were swapped in."""
    rejected: int = 0
    """Versions that were damaged or did not fit."""
    failures: int = 0
    """Requests that the source did not answer."""
    apply_s: float = 0.0
    """Seconds that the newest swap took, between two steps."""


class Refresher:
    """Keep a policy up to date without ever making a step wait.

    Guarantees:
        1. One request is under way at any time, in a thread of its own.
        2. `refresh` never waits: it swaps in what has arrived, or does nothing.
        3. The version only goes up in (fence, update); weights that fail verification are counted
           and the policy keeps what it has.

    Args:
        source: where weights come from.
        poll_s: how long one request may wait at the source.
    """

    def __init__(self, source: WeightSource, *, poll_s: float = 20.0) -> None:
        self.stats = RefreshStats()
        self.version = NEVER
        self.last_error = ""
        self._source, self._poll_s = source, poll_s
        self._seen = NEVER
        self._waiting: PackedWeights | None = None
        self._refreshed_at = time.monotonic()
        self._changed = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="weights", daemon=True)
        self._thread.start()

    @property
    def age_s(self) -> float:
        """Seconds since the policy last got newer weights (before the first: since the start)."""
        return time.monotonic() - self._refreshed_at

    def refresh(self, policy: LoadsWeights) -> bool:
        """Swap in the newest weights that have arrived; returns whether there were any."""
        if self._waiting is None:
            return False
        with self._changed:
            weights, self._waiting = self._waiting, None
        if weights is None or weights.version <= self.version:
            return False
        begin = time.monotonic()
        try:
            policy.load(weights)
        except WeightsError as error:
            self.stats.rejected += 1
            self.last_error = str(error)
            log.warning("weights_not_loaded version=%s error=%s", weights.version, error)
            return False
        if weights.version[0] != self.version[0]:
            log.info("weights_lineage old=%s new=%s", self.version, weights.version)
        self.version, self._refreshed_at = weights.version, time.monotonic()
        self.stats.applied += 1
        self.stats.apply_s = self._refreshed_at - begin
        return True

    def wait(self, version: Version, timeout_s: float) -> bool:
        """Block until weights at or above `version` are loaded or ready for `refresh`.

        Returns:
            Whether they are, within the timeout and before `stop`.
        """

        def there() -> bool:
            waiting = self._waiting
            return self.version >= version or (waiting is not None and waiting.version >= version)

        with self._changed:
            self._changed.wait_for(lambda: there() or self._stopped, timeout_s)
            return there()

    def stop(self) -> None:
        """Ask for no more weights; a request that is under way is left to end by itself."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _run(self) -> None:
        delay_s = _FIRST_DELAY_S
        while not self._stopped:
            try:
                weights = self._source.fetch(self._seen, self._poll_s)
            except WeightSourceError as error:
                self.stats.failures += 1
                log.warning("weights_source_away delay_s=%.1f error=%s", delay_s, error)
                self._pause(delay_s)
                delay_s = min(delay_s * 2, _LONGEST_DELAY_S)
                continue
            delay_s = _FIRST_DELAY_S
            if weights is not None and weights.version > self._seen:
                # Verified and unpacked here, so that the acting thread only has to swap. What is
                # wrong with damaged ones is said there, where they are counted.
                with suppress(WeightsError):
                    _ = weights.tensors
                self._keep(weights)

    def _keep(self, weights: PackedWeights) -> None:
        with self._changed:
            self._waiting, self._seen = weights, weights.version
            self._changed.notify_all()

    def _pause(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._stopped, seconds)
