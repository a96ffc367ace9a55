"""From errors of the Redis library to ours, which say what to do."""

from __future__ import annotations

import re

import redis

from replay_service.errors import (
    ReplayAuthError,
    ReplayConfigError,
    ReplayError,
    ReplayFull,
    ReplayMissing,
    ReplayTimeout,
    ReplayUnavailable,
)
from replay_service.security import roles_with


def translate(error: Exception, address: str, function: str = "") -> ReplayError:
    """Turn an error of the Redis library into one of ours.

    Args:
        error: what was raised.
        address: of the server, as it may be shown.
        function: the server-side function that was called, if one was.
    """
    kinds = redis.exceptions
    denied = _denied(error, address, function)
    if denied:
        return ReplayAuthError(denied)
    if isinstance(error, kinds.TimeoutError):
        # A server without TLS says nothing at all to a client that begins with it.
        hint = "; is that its port for TLS?" if address.startswith("rediss:") else ""
        return ReplayTimeout(f"the server at {address} did not answer in time{hint}")
    if isinstance(error, kinds.BusyLoadingError):
        return ReplayUnavailable(f"the server at {address} is loading its data")
    if isinstance(error, kinds.InvalidResponse) or "Protocol error" in str(error):
        return ReplayConfigError(f"what answers at {address} does not speak the Redis protocol")
    if isinstance(error, kinds.OutOfMemoryError) or "OOM" in str(error):
        return ReplayFull(
            f"the server at {address} has reached its memory limit: raise its maxmemory "
            "(--replay.redis-memory-bytes) or lower --replay.capacity-steps"
        )
    if "MISCONF" in str(error):
        # Learners wait for it too: unlike memory, the disk is needed for every write.
        return ReplayUnavailable(
            f"the server at {address} cannot write to its disk: make room where it keeps its data "
            f"({_words_after('MISCONF', error)})"
        )
    if "Function not found" in str(error):
        return ReplayMissing(f"no replay has been created on {address} yet")
    if "unknown command" in str(error).lower():
        return ReplayConfigError(
            f"the server at {address} lacks a command of Redis 7.0 that replay needs: {error}"
        )
    what = str(error).rstrip(".")
    hint = "; is it running, and is this its address?" if "connecting to" in what else ""
    return ReplayUnavailable(f"the server at {address} cannot be used: {what}{hint}")


def _words_after(code: str, error: Exception) -> str:
    return str(error).partition(code)[2].strip(" .") or "no reason was given"


def _denied(error: Exception, address: str, function: str) -> str:
    """Return what to say if the server refuses who we are or what we ask, else nothing."""
    kinds, text = redis.exceptions, str(error)
    if isinstance(error, kinds.NoPermissionError) or "NOPERM" in text:
        found = re.search(r"'([\w|]+)' command", text)
        if found is None:
            return (
                f"the server at {address} keeps this user from keys or channels that the call "
                "needs: use the role that it is for (dreamfleet secrets makes them)"
            )
        called = function if found[1].lower() == "fcall" else ""
        name = called or found[1].upper()
        roles = " or ".join(roles_with(f"fcall|{called}" if called else name)) or "admin"
        return (
            f"the server at {address} does not let this user run {name}: it takes credentials of "
            f"the role {roles}"
        )
    if "ACL failure in script" in text:
        return (
            f"the server at {address} lets this user call {function or 'the function'} and not "
            "what it does: load the ACL file that `dreamfleet secrets` of this version makes"
        )
    if "NOAUTH" in text or "Authentication required" in text:
        return (
            f"the server at {address} refuses connections without credentials: check user and "
            "password, which come from --replay.secrets or --replay.password-file"
        )
    if isinstance(error, kinds.AuthenticationError):
        return f"the server at {address} refuses these credentials: check user and password"
    if "CERTIFICATE_VERIFY_FAILED" in text:
        reason = re.search(r"verify failed: ([^(\]]+)", text)
        return (
            f"the certificate of {address} is not trusted ({reason[1].strip() if reason else text})"
            ": give the CA that signed it with --replay.ca-file, and an address that it names"
        )
    return ""
