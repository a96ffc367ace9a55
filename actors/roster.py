"""Names in a Ray cluster by which what outlives a learner is found again."""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util import list_named_actors

from actors.hub import WeightHub
from actors.weights import HubSource

log = logging.getLogger(__name__)

HUB = "hub"
NAMESPACE_PREFIX = "dreamfleet-"
_GONE_S = 30.0


@dataclass(frozen=True, kw_only=True)
class Member:
    """One actor that lives."""

    slot: int
    life: int
    handle: Any


@dataclass(frozen=True, kw_only=True)
class Roster:
    """The names of one fleet. They lie in a namespace that belongs to one run alone."""

    namespace: str
    """Namespace of Ray, see `namespace_of`."""
    split: str
    """Which fleet of the run: train or eval."""

    @property
    def host(self) -> str:
        """Name of the actor that supervises the fleet."""
        return f"fleet-{self.split}"

    def options(self, slot: int, life: int) -> dict[str, Any]:
        """Return Ray's options for a new actor: it outlives whoever starts it, and has a name.

        No two actors ever have the same name: that of one that has just died may still be taken.
        """
        name = f"{self.split}-{slot}-{life}-{secrets.token_hex(4)}"
        return {"name": name, "namespace": self.namespace, "lifetime": "detached"}

    def living(self) -> dict[int, Member]:
        """Return who lives, by slot; of two in the same slot the older one is ended."""
        found: dict[int, Member] = {}
        for name in names_in(self.namespace):
            match = re.fullmatch(rf"{self.split}-(\d+)-(\d+)-[0-9a-f]+", name)
            handle = find(name, self.namespace) if match else None
            if match is None or handle is None:
                continue
            member = Member(slot=int(match[1]), life=int(match[2]), handle=handle)
            other = found.get(member.slot)
            if other is not None:
                older, member = sorted((other, member), key=lambda one: one.life)
                ray.kill(older.handle, no_restart=True)
            found[member.slot] = member
        return found

    def end(self) -> None:
        """End everything of this fleet at once, the supervising actor first."""
        end_named(self.host, self.namespace)
        for member in self.living().values():
            ray.kill(member.handle, no_restart=True)


def namespace_of(run_id: str) -> str:
    """Return the namespace of a run, which no other run has."""
    return NAMESPACE_PREFIX + run_id


def names_in(namespace: str) -> list[str]:
    """Return the names of the living actors of a namespace, sorted."""
    listed: list[dict[str, str]] = list_named_actors(all_namespaces=True)  # type: ignore[assignment]
    return sorted(entry["name"] for entry in listed if entry["namespace"] == namespace)


def find(name: str, namespace: str) -> Any:
    """Return the handle of a named actor, None if there is none."""
    try:
        return ray.get_actor(name, namespace)
    except ValueError:
        return None


def end_named(name: str, namespace: str) -> bool:
    """End a named actor, and wait until its name is free. Returns whether there was one.

    Raises:
        TimeoutError: if Ray does not end it.
    """
    handle = find(name, namespace)
    if handle is None:
        return False
    ray.kill(handle, no_restart=True)
    deadline = time.monotonic() + _GONE_S
    # Ray tells nobody when a name has become free.
    while name in names_in(namespace):
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"Ray has not ended the actor {name!r} of {namespace} within {_GONE_S:.0f} s: "
                "`ray list actors` shows its state"
            )
        time.sleep(0.05)
    return True


def standing_hub(
    namespace: str, directory: str, resources: Mapping[str, float], idle_s: float
) -> Any:
    """Return the hub of a run: the one that lives, else a new one that outlives this process.

    A hub that does not answer, for its node is gone, is replaced; actors look the new one up.

    Args:
        namespace: of the run.
        directory: folder for the newest weights, on the node with the resources.
        resources: what that node offers.
        idle_s: time without a caller after which the hub ends by itself.
    """
    hub = find(HUB, namespace)
    if hub is not None:
        try:
            stats = ray.get(hub.stats.remote(), timeout=_GONE_S)
            log.info("hub_taken_over version=%s", stats["version"])
            return hub
        except RayError as error:
            log.warning("hub_replaced error=%s", error)
            end_named(HUB, namespace)
    return (
        ray.remote(WeightHub)
        .options(
            name=HUB,
            namespace=namespace,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            resources=dict(resources),
            max_restarts=-1,
            max_concurrency=10_000,
        )
        .remote(directory, idle_s=idle_s)
    )


def hub_source(namespace: str) -> HubSource:
    """Return the weights of a run's hub, whichever it is at the time."""
    return HubSource(find=partial(ray.get_actor, HUB, namespace))
