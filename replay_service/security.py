"""Who may do what on a replay server: roles, and addresses that carry a role's secrets.

Permissions hold inside server-side functions too, so a role needs the commands that its functions
call; each is confined to the kind of key that it is called on (see functions.lua for the keys).
"""

from __future__ import annotations

import hashlib
import ipaddress
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal
from urllib.parse import SplitResult, quote, urlencode, urlsplit

from replay_service.config import ReplayConfig
from replay_service.errors import ReplayConfigError

log = logging.getLogger(__name__)

ACL_FILE, CA_FILE = "users.acl", "ca.crt"
RoleName = Literal["actor", "reader", "learner", "exporter", "admin"]


@dataclass(frozen=True, kw_only=True)
class Role:
    """What one user of the server may do."""

    purpose: str
    """Who it is for."""
    functions: tuple[str, ...] = ()
    """Server-side functions that it may call, on keys of a replay."""
    commands: str = ""
    """Commands without keys."""
    on_keys: Mapping[str, str] = field(default_factory=dict)
    """Kind of key (as the server matches it, ``%R`` read, ``%W`` write, ``~`` both) to commands."""


ROLES: dict[RoleName, Role] = {
    "actor": Role(
        purpose="inserts chunks",
        functions=("insert", "open", "close", "stats", "register"),
        commands="info time",
        on_keys={
            "~{rp*}:meta": "hget hmget hgetall hset",
            "~{rp*}:seq": "hget hset hdel",
            "~{rp*}:log": "xadd xrange xrevrange",
            "%W~{rp*}:c:*": "set strlen exists persist del",
            "%R~{rp*}:wake": "xread",
            "~{rp*}:sd": "hset hdel hgetall",
        },
    ),
    "reader": Role(
        purpose="follows the log and trains offline from it",
        functions=("stats", "sizes"),
        commands="info multi exec",
        on_keys={
            "%R~{rp*}:meta": "hget hgetall",
            "%R~{rp*}:log": "xread xrevrange",
            "%R~{rp*}:c:*": "watch strlen mget getrange",
        },
    ),
    "learner": Role(
        purpose="creates the replay, reads the log, pays for inserts",
        functions=(
            "create",
            "fence",
            "settle",
            "stats",
            "evict",
            "register",
            "restore",
            "restored",
            "sizes",
        ),
        commands="info time function|list function|load multi exec",
        on_keys={
            "~{rp*}:meta": "hget hmget hgetall hset hdel hincrby",
            "~{rp*}:seq": "hget hset hdel",
            "~{rp*}:log": "xread xrange xrevrange xdel",
            "~{rp*}:c:*": "watch strlen mget getrange del",
            "~{rp*}:wake": "xadd",
            "~{rp*}:dead": "xadd",
            "~{rp*}:sd": "hset hdel hgetall",
        },
    ),
    "exporter": Role(
        purpose="reads counters for metrics",
        functions=("stats", "endpoints", "admits"),
        commands="ping info time slowlog|get slowlog|len latency|latest",
        on_keys={
            "%R~{rp*}:meta": "hgetall",
            "%R~{rp*}:seq": "hlen",
            "%R~{rp*}:dead": "xinfo|stream",
            "%R~{rp*}:sd": "hgetall",
        },
    ),
    "admin": Role(purpose="checks, exports, imports and mends", commands="@all"),
}


def password_file(directory: Path, role: RoleName) -> Path:
    """Return where the password of a role is kept below a directory of secrets."""
    return directory / f"{role}.password"


def acl_rules(role: RoleName) -> str:
    """Return the permissions of a role in the server's language, without its password."""
    if role == "admin":
        return "~* &* +@all"
    spec = ROLES[role]
    words = ["resetkeys", "resetchannels", "-@all", *(f"+{name}" for name in spec.commands.split())]
    calls = " ".join(f"+fcall|replay_{name}" for name in spec.functions)
    words.append(f"({calls} ~{{rp*}}:*)")
    for keys, commands in spec.on_keys.items():
        words.append(f"({' '.join(f'+{name}' for name in commands.split())} {keys})")
    return " ".join(words)


def render_acl(passwords: Mapping[RoleName, str]) -> str:
    """Return the ACL file of a server: one user per role, and no access for anybody else.

    Args:
        passwords: one for every role; only their SHA-256 goes into the file.
    """
    assert set(passwords) == set(ROLES), sorted(passwords)
    lines = ["user default off resetkeys resetchannels -@all"]
    for role, password in passwords.items():
        digest = hashlib.sha256(password.encode()).hexdigest()
        lines.append(f"user {role} on #{digest} {acl_rules(role)}")
    return "\n".join(lines) + "\n"


def roles_with(command: str) -> list[str]:
    """Return the roles that may run a command, the one with the fewest rights first."""
    name = command.lower()
    found = list[str]()
    for role, spec in ROLES.items():
        known = {*spec.commands.split(), *(f"fcall|replay_{one}" for one in spec.functions)}
        for commands in spec.on_keys.values():
            known.update(commands.split())
        if name in known or "@all" in known:
            found.append(role)
    return found


def has_password(url: str) -> bool:
    """Whether an address, valid or not, contains what may be a password."""
    scheme, _, rest = url.partition("://")
    if re.search(r"[?&](?:\w*_)?password=", url):
        return True
    return bool(re.search(r":.*@", rest.partition("/")[0] if scheme == "unix" else rest or url))


def without_password(url: str) -> str:
    """Return an address in a form that may be shown."""
    parts = urlsplit(url)
    query = re.sub(r"((?:^|&)(?:\w*_)?password=)[^&]*", r"\1***", parts.query)
    netloc = parts.netloc
    if parts.password is not None:
        netloc = f"{parts.username or ''}:***@{netloc.rpartition('@')[2]}"
    return _join(parts._replace(netloc=netloc, query=query))


def is_loopback(host: str) -> bool:
    """Whether a host name or address is reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def with_absolute_paths(config: ReplayConfig) -> ReplayConfig:
    """Return the configuration for a process that runs in another directory."""
    return replace(
        config,
        secrets=config.secrets and config.secrets.absolute(),
        password_file=config.password_file and config.password_file.absolute(),
        ca_file=config.ca_file and config.ca_file.absolute(),
    )


def address_for(url: str, config: ReplayConfig, role: RoleName) -> str:
    """Return the address with the user, password and CA that the configuration names.

    The result is for `ReplayClient` alone: it holds the password in plain text.

    Args:
        url: of the server, without a password.
        config: whose `secrets`, `password_file` and `ca_file` are used.
        role: the user to be, where there is a directory of secrets.

    Raises:
        ReplayConfigError: a file is missing, empty or readable by others, or the CA cannot be
            used with this address.
    """
    parts = urlsplit(url)
    secret = config.password_file
    user, ca = parts.username or "", config.ca_file
    if config.secrets is not None:
        user = role
        secret = secret or password_file(config.secrets, role)
        if parts.scheme == "rediss" and ca is None and (config.secrets / CA_FILE).is_file():
            ca = config.secrets / CA_FILE
    if secret is not None:
        host = parts.netloc.rpartition("@")[2]
        password = quote(read_password(secret), safe="")
        parts = parts._replace(netloc=f"{quote(user, safe='')}:{password}@{host}")
        if parts.scheme == "redis" and not is_loopback(parts.hostname or "localhost"):
            log.warning("replay_not_encrypted address=%s remedy=rediss://", without_password(url))
    if ca is not None:
        parts = _with_ca(parts, ca)
    return _join(parts)


def _with_ca(parts: SplitResult, ca: Path) -> SplitResult:
    if parts.scheme != "rediss":
        raise ReplayConfigError(
            "--replay.ca-file is for encrypted connections, and "
            f"{without_password(_join(parts))} is not one: use rediss://host:port, or leave the "
            "file out"
        )
    if not ca.is_file():
        raise ReplayConfigError(
            f"there is no certificate {ca}: give the ca.crt that `dreamfleet secrets` made"
        )
    words = [parts.query] if parts.query else []
    query = "&".join([*words, urlencode({"ssl_ca_certs": str(ca.absolute())})])
    return parts._replace(query=query)


def _join(parts: SplitResult) -> str:
    """Undo `urlsplit`; the library's own way drops the slashes of addresses without a host."""
    query = f"?{parts.query}" if parts.query else ""
    return f"{parts.scheme}://{parts.netloc}{parts.path}{query}" if parts.scheme else parts.geturl()


def read_password(path: Path) -> str:
    """Return the password in a file: its first line.

    Raises:
        ReplayConfigError: it is missing, empty, or others than its owner may read it.
    """
    try:
        mode = path.stat().st_mode & 0o777
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ReplayConfigError(
            f"cannot read the password file {path} ({type(error).__name__}): make it with "
            "`dreamfleet secrets`, or put the password on its first line"
        ) from error
    if mode & 0o077:
        raise ReplayConfigError(
            f"the password file {path} has mode {mode:04o}, which lets others read it: "
            f"chmod 600 {path}"
        )
    if not text.strip():
        raise ReplayConfigError(f"the password file {path} is empty: put the password in it")
    return text.splitlines()[0].strip()
