"""The commands about a replay, on runs that have ended, runs that go on, and addresses."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import redis

from deploy.cli import main
from deploy.config import FILE_NAME, TrainConfig, load_config, save_config
from deploy.presets import preset
from deploy.secretscmd import SecretsOptions, make_secrets
from deploy.servers import replay_server
from replay_service import EmbeddedServer, Limits, ReplayClient, ShardedClient, address_for
from tests.replay_service.records import SCHEMA, insert_many


def fill(url: str) -> None:
    client = ReplayClient(url)
    client.create(SCHEMA, Limits(capacity_steps=200, capacity_bytes=2**27, min_size_steps=10))
    insert_many(client, 0, 30)
    insert_many(client, 1, 5)
    client.close()


@pytest.fixture
def ended(tmp_path: Path) -> Path:
    """A run that has ended, with a replay of 200 steps."""
    run = tmp_path / "run"
    save_config(preset("v3-cartpole"), run / FILE_NAME)
    with replay_server(load_config(run / FILE_NAME), run) as url:
        fill(url)
    return run


def said(capsys: pytest.CaptureFixture[str]) -> str:
    both = capsys.readouterr()
    return re.sub(r"\x1b\[[\d;]*m", "", both.out + both.err)


def contents(text: str) -> str:
    found = re.search(r"contents ([0-9a-f]{16})", text)
    assert found, text
    return found[1]


def test_ended_run_is_checked_exported_and_becomes_a_new_run(
    ended: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive, new = str(tmp_path / "dump"), str(tmp_path / "new")
    assert main(["replay", "check", str(ended)]) == 0
    shown = said(capsys)
    assert re.search(r"A +every stream is contiguous +ok +chunks and records", shown), shown
    assert "200 steps in 25 chunks of 2 streams" in shown and "drift" not in shown
    assert main(["replay", "export", str(ended), archive]) == 0
    assert contents(said(capsys)) == contents(shown)
    assert main(["replay", "check", archive]) == 0
    assert contents(said(capsys)) == contents(shown)
    assert main(["replay", "import", archive, new]) == 0
    assert "200 steps in 25 chunks of 2 streams were inserted, 0 chunks" in said(capsys)
    assert load_config(Path(new) / FILE_NAME) == load_config(ended / FILE_NAME)
    assert main(["replay", "import", archive, new]) == 0
    assert "0 steps in 0 chunks of 2 streams were inserted, 25 chunks" in said(capsys)
    assert main(["replay", "check", new]) == 0
    assert contents(said(capsys)) == contents(shown)


def test_running_run_is_checked_without_disturbing_it(
    ended: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with replay_server(load_config(ended / FILE_NAME), ended) as url:
        with redis.Redis.from_url(url) as raw:
            served = raw.info("server")["process_id"]  # type: ignore[index]
            assert main(["replay", "check", str(ended), "--no-contents"]) == 0
            assert raw.info("server")["process_id"] == served  # type: ignore[index]
            raw.delete("{rp0}:c:s1@1:3")
        assert "contents not read" in said(capsys)
        assert main(["replay", "check", url]) == 1
        shown = said(capsys)
        assert "1 violations" in shown and "C  stream s1@1 seq 3: the chunk is missing" in shown


def test_guarded_server_is_checked_by_its_admin(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, made = tmp_path / "run", tmp_path / "secrets"
    make_secrets(SecretsOptions(directory=made))
    config = preset("v3-cartpole")
    config = replace(config, replay=replace(config.replay, secrets=made))
    save_config(config, run / FILE_NAME)
    with replay_server(config, run) as url:
        fill(address_for(url, config.replay, "admin"))
        assert main(["replay", "check", str(run)]) == 0
        assert main(["replay", "check", url, "--secrets", str(made)]) == 0
        word, guarded = made / "admin.password", url.replace("unix://", "unix://admin@")
        assert main(["replay", "check", guarded, "--password-file", str(word)]) == 0
        assert said(capsys).count("200 steps in 25 chunks") == 3
        assert main(["replay", "check", url]) == 2
        assert "password" in said(capsys)
    assert main(["replay", "check", str(run)]) == 0


def test_several_servers_are_checked_and_exported_one_by_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with ExitStack() as stack:
        servers = [
            stack.enter_context(EmbeddedServer(tmp_path / name, max_memory_bytes=2**26))
            for name in "ab"
        ]
        urls = [server.url for server in servers]
        clients = [ReplayClient(url, timeout_s=5.0) for url in urls]
        sharded = ShardedClient(clients, chunk_steps=8)
        stack.callback(sharded.close)
        sharded.create(SCHEMA, Limits(capacity_steps=200, capacity_bytes=2**26))
        fence = sharded.acquire_fence()
        # Twice: the first settlement finds what the second shares out.
        sharded.settle(fence, 0, 4000)
        insert_many(clients[0], 0, 20)
        insert_many(clients[1], 1, 5)
        sharded.settle(fence, 0, 1100)
        run, dump = tmp_path / "run", tmp_path / "dump"
        config = preset("v3-cartpole")
        save_config(replace(config, redis=",".join(urls)), run / FILE_NAME)
        assert main(["replay", "check", str(run)]) == 0
        shown = said(capsys)
        assert "160 steps" in shown and "40 steps" in shown and all(url in shown for url in urls)
        assert "account of all servers" in shown and shown.count("replayed steps") == 1
        assert main(["replay", "export", ",".join(urls), str(dump)]) == 0
        assert "160 steps of 1 streams" in said(capsys)
        assert main(["replay", "check", str(dump / "shard-1")]) == 0
        assert main(["replay", "import", str(dump / "shard-1"), ",".join(urls)]) == 2
        assert "is on 2 servers, and this is done with one" in said(capsys)
        with redis.Redis.from_url(urls[1]) as raw:
            raw.delete("{rp0}:c:s1@1:3")
        assert main(["replay", "check", ",".join(urls)]) == 1
        shown = said(capsys)
        assert "C  stream s1@1 seq 3: the chunk is missing" in shown
        # More is admitted in sum than anybody has paid for.
        clients[0].settle(fence, 0, 10**6, turn=100)
        assert main(["replay", "check", str(run)]) == 1
        assert "more inserts are admitted than the train ratio pays for" in said(capsys)


def test_socket_with_a_long_path_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / ("long" * 25)
    save_config(preset("v3-cartpole"), run / FILE_NAME)
    with replay_server(load_config(run / FILE_NAME), run) as url:
        fill(url)
        assert not (run / "replay" / "redis.sock").exists()
        assert main(["replay", "check", str(run)]) == 0
        assert "200 steps" in said(capsys)


@pytest.mark.parametrize(
    ("line", "want"),
    [
        ("replay chek x", "unknown action replay chek; did you mean check?"),
        ("replay check", "RUN_DIR|URL|ARCHIVE"),
        ("replay check nowhere", "there is no run in nowhere"),
        ("replay check unix:///nowhere", "cannot be used"),
        ("replay check x --no-content", "did you mean --no-contents?"),
        ("replay import nowhere there", "there is no archive in nowhere"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(
    line: str, want: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(line.split()) == 2
    text = said(capsys)
    assert want in text and text.count("\n") == 1


def test_run_that_never_trained_and_directories_with_other_things_are_refused(
    ended: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare, archive = tmp_path / "bare", tmp_path / "dump"
    save_config(TrainConfig(), bare / FILE_NAME)
    assert main(["replay", "check", str(bare)]) == 2
    assert "has no replay yet" in said(capsys)
    assert main(["replay", "export", str(ended), str(archive)]) == 0
    (archive / FILE_NAME).unlink()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    assert main(["replay", "import", str(archive), str(tmp_path / "full")]) == 2
    assert "full is not empty and holds no run" in said(capsys)
    assert main(["replay", "import", str(archive), str(tmp_path / "fresh")]) == 2
    assert "brings no config.yaml" in said(capsys)
    assert not (tmp_path / "fresh").exists()


def test_serve_prepares_a_server_and_lists_itself(tmp_path: Path) -> None:
    with EmbeddedServer(tmp_path / "server", max_memory_bytes=2**26) as server:
        command = [sys.executable, "-m", "deploy.cli", "replay", "serve", server.url]
        process = subprocess.Popen(
            [*command, "--listen", "127.0.0.1:0"], stdout=subprocess.PIPE, text=True
        )
        try:
            assert process.stdout is not None
            found = re.search(r"http://(\S+)", process.stdout.readline())
            assert found is not None
            pages = {}
            for page in ("healthz", "sd", "metrics"):
                with urllib.request.urlopen(f"http://{found[1]}/{page}", timeout=10) as answer:
                    pages[page] = answer.read().decode()
            process.terminate()
            assert process.wait(20) == 0
        finally:
            process.kill()
            process.communicate()
    assert pages["healthz"] == "ok\n"
    assert json.loads(pages["sd"]) == [{"targets": [found[1]], "labels": {"role": "replay"}}]
    assert "dreamer_replay_log_up 1.0" in pages["metrics"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["runs/a"], "takes the address of a server"),
        (["redis://127.0.0.1:1", "--listen", "9100"], "expected address:port"),
        (["redis://:word@127.0.0.1:1"], "contains a password"),
        (["redis://127.0.0.1:1", "--listen", "0.0.0.0:0"], "open to anybody"),
    ],
)
def test_serve_says_what_it_cannot_do(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay", "serve", *arguments]) == 2
    assert message in said(capsys)


def test_serve_names_a_port_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        listen = f"127.0.0.1:{other.getsockname()[1]}"
        assert main(["replay", "serve", "redis://127.0.0.1:1", "--listen", listen]) == 2
    assert "of --listen is in use" in said(capsys)


@pytest.mark.parametrize("roles", [("exporter", "admin"), ("exporter",)])
def test_serve_works_with_the_roles_that_it_has_and_shows_no_secret(
    tmp_path: Path, roles: tuple[str, ...]
) -> None:
    make_secrets(SecretsOptions(directory=tmp_path / "all"))
    knobs = replace(preset("v3-cartpole").replay, secrets=tmp_path / "all")
    (tmp_path / "some").mkdir()
    for role in roles:
        (tmp_path / f"some/{role}.password").hardlink_to(tmp_path / f"all/{role}.password")
    with EmbeddedServer(tmp_path / "r", max_memory_bytes=2**26, secrets=knobs.secrets) as server:
        learner = ReplayClient(address_for(server.url, knobs, "learner"))
        learner.load_library()
        words = ["replay", "serve", server.url, "--secrets", str(tmp_path / "some")]
        words += ["--listen", "0.0.0.0:0", "--host", "127.0.0.1"]
        words += ["--token-file", str(tmp_path / "all/admin.password")]
        token = (tmp_path / "all/admin.password").read_text().strip()
        process = subprocess.Popen(
            [sys.executable, "-m", "deploy.cli", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert process.stdout is not None
        first = process.stdout.readline()
        try:
            found = re.search(r"http://(\S+)", first)
            assert found is not None, first
            with urllib.request.urlopen(f"http://{found[1]}/healthz", timeout=10) as answer:
                assert answer.read() == b"ok\n"
            asked = urllib.request.Request(
                f"http://{found[1]}/metrics", headers={"Authorization": f"Bearer {token}"}
            )
            with urllib.request.urlopen(asked, timeout=10) as answer:
                shown = answer.read().decode()
            server.stop()
            with pytest.raises(urllib.error.HTTPError, match="503") as caught:
                urllib.request.urlopen(f"http://{found[1]}/healthz", timeout=10)
            with caught.value as refusal:
                reason = refusal.read().decode()
        finally:
            process.terminate()
            rest, _ = process.communicate(timeout=20)
        learner.close()
    assert process.returncode == 0 and "dreamer_replay_log_writable 1.0" in shown
    assert reason.count("\n") == 1
    for path in (tmp_path / "all").glob("*.password"):
        assert path.read_text().strip() not in first + shown + reason + rest
