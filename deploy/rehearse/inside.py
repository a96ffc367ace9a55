"""The first process of one rehearsed container: it makes its file system, and runs its command.

Started by `deploy.rehearse.container` in namespaces of its own (files, processes, network). It
waits for a line on its standard input, which says that the network is there.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

SYSTEM = ("bin", "lib", "lib64", "sbin", "usr")
"""Folders of this machine that stand for those of the image."""
ETC = (
    "alternatives group ld.so.cache ld.so.conf ld.so.conf.d localtime mime.types nsswitch.conf "
    "passwd ssl wgetrc"
).split()
DEVICES = ("full", "null", "random", "tty", "urandom", "zero")


def main() -> int:
    """Build the root, change into it, run the command, and return its exit code."""
    spec: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    root = Path(spec["root"])
    _mount("--make-rprivate", "/")
    _mount("-t", "tmpfs", "-o", "mode=0755,size=64m", "tmpfs", str(root))
    for entry in spec["tmpfs"]:
        path, _, options = entry.partition(":")
        target = _inside(root, path)
        target.mkdir(parents=True, exist_ok=True)
        _mount("-t", "tmpfs", *(["-o", options] if options else []), "tmpfs", str(target))
    _system(root, spec["shared"])
    _devices(root, spec["shm_size_bytes"])
    for path, text in spec["files"].items():
        target = _inside(root, path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        target.chmod(0o755 if path.startswith("/shim/") else 0o644)
    for path, target in spec["links"].items():
        link = _inside(root, path)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(target)
    for path, (source, read_only) in spec["binds"].items():
        _bind(Path(source), _inside(root, path), read_only)
    _mount("-o", "remount,ro,bind", str(root))
    sys.stdin.readline()
    os.chroot(root)
    os.chdir(spec["directory"])
    return _run([*spec["prefix"], *spec["words"]], spec["environment"])


def _system(root: Path, shared: list[str]) -> None:
    for name in SYSTEM:
        source = Path("/", name)
        if source.is_symlink():
            (root / name).symlink_to(os.readlink(source))
        elif source.is_dir():
            _bind(source, root / name, True)
    (root / "etc").mkdir()
    for name in ETC:
        source = Path("/etc", name)
        if source.is_dir():
            shutil.copytree(source, root / "etc" / name, symlinks=True)
        elif source.exists():
            shutil.copy(source, root / "etc" / name)
    for path in shared:
        _bind(Path(path), _inside(root, path), True)
    (root / "proc").mkdir()
    _mount("-t", "proc", "proc", str(root / "proc"))
    (root / "sys").mkdir()
    _mount("--rbind", "/sys", str(root / "sys"))


def _devices(root: Path, shm_size_bytes: int) -> None:
    (root / "dev" / "shm").mkdir(parents=True)
    for name in DEVICES:
        (root / "dev" / name).touch()
        _mount("--bind", f"/dev/{name}", str(root / "dev" / name))
    (root / "dev" / "fd").symlink_to("/proc/self/fd")
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        (root / "dev" / name).symlink_to(f"/proc/self/fd/{number}")
    options = f"mode=1777,size={shm_size_bytes}"
    _mount("-t", "tmpfs", "-o", options, "tmpfs", str(root / "dev" / "shm"))


def _bind(source: Path, target: Path, read_only: bool) -> None:
    source = source.resolve(strict=True)
    if source.is_dir():
        target.mkdir(parents=True, exist_ok=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()
    _mount("--rbind", str(source), str(target))
    if read_only:
        # What this user may not change below it stays as it is.
        _mount("-o", "remount,ro,bind", str(target), check=False)


def _inside(root: Path, path: str) -> Path:
    return root / path.lstrip("/")


def _mount(*words: str, check: bool = True) -> None:
    done = subprocess.run(["mount", *words], capture_output=True, text=True, timeout=30)
    if check and done.returncode:
        raise OSError(f"mount {' '.join(words)}: {done.stderr.strip()}")


def _run(words: list[str], environment: dict[str, str]) -> int:
    """Do what the init of a container does: pass signals on, reap orphans, end with the command."""
    child = os.fork()
    if child == 0:
        os.setsid()
        os.execvpe(words[0], words, environment)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda got, frame: os.kill(child, got))
    while True:
        pid, status = os.wait()
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
