"""A new run that cannot start is refused in one line, and leaves nothing behind."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from deploy.cli import main
from deploy.secretscmd import SecretsOptions, make_secrets
from replay_service import EmbeddedServer

pytestmark = pytest.mark.integration

ZOO = Path(__file__).parents[1] / "actors"
Refused = Callable[..., str]


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Start a run that is to be refused, and return what that says."""

    def start(*flags: str) -> str:
        run = tmp_path / "run"
        assert main(["train", "--size", "debug", "--run-dir", str(run), *flags]) == 2
        text = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().err)
        *before, last = text.splitlines()
        assert last.startswith("dreamfleet: error: ")
        assert all(" INFO " in line for line in before), text
        assert not run.exists()
        return last

    return start


@contextmanager
def taken() -> Iterator[int]:
    """A port at which something listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


class Silent(BaseHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def web_server() -> Iterator[int]:
    """The port of a server that speaks another protocol."""
    server = HTTPServer(("127.0.0.1", 0), Silent)
    thread = threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize("preset", ["v1-dmc-vision", "v2-atari", "pro-dmc-vision", "v3-2023-atari"])
def test_an_image_size_that_the_agent_cannot_take(
    preset: str, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ZOO)
    said = refused(
        *("--preset", preset, "--env", "zoo:Everything"),
        *("--environment.image-size", "50", "--redis", "redis://127.0.0.1:1"),
    )
    assert "use --environment.image-size 64" in said


def test_a_captured_graph_without_a_gpu(refused: Refused) -> None:
    said = refused("--device", "cpu", "--learner.mode", "graph", "--redis", "redis://127.0.0.1:1")
    assert "learner.mode 'graph' needs a CUDA device" in said


def test_a_cluster_that_does_not_answer(refused: Refused) -> None:
    said = refused("--ray", "127.0.0.1:1", "--redis", "redis://127.0.0.1:1")
    assert "nothing answers at --ray 127.0.0.1:1" in said


def test_more_than_the_machine_has(refused: Refused) -> None:
    assert "capacity" in refused("--replay.capacity-steps", "1000000000000")


def test_a_port_for_metrics_that_is_taken(refused: Refused) -> None:
    with taken() as port:
        said = refused("--learner.metrics-port", str(port), "--redis", "redis://127.0.0.1:1")
    assert f"port {port} of --learner.metrics-port is in use: another process listens at" in said
    assert "stop it, or choose another port, or 0 for a free one" in said


def test_a_port_for_the_replay_that_is_taken(refused: Refused) -> None:
    with taken() as port:
        said = refused("--replay.listen", f"127.0.0.1:{port}")
    assert f"port {port} of --replay.listen is in use: another process listens at" in said
    assert said.endswith("stop it, or choose another port")


def test_a_server_that_does_not_answer(refused: Refused) -> None:
    assert "is it running, and is this its" in refused("--redis", "redis://127.0.0.1:1")


def test_a_server_of_another_kind(refused: Refused) -> None:
    with web_server() as port:
        assert f"127.0.0.1:{port}" in refused("--redis", f"redis://127.0.0.1:{port}")


def test_a_server_that_wants_a_password(refused: Refused, tmp_path: Path) -> None:
    secrets = tmp_path / "secrets"
    make_secrets(SecretsOptions(directory=secrets))
    with EmbeddedServer(tmp_path / "server", max_memory_bytes=2**26, secrets=secrets) as server:
        assert "password" in refused("--redis", server.url)
