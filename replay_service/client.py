"""Calls to one replay server: typed replies, typed errors, and a deadline on every call."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Sequence
from importlib import resources
from typing import Any, Literal, NamedTuple

import redis
from redis.backoff import NoBackoff
from redis.connection import PythonRespSerializer
from redis.retry import Retry

from replay_service.chunk import max_blob_bytes
from replay_service.config import Limits
from replay_service.counters import ReplayStats, highest_incarnation
from replay_service.entries import LogEntry, parse_entry
from replay_service.errors import (
    ReplayConfigError,
    ReplayFenced,
    ReplayMissing,
    ReplayOwned,
    ReplaySchemaError,
)
from replay_service.payloads import whole_payloads
from replay_service.schema import Schema
from replay_service.security import without_password
from replay_service.translate import translate

log = logging.getLogger(__name__)

LIBRARY = "dreamfleet_replay"
MIN_VERSION = (7, 0)
PAYLOAD_TTL_S = 600
INLINE_BYTES = 16 * 1024
"""Chunks up to this size travel inside the call that commits them; larger ones are sent before,
because a function copies its arguments."""
_QUARANTINE_ENTRIES = 100
_QUARANTINE_BYTES = 1024

InsertCode = Literal[
    "OK", "DUP", "GAP", "ODD", "WAIT", "SCHEMA", "TOOBIG", "NOPAYLOAD", "FENCED", "NONE"
]


class InsertReply(NamedTuple):
    """Answer to an insert: a code and its numbers (see `replay_insert` in functions.lua)."""

    code: InsertCode
    values: tuple[Any, ...]


class StreamEnd(NamedTuple):
    """Where a stream of a replay that was lost goes on."""

    name: str
    incarnation: int
    last_seq: int
    """Newest chunk that was there and will not be put back."""
    closed: bool
    """Whether no writer will continue it."""


class ReplayClient:
    """A connection pool to one replay server.

    Guarantees:
        1. Every call ends within about `timeout_s`, with a result or a `ReplayError`.
        2. Nothing is retried behind the caller's back; every mutating call can be repeated safely.
        3. Safe to use from several threads.
        4. No message or representation contains the password of the address.

    Args:
        url: ``unix:///path``, ``redis://host:port`` or ``rediss://…``.
        shard: number of the shard, part of every key.
        timeout_s: deadline of one call.
        owner: for whom `create` makes the replay: a word that nobody else has, and words that tell
            people who that is. Empty takes part in anybody's.

    Attributes:
        trouble, away, shards: empty and 0: of a single server only calls say what goes wrong, and
            whoever makes them tells people. A `ShardedClient` notes it.
    """

    def __init__(
        self, url: str, *, shard: int = 0, timeout_s: float = 5.0, owner: str = ""
    ) -> None:
        self.url, self.owner = url, owner
        self.trouble, self.away, self.shards = "", 0, list[dict[str, Any]]()
        self.shard = shard
        self.timeout_s = timeout_s
        self.address = without_password(url)
        self._redis = _connect(url, timeout_s, timeout_s)
        self._inserting = threading.Lock()
        self._kept: Any = None
        tag = f"{{rp{shard}}}"
        self._prefix = tag
        self._meta, self._log = f"{tag}:meta", f"{tag}:log"
        self._seq, self._dead = f"{tag}:seq", f"{tag}:dead"
        self._wake, self._sd = f"{tag}:wake", f"{tag}:sd"

    def __repr__(self) -> str:
        return f"ReplayClient({self.address!r}, shard={self.shard})"

    def close(self) -> None:
        """Close all connections."""
        self._redis.close()

    def check(self) -> str:
        """Check that a usable server answers, within the deadline, and return its version.

        Raises:
            ReplayAuthError, ReplayUnavailable, ReplayTimeout: as their names say.
            ReplayConfigError: if it is no Redis-protocol server, or too old a one.
        """
        info = self._server_info()
        version = str(info.get("redis_version", "0"))
        if tuple(int(part) for part in version.split(".")[:2]) < MIN_VERSION:
            raise ReplayConfigError(
                f"the server at {self.address} is version {version}; replay needs Redis 7.0 or "
                "newer, or any Valkey"
            )
        return version

    def server_id(self) -> str:
        """Return what tells this life of the server from every other server's, as `check` does."""
        return str(self._server_info().get("run_id", self.address))

    def _server_info(self) -> dict[str, Any]:
        # Connecting and the first answer may each stall: together they must keep the deadline.
        probe = _connect(self.url, self.timeout_s * 0.45, self.timeout_s * 0.45)
        try:
            info: dict[str, Any] = probe.info("server")
        except redis.exceptions.RedisError as error:
            raise translate(error, self.address) from error
        finally:
            probe.close()
        return info

    def create(
        self,
        schema: Schema,
        limits: Limits,
        *,
        token: str | None = None,
        incarnations_from: int = 0,
        take_over: bool = False,
    ) -> bool:
        """Create the replay, or update the limits of the one that exists.

        Args:
            schema: the columns; must equal those of an existing replay.
            limits: what the server enforces. Its budget only counts for a new replay.
            token: of whoever will put something back: a new replay takes nothing else until then.
            incarnations_from: lowest incarnation of streams that begin from now on.
            take_over: take a replay that has another owner, which then can no longer use it.

        Returns:
            Whether the replay is new.

        Raises:
            ReplayOwned: if the server holds the replay of another owner, naming it.
            ReplaySchemaError: if the server holds a replay with other columns, naming them.
            Others as in `check`.
        """
        self.check()
        self.load_library()
        reply = self._fcall(
            "replay_create",
            [self._meta],
            schema.hash.hex(),
            json.dumps(schema.to_dict()),
            limits.capacity_steps,
            limits.capacity_bytes,
            limits.min_size_steps,
            limits.budget_steps,
            limits.max_chunk_steps,
            max_blob_bytes(schema, limits.max_chunk_steps),
            incarnations_from,
            token or "",
            self.owner,
            "1" if take_over else "",
        )
        if reply[0] == b"OWNED":
            raise self._owned(reply[1].decode())
        if reply[0] == b"SCHEMA":
            raise self.schema_error(schema, reply[1])
        return bool(reply[1])

    def schema(self) -> Schema:
        """Read the schema of the replay on this server.

        Raises:
            ReplayUnavailable: if there is none.
        """
        text = self._command("HGET", self._meta, "schema_text")
        if text is None:
            raise self._missing()
        return Schema.from_dict(json.loads(text))

    def schema_error(self, schema: Schema, stored_text: bytes) -> ReplaySchemaError:
        """Build the error that names how `schema` differs from the one on the server."""
        stored = Schema.from_dict(json.loads(stored_text))
        return ReplaySchemaError(
            f"the replay at {self.address} holds other columns than this program: "
            f"{stored.difference(schema)}; use another run directory or server, or the "
            "configuration that the replay was made with"
        )

    def open_stream(self, stream: str, at_least: int = 0) -> int:
        """Return an incarnation of `stream` that no other writer has or will get."""
        reply = self._fcall("replay_open", [self._meta, self._seq], stream, at_least)
        return int(reply[1])

    def close_stream(self, sid: str, last_seq: int) -> None:
        """Say that no more chunks of this stream will come, so that it can be forgotten."""
        self._fcall("replay_close", [self._seq, self.payload_key(sid, last_seq)], sid)

    def insert(
        self,
        schema: Schema,
        sid: str,
        seq: int,
        steps: int,
        blob: bytes,
        *,
        send: bool = True,
        token: str | None = None,
        meanwhile: Callable[[], None] | None = None,
    ) -> InsertReply:
        """Insert one encoded chunk; repeating the call has no further effect.

        Args:
            schema: the columns it was encoded for.
            sid: stream with its incarnation.
            seq: number of the chunk within the stream, from 1.
            steps: records in it.
            blob: the encoded chunk.
            send: False to commit a payload that the server already has.
            token: given to `restore`, by whoever puts back what the server has lost.
            meanwhile: called once everything is sent, while the server works. It must not raise.

        Raises:
            ReplayFull: if the server is out of memory. Others as in `check`.
        """
        key = self.payload_key(sid, seq)
        keys = (self._meta, self._log, self._seq, key)
        arguments: list[str | bytes] = [schema.hash.hex(), sid, str(seq), str(steps)]
        arguments += [str(len(blob)), token or ""]
        call = ["FCALL", "replay_insert", len(keys), *keys, *arguments]
        if not send:
            commands: list[list[Any]] = [call]
        elif len(blob) <= INLINE_BYTES:
            commands = [[*call, blob]]
        else:
            # An existing payload is either this one or committed: neither may be replaced.
            commands = [["SET", key, blob, "EX", PAYLOAD_TTL_S, "NX"], call]
        code, *values = self._exchange(commands, meanwhile)
        return InsertReply(code.decode(), tuple(values))

    def _exchange(self, commands: list[list[Any]], meanwhile: Callable[[], None] | None) -> Any:
        """Run commands in one round trip over a connection that is kept; return the last reply.

        Lending a connection takes longer than inserting, and packing a chunk into one string with
        its command takes ten times as long as sending it: each copy is memory that the system has
        to clear first.
        """
        with self._inserting:
            try:
                if self._kept is None:
                    self._kept = self._redis.connection_pool.get_connection()
                elif not self._is_quiet():
                    self._kept.disconnect()
                pack: Any = PythonRespSerializer(INLINE_BYTES, self._kept.encoder.encode).pack
                self._kept.send_packed_command(
                    [part for words in commands for part in pack(*words)]
                )
                if meanwhile is not None:
                    meanwhile()
                replies = [self._reply() for _ in commands]
            except redis.exceptions.RedisError as error:
                self._hang_up()
                raise translate(error, self.address, "replay_insert") from error
            except BaseException:
                # A reply that nobody has read must not answer the next call.
                self._hang_up()
                raise
        for reply in replies:
            if isinstance(reply, redis.exceptions.ResponseError):
                raise translate(reply, self.address, "replay_insert") from reply
        return replies[-1]

    def _reply(self) -> Any:
        try:
            return self._kept.read_response()
        except redis.exceptions.ResponseError as error:
            return error

    def _is_quiet(self) -> bool:
        """Whether the kept connection is open; else the server has gone, and perhaps come back."""
        try:
            return not self._kept.can_read()
        except (redis.exceptions.RedisError, OSError):
            return False

    def _hang_up(self) -> None:
        if self._kept is not None:
            self._kept.disconnect()

    def restore(
        self,
        fence: int,
        token: str,
        *,
        inserted_steps: int,
        put_back_steps: int,
        replayed_steps: int,
        budget_steps: int,
        streams: Sequence[StreamEnd],
    ) -> list[int]:
        """Begin to put back what the server has lost; until `restored` nobody else may insert.

        The replay must have been created anew and hold nothing. Repeating the call, with the same
        token, changes nothing.

        Args:
            fence: of the learner.
            token: known to nobody else, for the inserts that follow.
            inserted_steps: total that had been inserted, and will have been again at the end.
            put_back_steps: of these, how many will be inserted; the others count as evicted.
            replayed_steps, budget_steps: as for `settle`.
            streams: after which chunks they go on.

        Returns:
            For each stream the last chunk that is there: where a repeated call continues.

        Raises:
            ReplayFenced: if a newer fence exists.
            ReplayConfigError: if others have inserted into the new replay already.
        """
        words = [word for end in streams for word in (*end[:3], "c" if end.closed else "")]
        reply = self._fcall(
            "replay_restore",
            [self._meta, self._seq],
            fence,
            token,
            inserted_steps,
            put_back_steps,
            replayed_steps,
            budget_steps,
            *words,
        )
        self._refuse(fence, reply)
        if reply[0] == b"BUSY":
            raise ReplayConfigError(
                f"the replay at {self.address} was created anew by somebody else and holds "
                f"{int(reply[1])} chunks: what was lost cannot be put back behind them; to have it "
                "back, empty the server and let the learner create the replay"
            )
        return [int(last) for last in reply[1:]]

    def restored(self, fence: int) -> int:
        """End what `restore` began, or a learner before this one; return the inserted steps.

        Raises:
            ReplayFenced: if a newer fence exists.
        """
        reply = self._fcall("replay_restored", [self._meta], fence)
        self._refuse(fence, reply)
        return int(reply[1])

    def _refuse(self, fence: int, reply: list[Any]) -> None:
        if reply[0] == b"FENCED":
            raise ReplayFenced(
                f"fence {fence} was replaced by {int(reply[1])}: another learner runs"
            )
        if reply[0] == b"NONE":
            raise self._missing()

    def acquire_fence(self, at_least: int = 0) -> int:
        """Return a number above every earlier one; older learners can no longer settle.

        Args:
            at_least: for a server that has forgotten the earlier ones.
        """
        reply = self._fcall("replay_fence", [self._meta], at_least)
        if reply[0] == b"NONE":
            raise self._missing()
        return int(reply[1])

    def settle(
        self, fence: int, replayed_steps: int, budget_steps: int, *, turn: int = 0
    ) -> tuple[int, int]:
        """Publish how much has been replayed, and how many inserts that pays for.

        Args:
            fence: from `acquire_fence`.
            replayed_steps: total since the start; smaller values than before are ignored.
            budget_steps: total of inserted steps that may be reached.
            turn: number of the call among those of this fence to this server, from 1; a call that
                arrives after one with a higher number changes nothing. 0 leaves that out.

        Returns:
            Inserted steps and size in steps, as the server counts them.

        Raises:
            ReplayFenced: if a newer fence exists.
        """
        keys = [self._meta, self._wake]
        reply = self._fcall("replay_settle", keys, fence, replayed_steps, budget_steps, turn)
        self._refuse(fence, reply)
        return int(reply[1]), int(reply[2])

    def wait_settlement(self, after: str, timeout_s: float) -> bool:
        """Block until a settlement newer than the id `after`, at most `timeout_s`; say whether."""
        wait_ms = max(int(min(timeout_s, self.timeout_s / 2) * 1000), 1)
        return bool(self._command("XREAD", "BLOCK", wait_ms, "STREAMS", self._wake, after))

    def highest_incarnation(self) -> int:
        """Return an incarnation that no stream of this server exceeds, 0 without a replay."""
        return highest_incarnation(self.counters())

    def stats(self) -> ReplayStats:
        """Read all counters at one instant."""
        values = self.counters()
        if not values:
            raise self._missing()
        return ReplayStats.of(values)

    def counters(self) -> dict[str, bytes]:
        """Return everything that the server keeps about the replay, {} without one."""
        flat = self._fcall("replay_stats", [self._meta])
        return dict(zip((key.decode() for key in flat[::2]), flat[1::2], strict=True))

    def register(self, process: str, live_ms: int, text: str) -> None:
        """Keep where a process serves metrics for `live_ms` of the server's time; 0 forgets it."""
        self._fcall("replay_register", [self._sd], process, live_ms, text)

    def endpoints(self) -> list[str]:
        """Return what the processes that are live have registered."""
        flat = self._fcall("replay_endpoints", [self._sd])
        return [text.decode() for text in flat[1::2]]

    def memory(self) -> tuple[int, int]:
        """Return the bytes that the server uses and its limit, 0 for none."""
        found = self._memory_info()
        return int(found["used_memory"]), int(found.get("maxmemory", 0))

    def memory_policy(self) -> str:
        """Return what the server does at its limit; ``noeviction`` if it does not say."""
        return str(self._memory_info().get("maxmemory_policy", "noeviction"))

    def _memory_info(self) -> dict[str, Any]:
        return dict(self._command("INFO", "memory"))

    def evict(self, size_steps: int, size_bytes: int, max_chunks: int = 1024) -> int:
        """Drop the oldest chunks until both sizes hold; works on a server without memory left.

        Returns:
            Steps that were dropped (at most `max_chunks` chunks per call).
        """
        keys = [self._meta, self._log, self._seq]
        return int(self._fcall("replay_evict", keys, size_steps, size_bytes, max_chunks)[2])

    def last_log_id(self) -> str | None:
        """Return the id of the newest log entry, or None for an empty log."""
        newest = self._command("XREVRANGE", self._log, "+", "-", "COUNT", 1)
        return str(newest[0][0].decode()) if newest else None

    def read_log(self, after: str, count: int, block_s: float) -> list[LogEntry]:
        """Read up to `count` entries that follow the id `after`.

        Blocks up to `block_s` while there are none, and then returns an empty list.
        """
        assert block_s < self.timeout_s, (block_s, self.timeout_s)
        wait_ms = max(int(block_s * 1000), 1)
        words = ("XREAD", "COUNT", count, "BLOCK", wait_ms, "STREAMS", self._log, after)
        reply = self._command(*words)
        rows = reply[0][1] if reply else []
        return [parse_entry(entry_id, fields, self._prefix) for entry_id, fields in rows]

    def fetch(self, entries: Sequence[LogEntry]) -> list[bytes | None]:
        """Return the chunks of these entries, None where it was evicted or the entry has a flaw.

        Of one that is larger than its entry says, no more than the first byte too many is read.
        """
        sound = [entry for entry in entries if not entry.flaw]
        try:
            found = whole_payloads(self._redis, sound) if sound else {}
        except redis.exceptions.RedisError as error:
            raise translate(error, self.address) from error
        # The server copies a part, which takes three times as long as a whole chunk.
        rest = [entry for entry in sound if entry.key not in found]
        calls = [("GETRANGE", entry.key, 0, entry.size_bytes) for entry in rest]
        parts = self._together(calls) if calls else []
        found |= {entry.key: part for entry, part in zip(rest, parts, strict=True)}
        return [found.get(entry.key) or None for entry in entries]

    def quarantine(self, entry: LogEntry, blob: bytes, reason: str) -> None:
        """Keep the beginning of a rejected chunk, and the reason, for later inspection."""
        fields = {
            "s": entry.sid,
            "q": entry.seq,
            "reason": reason,
            "head": blob[:_QUARANTINE_BYTES],
        }
        words = [word for pair in fields.items() for word in pair]
        self._command("XADD", self._dead, "MAXLEN", "~", _QUARANTINE_ENTRIES, "*", *words)

    def payload_key(self, sid: str, seq: int) -> str:
        """Return the key under which the server keeps a chunk."""
        return f"{self._prefix}:c:{sid}:{seq}"

    def library(self) -> Literal["same", "other", "none"]:
        """Say whether the server has the function library of this program, another one or none."""
        known = _leaves(self._command("FUNCTION", "LIST", "LIBRARYNAME", LIBRARY, "WITHCODE"))
        if not known:
            return "none"
        return "same" if _library_code().encode() in known else "other"

    def load_library(self) -> None:
        """Load the function library, unless the server has this very one."""
        # Loading again would needlessly look like a restart of the server to every stream.
        if self.library() != "same":
            self._command("FUNCTION", "LOAD", "REPLACE", _library_code())

    def _fcall(self, name: str, keys: list[str], *arguments: int | str | bytes) -> Any:
        return self._command("FCALL", name, len(keys), *keys, *arguments)

    def _command(self, *words: Any) -> Any:
        try:
            return self._redis.execute_command(*words)  # type: ignore[no-untyped-call]
        except redis.exceptions.RedisError as error:
            function = words[1] if words[0] == "FCALL" else ""
            raise translate(error, self.address, function) from error

    def _together(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Send several commands at once and return their replies."""
        pipe = self._redis.pipeline(transaction=False)
        for words in commands:
            pipe.execute_command(*words)  # type: ignore[no-untyped-call]
        try:
            return list(pipe.execute())
        except redis.exceptions.RedisError as error:
            raise translate(error, self.address) from error

    def _owned(self, owner: str) -> ReplayOwned:
        return ReplayOwned(
            f"the replay at {self.address} belongs to another run, {owner.partition(' ')[2]}: give "
            "this run a server of its own (--redis), or empty that one if the other run is not "
            "wanted any more; --replay.take-over continues the other run's replay with this one"
        )

    def _missing(self) -> ReplayMissing:
        return ReplayMissing(f"no replay has been created on {self.address} yet")


def _connect(url: str, timeout_s: float, connect_timeout_s: float) -> redis.Redis:
    try:
        client = redis.Redis.from_url(
            url,
            socket_timeout=timeout_s,
            socket_connect_timeout=connect_timeout_s,
            retry=Retry(NoBackoff(), 0),
            protocol=2,
        )
    except (ValueError, redis.exceptions.RedisError) as error:
        raise ReplayConfigError(
            f"{without_password(url)!r} is not an address of a server: use "
            "unix:///path/to/socket, redis://host:port or rediss://host:port"
        ) from error
    for command in ("XREAD", "XREVRANGE"):
        # As it comes: a map would hide that an entry names a field twice.
        client.set_response_callback(command, lambda reply, **_: reply)
    return client


def _library_code() -> str:
    return resources.files("replay_service").joinpath("functions.lua").read_text()


def _leaves(value: Any) -> list[Any]:
    """Flatten a nested reply, whose form differs between protocol and server versions."""
    if isinstance(value, dict):
        return [leaf for pair in value.items() for part in pair for leaf in _leaves(part)]
    if isinstance(value, (list, tuple)):
        return [leaf for part in value for leaf in _leaves(part)]
    return [value]
