from __future__ import annotations

import logging
import re
import select
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import redis

from deploy.secretscmd import SecretsOptions, certificates, make_secrets
from replay_service import (
    EmbeddedServer,
    Mirror,
    ReplayAuthError,
    ReplayClient,
    ReplayConfig,
    ReplayConfigError,
    ReplayTimeout,
    Reseeder,
    Uploader,
    encode_chunk,
)
from replay_service.config import Limits
from replay_service.security import (
    ROLES,
    RoleName,
    acl_rules,
    address_for,
    has_password,
    password_file,
    read_password,
    render_acl,
    roles_with,
    without_password,
)
from tests.replay_service.records import (
    SCHEMA,
    absorb_until,
    chunk,
    contents,
    insert,
    insert_many,
    write,
)

LIMITS = Limits(
    capacity_steps=64, capacity_bytes=2**24, min_size_steps=16, budget_steps=24, max_chunk_steps=64
)


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory: Path = tmp_path_factory.mktemp("secrets")
    assert make_secrets(SecretsOptions(directory=directory, hosts=("replay.example",))) == 0
    return directory


@pytest.fixture(scope="module")
def guarded(secrets: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    """A server that admits the five roles alone."""
    directory = tmp_path_factory.mktemp("guarded")
    with EmbeddedServer(directory, max_memory_bytes=2**28, secrets=secrets) as running:
        yield running


@pytest.fixture
def as_role(guarded: EmbeddedServer, secrets: Path) -> Iterator[Callable[[RoleName], ReplayClient]]:
    """Returns a client of a role; the server is empty."""
    config, made = ReplayConfig(secrets=secrets), []
    with redis.Redis.from_url(address_for(guarded.url, config, "admin")) as admin:
        admin.flushall()
        admin.function_flush()

    def client(role: RoleName) -> ReplayClient:
        made.append(ReplayClient(address_for(guarded.url, config, role), timeout_s=5.0))
        return made[-1]

    yield client
    for one in made:
        one.close()


def test_actor_and_learner_do_their_whole_work_with_their_own_rights(
    as_role: Callable[[RoleName], ReplayClient],
) -> None:
    learner, actor = as_role("learner"), as_role("actor")
    assert learner.check() and learner.create(SCHEMA, LIMITS)
    assert not learner.create(SCHEMA, LIMITS)
    assert actor.check() and actor.schema() == SCHEMA
    assert [actor.open_stream("s0"), actor.open_stream("s0")] == [1, 2]
    insert_many(actor, 0, 3)
    assert insert(actor, chunk(0, 3)) == "DUP" and insert(actor, chunk(0, 9)) == "GAP"
    reply = actor.insert(SCHEMA, "s0@1", 4, 8, encode_chunk(chunk(0, 4), SCHEMA))
    assert reply.code == "WAIT"
    fence = learner.acquire_fence()
    learner.settle(fence, 8, 10_000)
    assert actor.wait_settlement(reply.values[2].decode(), 1.0)
    insert_many(actor, 0, 20, start=4)
    assert actor.stats().size_steps == 64 and actor.stats().evicted_steps == 23 * 8 - 64
    actor.close_stream("s0@1", 23)
    actor.register("process", 1000, "{}")
    insert_many(actor, 1, 8)
    entries = learner.read_log("0", 100, 0.01)
    assert [entry.sid for entry in entries] == ["s1@1"] * 8
    assert None not in learner.fetch(entries)
    assert learner.last_log_id() == entries[-1].entry_id
    learner.quarantine(entries[0], b"torn", "a test")
    assert learner.evict(16, 2**24) == 48 and learner.stats().size_steps == 16


def test_what_was_lost_is_put_back_with_the_rights_of_learner_and_actor(
    as_role: Callable[[RoleName], ReplayClient],
) -> None:
    learner, actor, admin = as_role("learner"), as_role("actor"), as_role("admin")
    learner.create(SCHEMA, LIMITS)
    assert actor.open_stream("s0") == 1
    insert_many(actor, 0, 3)
    mirror = Mirror(learner, SCHEMA, capacity_steps=640, window_steps=4, placement="ram")
    mirror.start()
    while mirror.inserted_steps < 24:
        assert mirror.wait(5.0)
        mirror.absorb()
    writer = as_role("actor")
    reseeder = Reseeder(learner, lambda: writer, mirror, LIMITS, fence=learner.acquire_fence())
    admin._command("FLUSHALL")
    assert reseeder.run(8, 10_000) == []
    mirror.stop()
    stats = learner.stats()
    assert (stats.inserted_steps, stats.size_steps, stats.replayed_steps) == (24, 24, 8)
    insert_many(actor, 0, 1, start=4)
    assert actor.open_stream("s0") > 2


def test_mirror_and_uploader_work_with_their_own_rights(
    as_role: Callable[[RoleName], ReplayClient], tmp_path: Path
) -> None:
    learner, actor = as_role("learner"), as_role("actor")
    learner.create(SCHEMA, replace(LIMITS, capacity_steps=512, budget_steps=2**40))
    mirror = Mirror(
        learner,
        SCHEMA,
        capacity_steps=512,
        window_steps=8,
        page_steps=8,
        placement="ram",
        directory=tmp_path,
    )
    mirror.start()
    with Uploader(actor, SCHEMA, ReplayConfig(chunk_steps=16)) as uploader:
        writer = uploader.open_stream("s0")
        write(writer, 0, 0, 64)
        writer.close()
        assert uploader.drain(10.0)
    absorb_until(mirror, lambda: mirror.size_steps == 64)
    assert set(contents(mirror)) == {(0, step) for step in range(64)}
    mirror.stop()


@pytest.mark.parametrize("role", ["actor", "reader", "learner", "exporter"])
@pytest.mark.parametrize(
    "command",
    [
        "FLUSHALL",
        "FLUSHDB",
        "CONFIG GET *",
        "CONFIG SET maxmemory 1",
        "KEYS *",
        "SCAN 0",
        "DEL {rp0}:log",
        "UNLINK {rp0}:log",
        "XTRIM {rp0}:log MAXLEN 0",
        "DEL {rp0}:meta",
        "GET other",
        "SET other 1",
        "HSET other:meta a 1",
        "RENAME {rp0}:log {rp0}:old",
        "EVAL return(1) 0",
        "FUNCTION DELETE dreamfleet_replay",
        "FUNCTION FLUSH",
        "ACL LIST",
        "ACL SETUSER actor on nopass",
        "SHUTDOWN NOSAVE",
        "BGREWRITEAOF",
        "CLIENT KILL TYPE normal",
        "REPLICAOF NO ONE",
        "PUBLISH news 1",
        "MONITOR",
    ],
)
def test_nobody_but_the_admin_may(
    role: RoleName, command: str, as_role: Callable[[RoleName], ReplayClient]
) -> None:
    as_role("learner").create(SCHEMA, LIMITS)
    with pytest.raises(ReplayAuthError):
        as_role(role)._command(*command.split())


@pytest.mark.parametrize(
    ("role", "command"),
    [
        ("actor", "FUNCTION LOAD code"),
        ("actor", "FCALL replay_settle 2 {rp0}:meta {rp0}:wake 1 1 1"),
        ("actor", "FCALL replay_evict 3 {rp0}:meta {rp0}:log {rp0}:seq 0 0 100"),
        ("actor", "FCALL replay_create 1 {rp0}:meta x x 1 1 1 1 1 1"),
        ("actor", "GET {rp0}:c:s0@1:1"),
        ("actor", "GETRANGE {rp0}:c:s0@1:1 0 1"),
        ("actor", "XREAD STREAMS {rp0}:log 0"),
        ("actor", "FCALL replay_stats 1 elsewhere"),
        ("learner", "SET {rp0}:c:s0@1:1 forged"),
        ("learner", "FCALL replay_open 2 {rp0}:meta {rp0}:seq s0 0"),
        ("reader", "FCALL replay_settle 2 {rp0}:meta {rp0}:wake 1 1 1"),
        ("reader", "FCALL replay_evict 3 {rp0}:meta {rp0}:log {rp0}:seq 0 0 100"),
        ("reader", "FCALL replay_fence 1 {rp0}:meta"),
        ("reader", "XADD {rp0}:log * x 1"),
        ("reader", "XADD {rp0}:dead * x 1"),
        ("reader", "SET {rp0}:c:s0@1:1 forged"),
        ("reader", "DEL {rp0}:c:s0@1:1"),
        ("exporter", "FCALL replay_fence 1 {rp0}:meta"),
        ("exporter", "GETRANGE {rp0}:c:s0@1:1 0 1"),
        ("exporter", "HSET {rp0}:meta budget 0"),
        ("exporter", "CLIENT LIST"),
    ],
)
def test_role_may_not_do_the_work_of_another(
    role: RoleName, command: str, as_role: Callable[[RoleName], ReplayClient]
) -> None:
    as_role("learner").create(SCHEMA, LIMITS)
    with pytest.raises(ReplayAuthError):
        as_role(role)._command(*command.split())


def test_exporter_reads_what_metrics_need_and_no_secret(
    as_role: Callable[[RoleName], ReplayClient],
) -> None:
    as_role("learner").create(SCHEMA, LIMITS)
    insert_many(as_role("actor"), 0, 1)
    exporter = as_role("exporter")
    assert exporter.check() and exporter.stats().inserted_steps == 8
    commands = ["INFO all", "SLOWLOG GET 10", "LATENCY LATEST"]
    assert all(exporter._command(*line.split()) is not None for line in commands)


def test_refusals_say_what_is_missing(
    as_role: Callable[[RoleName], ReplayClient], guarded: EmbeddedServer
) -> None:
    cases = {
        guarded.url: "refuses connections without credentials: check user and password",
        guarded.url.replace("//", "//actor:wrong-word@"): "refuses these credentials",
        guarded.url.replace("//", "//nobody:wrong-word@"): "refuses these credentials",
    }
    for url, want in cases.items():
        client = ReplayClient(url)
        with pytest.raises(ReplayAuthError, match=want) as caught:
            client.check()
        assert "wrong-word" not in f"{caught.value} {client!r}"
        client.close()
    with pytest.raises(ReplayAuthError, match=r"FUNCTION.LIST: .* role learner or admin"):
        as_role("actor").create(SCHEMA, LIMITS)
    with pytest.raises(ReplayAuthError, match="run replay_fence: .* role learner or admin"):
        as_role("actor").acquire_fence()
    with pytest.raises(ReplayAuthError, match="CONFIG.SET: it takes credentials of the role admin"):
        as_role("learner")._command("CONFIG", "SET", "maxmemory", "1")
    with pytest.raises(ReplayAuthError, match="keeps this user from keys"):
        as_role("learner")._command("GETRANGE", "elsewhere", 0, 1)


def test_roles_with_a_command_are_named() -> None:
    assert roles_with("function|load") == ["learner", "admin"]
    assert roles_with("FLUSHALL") == ["admin"]
    assert roles_with("fcall|replay_settle") == ["learner", "admin"]


def test_acl_that_is_older_than_the_functions_is_told_from_a_wrong_role(
    as_role: Callable[[RoleName], ReplayClient],
) -> None:
    as_role("learner").create(SCHEMA, LIMITS)
    admin, learner = as_role("admin"), as_role("learner")
    rules = " ".join(word for word in acl_rules("learner").split() if word != "+hincrby")
    words = re.findall(r"\([^)]*\)|\S+", rules)
    admin._command("ACL", "SETUSER", "learner", "clearselectors", *words)
    try:
        with pytest.raises(ReplayAuthError, match="call replay_fence and not what it does"):
            learner.acquire_fence()
    finally:
        admin._command("ACL", "LOAD")


def test_acl_file_holds_no_password_and_closes_the_default_user() -> None:
    words: dict[RoleName, str] = {role: f"{role}-word" for role in ROLES}
    text = render_acl(words)
    assert text.startswith("user default off") and text.count("\nuser ") == len(ROLES)
    assert not any(word in text for word in words.values())


def everything_shown(server: EmbeddedServer, secrets: Path) -> str:
    """Return what other users and other programs can see of a server and of this process."""
    process = psutil.Process(server.process_id)
    shown = [*process.cmdline(), *psutil.Process().cmdline()]
    shown += [(server.directory / "server.log").read_text(), (secrets / "users.acl").read_text()]
    with redis.Redis.from_url(
        address_for(server.url, ReplayConfig(secrets=secrets), "admin"), decode_responses=True
    ) as admin:
        shown += [str(admin.config_get("*")), str(admin.info("all")), str(admin.client_list())]
        shown += [str(admin.slowlog_get(100)), str(admin.execute_command("ACL", "LIST"))]
    return "\n".join(shown)


def test_no_password_is_shown_anywhere(
    guarded: EmbeddedServer,
    secrets: Path,
    as_role: Callable[[RoleName], ReplayClient],
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.DEBUG)
    clients = [as_role("learner"), as_role("actor")]
    clients[0].create(SCHEMA, LIMITS)
    with pytest.raises(ReplayAuthError) as caught:
        clients[1].acquire_fence()
    said = capsys.readouterr()
    shown = [everything_shown(guarded, secrets), caplog.text, said.out, said.err]
    shown += [str(caught.value), repr(clients), repr(ReplayConfig(secrets=secrets))]
    for role in ROLES:
        word = read_password(password_file(secrets, role))
        assert len(word) >= 40
        assert not any(word in text for text in shown), role


@pytest.mark.parametrize(
    ("url", "secret", "shown"),
    [
        ("redis://:word@host:1", True, "redis://:***@host:1"),
        ("rediss://user:word@host", True, "rediss://user:***@host"),
        ("redis://host/0?password=word&db=1", True, "redis://host/0?password=***&db=1"),
        ("unix://:word@/run/x.sock", True, "unix://:***@/run/x.sock"),
        ("unix:///run/a:b@c/x.sock", False, "unix:///run/a:b@c/x.sock"),
        ("redis://user@host:6379", False, "redis://user@host:6379"),
        ("user:word@host", True, None),
    ],
)
def test_passwords_in_addresses_are_found_and_hidden(
    url: str, secret: bool, shown: str | None
) -> None:
    assert has_password(url) is secret
    if shown is not None:
        assert without_password(url) == shown


def test_password_file_that_others_can_read_or_that_is_empty_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "word"
    with pytest.raises(ReplayConfigError, match="cannot read the password file .*word"):
        read_password(path)
    path.write_text("\n")
    path.chmod(0o600)
    with pytest.raises(ReplayConfigError, match="is empty"):
        read_password(path)
    path.write_text("word\nmore\n")
    assert read_password(path) == "word"
    path.chmod(0o640)
    with pytest.raises(ReplayConfigError, match="mode 0640.*chmod 600"):
        read_password(path)


def test_password_file_serves_the_user_of_the_address(tmp_path: Path) -> None:
    path = tmp_path / "word"
    path.write_text("p@ss/w:rd\n")
    path.chmod(0o600)
    config = ReplayConfig(password_file=path)
    made = address_for("redis://me@localhost:1", config, "actor")
    options = redis.connection.parse_url(made)
    assert (options["username"], options["password"]) == ("me", "p@ss/w:rd")
    assert without_password(made) == "redis://me:***@localhost:1"
    with pytest.raises(ReplayConfigError, match="use rediss://"):
        address_for("redis://localhost:1", ReplayConfig(ca_file=path), "actor")
    with pytest.raises(ReplayConfigError, match="there is no certificate .*absent"):
        address_for("rediss://a:1", ReplayConfig(ca_file=tmp_path / "absent"), "actor")


@pytest.mark.parametrize(
    ("listen", "want"),
    [
        ("192.0.2.7:6400", "without a password: make secrets with `dreamfleet secrets DIR`"),
        ("replay.example:6400", "without a password"),
        ("0.0.0.0:6400", "every network of this machine"),
        ("[::]:6400", "every network of this machine"),
        ("127.0.0.1", "expected address:port"),
        ("127.0.0.1:99999", "expected address:port"),
    ],
)
def test_listening_for_everybody_is_refused(tmp_path: Path, listen: str, want: str) -> None:
    with pytest.raises(ReplayConfigError, match=want):
        EmbeddedServer(tmp_path, max_memory_bytes=2**26, listen=listen)


def test_listening_server_asks_for_a_password_where_there_are_secrets(
    tmp_path: Path, secrets: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        listen = f"127.0.0.1:{free.getsockname()[1]}"
    config = ReplayConfig(secrets=secrets)
    with EmbeddedServer(tmp_path, max_memory_bytes=2**26, listen=listen, secrets=secrets) as server:
        assert server.listen_url == f"redis://{listen}"
        anybody = ReplayClient(server.listen_url)
        with pytest.raises(ReplayAuthError, match="without credentials"):
            anybody.check()
        anybody.close()
        learner = ReplayClient(address_for(server.listen_url, config, "learner"))
        assert learner.create(SCHEMA, LIMITS)
        learner.close()


class TlsProxy:
    """Takes TLS from a client and passes it on in the clear to a unix socket."""

    def __init__(self, secrets: Path, target: str) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(secrets / "server.crt", secrets / "server.key")
        self._target = target.removeprefix("unix://")
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._context = context
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._open: list[socket.socket] = []
        self._threads[0].start()

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._listener.getsockname()[1])

    def close(self) -> None:
        """Close everything and end all threads."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for one in self._open:
            _hang_up(one)
        for thread in self._threads:
            thread.join(5)

    def _accept(self) -> None:
        while True:
            try:
                plain, _ = self._listener.accept()
            except OSError:
                return
            plain.settimeout(10)
            self._open.append(plain)
            thread = threading.Thread(target=self._serve, args=(plain,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, plain: socket.socket) -> None:
        try:
            client = self._context.wrap_socket(plain, server_side=True)
        except OSError:
            _hang_up(plain)
            return
        server = socket.socket(socket.AF_UNIX)
        server.connect(self._target)
        self._open += [client, server]
        try:
            while True:
                ready = [client] if client.pending() else select.select([client, server], [], [])[0]
                for source, sink in ((client, server), (server, client)):
                    if source in ready:
                        data = source.recv(65536)
                        if not data:
                            raise ConnectionResetError
                        sink.sendall(data)
        except OSError:
            pass
        _hang_up(client)
        _hang_up(server)


def _hang_up(one: socket.socket) -> None:
    try:
        one.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
    one.close()


@contextmanager
def tls_proxy(secrets: Path, target: str) -> Iterator[TlsProxy]:
    proxy = TlsProxy(secrets, target)
    try:
        yield proxy
    finally:
        proxy.close()


def check(url: str, config: ReplayConfig) -> str:
    client = ReplayClient(address_for(url, config, "learner"))
    try:
        return client.check()
    finally:
        client.close()


def test_tls_is_verified_by_default(guarded: EmbeddedServer, secrets: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    make_secrets(SecretsOptions(directory=foreign))
    known = ReplayConfig(secrets=secrets)
    with tls_proxy(secrets, guarded.url) as proxy:
        assert check(f"rediss://localhost:{proxy.port}", known)
        assert check(f"rediss://127.0.0.1:{proxy.port}", known)
        with pytest.raises(ReplayAuthError, match="not trusted .*--replay.ca-file"):
            check(f"rediss://localhost:{proxy.port}", replace(known, ca_file=foreign / "ca.crt"))
        word = password_file(secrets, "learner")
        with pytest.raises(ReplayAuthError, match="not trusted"):
            check(f"rediss://learner@localhost:{proxy.port}", ReplayConfig(password_file=word))


def test_expired_certificate_is_refused(
    guarded: EmbeddedServer, secrets: Path, tmp_path: Path
) -> None:
    for name, text in certificates(("localhost",), days=0).items():
        (tmp_path / name).write_text(text)
    known = ReplayConfig(secrets=secrets, ca_file=tmp_path / "ca.crt")
    with tls_proxy(tmp_path, guarded.url) as proxy:
        with pytest.raises(ReplayAuthError, match=r"not trusted \(certificate has expired\)"):
            check(f"rediss://localhost:{proxy.port}", known)


def test_silence_of_a_server_without_tls_gets_a_hint(tmp_path: Path, secrets: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        listen = f"127.0.0.1:{free.getsockname()[1]}"
    with EmbeddedServer(tmp_path, max_memory_bytes=2**26, listen=listen, secrets=secrets):
        with pytest.raises(ReplayTimeout, match="is that its port for TLS"):
            check(f"rediss://{listen}", ReplayConfig(secrets=secrets))


def test_certificate_for_another_host_is_refused(
    guarded: EmbeddedServer, secrets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = socket.getaddrinfo

    def resolve(host: str, *rest: object, **named: object) -> object:
        return real("127.0.0.1" if host.endswith(".example") else host, *rest, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with tls_proxy(secrets, guarded.url) as proxy:
        assert check(f"rediss://replay.example:{proxy.port}", ReplayConfig(secrets=secrets))
        with pytest.raises(ReplayAuthError, match="not trusted .*[Hh]ostname mismatch"):
            check(f"rediss://other.example:{proxy.port}", ReplayConfig(secrets=secrets))


def test_refusal_inside_a_pipeline_ends_the_uploader_and_names_no_password(
    as_role: Callable[[RoleName], ReplayClient],
) -> None:
    as_role("learner").create(SCHEMA, LIMITS)
    with pytest.raises(ReplayAuthError) as caught:
        insert(as_role("exporter"), chunk(0, 1))
    assert re.search(r"role actor or admin|keys or channels", str(caught.value))
