"""Replay servers that join a training which goes on: the order for it, and what is done then.

The order is a file in the run directory, as that of `deploy.scale`; the training answers with
another.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import threading
import time
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.config import FILE_NAME, ConfigError, TrainConfig, amend_config, load_config
from deploy.servers import make_reseeder, note_joined, owner_of, servers_of
from deploy.status import read_status
from replay_service import (
    Limits,
    ReplayClient,
    ReplayError,
    ReplayTimeout,
    Reseeder,
    Schema,
    ShardedClient,
    ShardedReseeder,
    address_for,
    fit_to_server,
    prepare_shard,
    split_addresses,
)

if TYPE_CHECKING:
    from deploy.crew import Crew
    from learner.learner import Learner

log = logging.getLogger(__name__)

ORDER_FILE = "join.json"
TAKE_S = 300.0
"""Time in which the learner must have come between two updates; compiling one takes minutes."""
_TAKEN_S = 30.0
"""Time in which a training that runs must have taken the order."""
_LOOK_S = 0.2


class Joining:
    """Takes further replay servers into a run that goes on.

    Guarantees:
        1. A server that cannot join, for whatever reason, changes nothing but itself, and whoever
           has asked is told why.
        2. Nothing is inserted at a server before the run directory names it (`with_joined`):
           whatever ends the run meanwhile, continuing it finds everything.
        3. Training goes on. Of the learner's thread it takes one or two calls to a server.

    Args:
        config: what the run was started with.
        run: its directory.
        url: addresses of its servers, without the word for an embedded one.
        schema, limits: of the replay; the limits are those of all servers.
        learner, crew: of the run.
        closed_later: takes clients, which the mirror needs until it is stopped.
    """

    def __init__(
        self,
        config: TrainConfig,
        run: Path,
        url: str,
        schema: Schema,
        limits: Limits,
        learner: Learner,
        crew: Crew,
        closed_later: ExitStack,
    ) -> None:
        self._config, self._run, self._schema, self._limits = config, run, schema, limits
        self._learner, self._crew, self._closed_later = learner, crew, closed_later
        self._names, self._urls = list(config.addresses), list(split_addresses(url))
        self._thread: threading.Thread | None = None

    def heed(self) -> None:
        """Begin to do what the last order asks for, if there is a new one. Returns at once."""
        path = self._run / ORDER_FILE
        if self._thread is not None and self._thread.is_alive():
            return
        try:
            order = json.loads(path.read_bytes())
            name, redis = str(order["id"]), str(order["redis"])
            answer = _answer_file(self._run, name)
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("join_refused order=%s error=%r", path, error)
            path.unlink(missing_ok=True)
            return
        path.unlink(missing_ok=True)
        self._thread = threading.Thread(
            target=self._obey, args=(redis, answer), name="join", daemon=True
        )
        self._thread.start()

    def _obey(self, redis: str, answer: Path) -> None:
        from learner.files import write_atomically

        said = {"error": "", "url": ""}
        try:
            self.join(redis)
            said["url"] = ",".join(self._urls)
        except (ReplayError, ConfigError, OSError) as error:
            log.warning("join_refused error=%s", error)
            said["error"] = " ".join(str(error).split())
        except Exception as error:
            # Whoever waits for the answer would otherwise never learn of it.
            said["error"] = f"a fault of dreamfleet: {error!r}"
            raise
        finally:
            write_atomically(answer, json.dumps(said).encode())

    def join(self, redis: str) -> None:
        """Let the run have all these servers. Blocks until they take part.

        Args:
            redis: addresses of all, those that it has and others.

        Raises:
            ConfigError, ReplayError: one cannot join, and why; none has then.
        """
        names = wanted(replace(self._config, redis=",".join(self._names)), redis)
        fresh = [name for name in names if name not in self._names]
        if fresh:
            self._take(fresh)
            self._names += fresh
            self._urls += fresh
            log.warning("shards_joined servers=%d added=%s", len(self._names), ", ".join(fresh))
        self._remember()
        self._crew.redirect(",".join(self._urls))

    def _remember(self) -> None:
        known = self._config.addresses
        try:
            note_joined(self._run, [name for name in self._names if name not in known])
            amend_config(self._run / FILE_NAME, redis=",".join(self._names))
        except OSError as error:
            raise ConfigError(
                f"the servers take part, but {self._run} cannot be written ({error}), so they get "
                "no actors yet: mend that and repeat the command"
            ) from error

    def _take(self, addresses: Sequence[str]) -> None:
        """Prepare servers beside the training, and have the learner take them in."""
        learner, there = self._learner, servers_of(self._learner.client)
        limiter = learner.limiter.over(len(there) + len(addresses))
        newcomers = [
            ReplayClient(
                address_for(address, self._config.replay, "learner"), owner=owner_of(self._run)
            )
            for address in addresses
        ]
        try:
            found, reseeders = [], []
            for at, newcomer in enumerate(newcomers):
                before = [*there, *newcomers[:at]]
                limits = fit_to_server(newcomer, self._schema, self._limits)
                found.append(
                    prepare_shard(newcomer, before, self._schema, limits, fence=learner.fence)
                )
                reseeders.append(
                    make_reseeder(
                        self._config,
                        newcomer,
                        addresses[at],
                        len(before),
                        learner,
                        each_of(limits),
                    )
                )
            asked = learner.between.ask(
                partial(self._share, list(zip(newcomers, found, strict=True)), reseeders, limiter)
            )
            _await(asked)
        except BaseException:
            for newcomer in newcomers:
                newcomer.close()
            raise

    def _share(
        self,
        newcomers: Sequence[tuple[ReplayClient, Any]],
        reseeders: Sequence[Reseeder],
        limiter: Any,
    ) -> None:
        """Let the servers take part, in the learner's thread between two updates.

        Whatever can fail comes first, and is undone.
        """
        learner = self._learner
        client, looked_after = learner.client, learner.reseeder
        if isinstance(client, ShardedClient):
            sharded = client
            learner.mirror.follow([newcomer for newcomer, _ in newcomers])
        else:
            sharded = ShardedClient.of_one(
                client,
                self._schema,
                self._limits,
                chunk_steps=self._config.replay.chunk_steps,
                total=learner.budget(),
            )
            try:
                learner.mirror.follow([newcomer for newcomer, _ in newcomers])
            except ReplayError:
                with suppress(ReplayError):
                    client.create(self._schema, self._limits)
                raise
            self._closed_later.callback(sharded.close)
        for newcomer, stats in newcomers:
            sharded.join(newcomer, stats)
        if isinstance(looked_after, Reseeder):
            looked_after.limits = each_of(self._limits)
            looked_after = ShardedReseeder(sharded, [looked_after])
        assert looked_after is not None, "every run is looked after"
        for one in reseeders:
            looked_after.join(one)
        learner.share_replay(sharded, limiter, looked_after)


def wanted(config: TrainConfig, redis: str) -> list[str]:
    """Return the servers that a run has, and then those that are to join it.

    Args:
        config: of the run as it is.
        redis: addresses of all.

    Raises:
        ConfigError: no addresses, a run that cannot have several, or one of its own is left out.
    """
    names = replace(config, redis=redis).addresses
    gone = [name for name in config.addresses if name not in names]
    if gone:
        fresh = [name for name in names if name not in config.addresses]
        raise ConfigError(
            f"{', '.join(gone)} cannot leave a training that goes on, only join it: give --redis "
            f"{','.join([*config.addresses, *fresh])}; to leave a server out, stop the training "
            "and continue it with the others"
        )
    return [*config.addresses, *(name for name in names if name not in config.addresses)]


def order_servers(run: Path, redis: str) -> list[str]:
    """Have a training that runs take further servers in; return the addresses that it has then.

    Blocks until it has answered.

    Raises:
        ConfigError: it does not take the order, or a server cannot join; the message says why.
    """
    from learner.files import write_atomically

    wanted(load_config(run / FILE_NAME), redis)
    name, order = secrets.token_hex(8), run / ORDER_FILE
    answer = _answer_file(run, name)
    write_atomically(order, json.dumps({"id": name, "redis": redis}).encode())
    pause, begin = threading.Event(), time.monotonic()
    try:
        while True:
            alive = read_status(run)["alive"]
            if answer.exists():
                break
            if not alive:
                raise ConfigError(
                    f"the training in {run} has ended before it answered: dreamfleet train "
                    f"--run-dir {run} --redis {redis} continues it so"
                )
            waited_s = time.monotonic() - begin
            if waited_s > (_TAKEN_S if order.exists() else _TAKEN_S + TAKE_S):
                raise ConfigError(
                    f"the training in {run} has not answered within {waited_s:.0f} s: see "
                    "`dreamfleet status`, and whether both use the same file system"
                )
            pause.wait(_LOOK_S)
        said = json.loads(answer.read_text())
    finally:
        order.unlink(missing_ok=True)
        answer.unlink(missing_ok=True)
    if said["error"]:
        raise ConfigError(said["error"])
    return list(split_addresses(said["url"]))


def _answer_file(run: Path, name: str) -> Path:
    if not re.fullmatch("[0-9a-f]{16}", name):
        raise ValueError(f"{name[:40]!r} is no name of an order")
    return run / f"joined-{name}.json"


def each_of(limits: Limits) -> Limits:
    """Return what each of several servers enforces, where the limits are those of all."""
    return replace(limits, min_size_steps=0, budget_steps=0)


def _await(asked: Future[None]) -> None:
    try:
        asked.result(TAKE_S)
    except CancelledError:
        raise ReplayTimeout("the training has ended meanwhile: continue it with --redis") from None
    except TimeoutError:
        if not asked.cancel():
            asked.result()  # it is being done
            return
        raise ReplayTimeout(
            f"the learner has not come to the end of an update within {TAKE_S:.0f} s: try again"
        ) from None
