"""Durable experience replay: exactly-once inserts, a train-ratio account, and fast local windows.

Importing this package loads neither torch nor ray; names are resolved on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from replay_service.archive import Archive, export_archive
    from replay_service.audit import Violation
    from replay_service.budgets import ByteBudget
    from replay_service.chunk import Chunk, EpisodeSummary, decode_chunk, encode_chunk
    from replay_service.client import InsertReply, ReplayClient
    from replay_service.config import Limits, ReplayConfig, SamplingConfig
    from replay_service.counters import ReplayStats
    from replay_service.discovery import listed
    from replay_service.endpoint import MetricsEndpoint
    from replay_service.entries import LogEntry
    from replay_service.errors import (
        ChunkError,
        ReplayAuthError,
        ReplayClosed,
        ReplayConfigError,
        ReplayEmpty,
        ReplayError,
        ReplayFenced,
        ReplayFull,
        ReplayMissing,
        ReplayOwned,
        ReplaySchemaError,
        ReplayTimeout,
        ReplayUnavailable,
    )
    from replay_service.invariants import CheckReport, check_archive, check_server
    from replay_service.limiter import CreditLimiter, plan_limits
    from replay_service.memory import MemoryPlan, estimate_memory, fit_to_server
    from replay_service.mirror import EpisodeEvent, Mirror
    from replay_service.offline import ArchiveLog, ServerLog
    from replay_service.reflection import check_mirror
    from replay_service.reseed import Reseeder, ShardedReseeder, continue_account
    from replay_service.restore import ImportResult, create_like, import_archive
    from replay_service.schema import Column, Schema
    from replay_service.security import address_for, has_password, is_loopback, with_absolute_paths
    from replay_service.server import EmbeddedServer
    from replay_service.sharded import ShardedClient, prepare_shard
    from replay_service.shards import BudgetSplit, shard_of, split_addresses
    from replay_service.writer import ChunkWriter, Uploader, UploadStats

_HOMES = {
    "archive": ("Archive", "export_archive"),
    "audit": ("Violation",),
    "budgets": ("ByteBudget",),
    "chunk": ("Chunk", "EpisodeSummary", "decode_chunk", "encode_chunk"),
    "client": ("InsertReply", "ReplayClient"),
    "config": ("Limits", "ReplayConfig", "SamplingConfig"),
    "counters": ("ReplayStats",),
    "discovery": ("listed",),
    "endpoint": ("MetricsEndpoint",),
    "entries": ("LogEntry",),
    "errors": (
        "ChunkError",
        "ReplayAuthError",
        "ReplayClosed",
        "ReplayConfigError",
        "ReplayEmpty",
        "ReplayError",
        "ReplayFenced",
        "ReplayFull",
        "ReplayMissing",
        "ReplayOwned",
        "ReplaySchemaError",
        "ReplayTimeout",
        "ReplayUnavailable",
    ),
    "invariants": ("CheckReport", "check_archive", "check_server"),
    "limiter": ("CreditLimiter", "plan_limits"),
    "memory": ("MemoryPlan", "estimate_memory", "fit_to_server"),
    "mirror": ("EpisodeEvent", "Mirror"),
    "offline": ("ArchiveLog", "ServerLog"),
    "reflection": ("check_mirror",),
    "reseed": ("Reseeder", "ShardedReseeder", "continue_account"),
    "restore": ("ImportResult", "create_like", "import_archive"),
    "schema": ("Column", "Schema"),
    "security": ("address_for", "has_password", "is_loopback", "with_absolute_paths"),
    "server": ("EmbeddedServer",),
    "sharded": ("ShardedClient", "prepare_shard"),
    "shards": ("BudgetSplit", "shard_of", "split_addresses"),
    "writer": ("ChunkWriter", "UploadStats", "Uploader"),
}
_MODULE_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Archive",
    "ArchiveLog",
    "BudgetSplit",
    "ByteBudget",
    "CheckReport",
    "ChunkError",
    "Chunk",
    "ChunkWriter",
    "Column",
    "CreditLimiter",
    "EmbeddedServer",
    "EpisodeEvent",
    "EpisodeSummary",
    "ImportResult",
    "InsertReply",
    "Limits",
    "LogEntry",
    "MemoryPlan",
    "MetricsEndpoint",
    "Mirror",
    "ReplayAuthError",
    "ReplayClient",
    "ReplayClosed",
    "ReplayConfig",
    "ReplayConfigError",
    "ReplayEmpty",
    "ReplayError",
    "ReplayFenced",
    "ReplayFull",
    "ReplayMissing",
    "ReplayOwned",
    "ReplaySchemaError",
    "ReplayStats",
    "ReplayTimeout",
    "ReplayUnavailable",
    "Reseeder",
    "SamplingConfig",
    "Schema",
    "ServerLog",
    "ShardedClient",
    "ShardedReseeder",
    "UploadStats",
    "Uploader",
    "Violation",
    "address_for",
    "check_archive",
    "check_mirror",
    "check_server",
    "continue_account",
    "create_like",
    "decode_chunk",
    "encode_chunk",
    "estimate_memory",
    "export_archive",
    "fit_to_server",
    "has_password",
    "import_archive",
    "is_loopback",
    "listed",
    "plan_limits",
    "prepare_shard",
    "shard_of",
    "split_addresses",
    "with_absolute_paths",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
