"""`dreamfleet replay check|export|import`: what a replay holds, and moving it."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import psutil
import tyro
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from deploy.config import EMBEDDED, FILE_NAME, ConfigError, TrainConfig, load_config
from deploy.progress import console, count, duration
from deploy.status import require_run
from replay_service import (
    Archive,
    CheckReport,
    CreditLimiter,
    ReplayClient,
    ReplayConfig,
    ReplayStats,
    ReplayTimeout,
    ReplayUnavailable,
    address_for,
    check_archive,
    check_server,
    create_like,
    export_archive,
    import_archive,
    plan_limits,
    split_addresses,
)
from replay_service.archive import MANIFEST
from replay_service.invariants import NAMES, Progress, judge_account
from replay_service.security import RoleName, password_file

log = logging.getLogger(__name__)

MOST_SHOWN = 20
"""Violations that are shown; all are counted."""
_SOCKET = re.compile(r"unixsocket[: ](/\S+)")


@dataclass(frozen=True, kw_only=True)
class Access:
    """How to get into a server that is named by its address; a run knows its own way."""

    secrets: Path | None = None
    """Directory made by dreamfleet secrets, whose admin to be at the address."""
    password_file: Path | None = None
    """File whose first line is the password for the user in the address (redis://user@host:port),
    so that it stands in no process list."""
    ca_file: Path | None = None
    """Certificate that must have signed the server's, for rediss:// addresses."""

    def config(self) -> ReplayConfig:
        """Return the same as a replay's configuration has it."""
        return ReplayConfig(
            secrets=self.secrets, password_file=self.password_file, ca_file=self.ca_file
        )


@dataclass(frozen=True, kw_only=True)
class ReplayCheckOptions(Access):
    """Check that a replay keeps what it promises, without changing it; exit code 1 if not."""

    target: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR|URL|ARCHIVE")]
    """Run directory (its server is started for the check if it does not run), address of a server
    or of several with commas between them, or directory of an archive."""
    contents: bool = True
    """Read every chunk; --no-contents looks at the log, sizes and counters alone."""
    timeout_s: float = 600.0
    """Seconds after which the check gives up."""


@dataclass(frozen=True, kw_only=True)
class ReplayExportOptions(Access):
    """Write everything that a replay retains to a directory of .npy files."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR|URL")]
    """Run directory, whether it runs or not, or address of a server, or of several with commas
    between them."""
    archive: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="ARCHIVE")]
    """Directory to make; of several servers each gets one inside it, shard-0 and so on."""
    timeout_s: float = 3600.0
    """Seconds after which the export gives up."""


@dataclass(frozen=True, kw_only=True)
class ReplayImportOptions(Access):
    """Put an archive into a replay; doing it again changes nothing."""

    archive: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="ARCHIVE")]
    """Directory of the archive."""
    target: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR|URL")]
    """Run directory, or address of a server. A new directory becomes a run with the configuration
    that the archive was exported with."""
    prefix: str = ""
    """Put before the name of every stream, to tell several imports apart."""
    patience_s: float = 60.0
    """Seconds to wait for a learner while the train ratio admits nothing more."""
    timeout_s: float = 3600.0
    """Seconds after which the import gives up; doing it again continues."""


@dataclass(frozen=True, kw_only=True)
class ReplayServeOptions(Access):
    """Prepare a server for learners and actors, and serve /metrics, /healthz and /sd."""

    url: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="URL")]
    """Address of the server. With --secrets this is admin to load functions, and exporter then."""
    listen: str = "127.0.0.1:9100"
    """address:port to listen at; beyond loopback it needs a token."""
    token_file: Path | None = None
    """File whose first line readers must send as a bearer token, readable by its owner alone;
    /healthz answers without."""
    host: str | None = None
    """Name or address at which Prometheus reaches this machine, if it is not the one listened
    at."""

    def __post_init__(self) -> None:
        if "://" not in self.url:
            raise ConfigError(
                f"replay serve takes the address of a server, such as redis://host:6379, got "
                f"{self.url!r}"
            )
        if len(split_addresses(self.url)) > 1:
            raise ConfigError(
                f"replay serve looks after one server, got {self.url!r}: start it once for each"
            )
        address_of(self.listen)


@dataclass(frozen=True, kw_only=True)
class Action:
    """One word after `dreamfleet replay`."""

    summary: str
    """What it does."""
    options: type
    """What it takes."""
    run: Callable[[Any], int]
    """Does it, and returns the exit code."""


def address_of(listen: str) -> tuple[str, int]:
    """Return host and port of ``address:port``. Raises ConfigError if it is not that."""
    host, _, digits = listen.rpartition(":")
    if not host or not digits.isdecimal() or int(digits) >= 2**16:
        raise ConfigError(f"--listen is {listen!r}, expected address:port, such as 127.0.0.1:9100")
    return host.strip("[]"), int(digits)


def check(options: ReplayCheckOptions) -> int:
    """Check a replay and print what was found. Returns 0 if nothing was, else 1.

    Raises:
        ConfigError, ReplayError: there is nothing to check, or it cannot be reached.
    """
    path = Path(options.target)
    with _bar("checking") as progress:
        if "://" not in options.target and (path / MANIFEST).is_file():
            reports = [check_archive(Archive(path), timeout_s=options.timeout_s, progress=progress)]
        else:
            with open_replays(options.target, options) as (clients, config):
                reports = _check_servers(clients, config, options, progress)
    for report in reports:
        _show(report)
    return 0 if all(report.ok for report in reports) else 1


def _check_servers(
    clients: Sequence[ReplayClient],
    config: TrainConfig | None,
    options: ReplayCheckOptions,
    progress: Progress,
) -> list[CheckReport]:
    """Check each server; the account, which is one of all, is judged with the first."""
    account = _account(config, clients) if config else None
    before = [client.stats() for client in clients]
    reports = [
        check_server(
            client,
            contents=options.contents,
            account=account if len(clients) == 1 else None,
            timeout_s=options.timeout_s,
            progress=progress,
        )
        for client in clients
    ]
    if account is not None and len(clients) > 1:
        first, after = reports[0], [client.stats() for client in clients]
        stats = ReplayStats.together(before), ReplayStats.together(after)
        first.notes += judge_account(account, *stats, first.findings)
        first.scope["D"] = "account of all servers and admission"
    return reports


def export(options: ReplayExportOptions) -> int:
    """Export a replay and print what was written. Raises ReplayError if it cannot be."""
    with _bar("exporting") as progress, open_replays(options.source, options) as (clients, config):
        run = Path(options.source)
        extra = {FILE_NAME: (run / FILE_NAME).read_bytes()} if config else {}
        places = {options.archive: clients[0]}
        if len(clients) > 1:
            options.archive.mkdir(parents=True, exist_ok=True)
            # A shard to which no stream belongs has nothing to write.
            held = [bool(client.stats().chunks) for client in clients]
            places = {
                options.archive / f"shard-{number}": client
                for number, client in enumerate(clients)
                if held[number] or not any(held)
            }
        archives = [
            export_archive(
                client, place, extra=extra, timeout_s=options.timeout_s, progress=progress
            )
            for place, client in places.items()
        ]
    for made in archives:
        console().print(
            f"{count(made.steps)} steps of {len(made.streams)} streams are in {made.directory}; "
            f"contents {made.contents_sha256[:16]}",
            soft_wrap=True,
        )
    return 0


def import_(options: ReplayImportOptions) -> int:
    """Import an archive and print what was inserted. Raises ReplayError if it cannot be."""
    archive, run = Archive(options.archive), Path(options.target)
    if "://" not in options.target and not (run / FILE_NAME).exists():
        _begin_run(archive, run)
    with (
        _bar("importing") as progress,
        open_replay(options.target, options, create=True) as (client, _),
    ):
        create_like(client, archive)
        result = import_archive(
            client,
            archive,
            prefix=options.prefix,
            patience_s=options.patience_s,
            timeout_s=options.timeout_s,
            progress=progress,
        )
    console().print(
        f"{count(result.steps)} steps in {result.chunks} chunks of {result.streams} streams were "
        f"inserted, {result.present_chunks} chunks were already there ({duration(result.seconds)})",
        soft_wrap=True,
    )
    return 0


def serve(options: ReplayServeOptions) -> int:
    """Serve until a signal comes. Raises ReplayError, OSError if it cannot begin."""
    from deploy.servecmd import serve_replay

    return serve_replay(options)


ACTIONS: dict[str, Action] = {
    "check": Action(summary="check what a replay promises", options=ReplayCheckOptions, run=check),
    "export": Action(
        summary="write a replay to files for numpy, pandas or pyarrow",
        options=ReplayExportOptions,
        run=export,
    ),
    "import": Action(
        summary="put such files into a replay", options=ReplayImportOptions, run=import_
    ),
    "serve": Action(
        summary="prepare a server, and serve its metrics, health and targets",
        options=ReplayServeOptions,
        run=serve,
    ),
}


@contextmanager
def open_replay(
    target: str, access: Access, *, create: bool = False
) -> Iterator[tuple[ReplayClient, TrainConfig | None]]:
    """Yield what `open_replays` does, where there is one server; raise ConfigError otherwise."""
    with open_replays(target, access, create=create) as (clients, config):
        if len(clients) > 1:
            raise ConfigError(
                f"{target} is on {len(clients)} servers, and this is done with one: name one of "
                + ", ".join(client.address for client in clients)
            )
        yield clients[0], config


@contextmanager
def open_replays(
    target: str, access: Access, *, create: bool = False, role: RoleName = "admin"
) -> Iterator[tuple[list[ReplayClient], TrainConfig | None]]:
    """Yield a client of every server of a run directory or address, and the run's configuration.

    The embedded server of a run that is not running is started for the time of the block.

    Args:
        target, access: where it is, and the secrets of an address.
        create: whether a run without a replay will do.
        role: of the clients; admin where the secrets are older than it.

    Raises:
        ConfigError: there is no run, or it has no replay yet (unless `create`).
        ReplayError: the server cannot be used.
    """
    from deploy.servers import replay_server, resolved

    with ExitStack() as stack:
        if "://" in target:
            url, config, knobs = target, None, access.config()
        else:
            run = require_run(Path(target))
            config = load_config(run / FILE_NAME)
            knobs, embedded = config.replay, EMBEDDED in config.addresses
            found = _running_server(run / "replay", knobs, role) if embedded else None
            if found is None and embedded and not create:
                _require_data(run)
            url = (
                resolved(config, found)
                if found
                else stack.enter_context(replay_server(config, run))
            )
        clients = list[ReplayClient]()
        for address in split_addresses(url):
            clients.append(_client(address, knobs, role))
            stack.callback(clients[-1].close)
            clients[-1].check()
        yield clients, config


def _client(address: str, knobs: ReplayConfig, role: RoleName) -> ReplayClient:
    if knobs.secrets and not password_file(knobs.secrets, role).is_file():
        role = "admin"
    return ReplayClient(address_for(address, knobs, role))


def _running_server(directory: Path, knobs: ReplayConfig, role: RoleName) -> str | None:
    """Return the address of a server that runs on a directory, None if none answers."""
    places = [directory / "redis.sock"]
    # A socket whose path would be too long is elsewhere; the server's command line says where.
    for process in psutil.process_iter(["cwd", "cmdline"]):
        if process.info["cwd"] == str(directory.resolve()):
            words = " ".join(process.info["cmdline"] or [])
            places += [Path(place) for place in _SOCKET.findall(words)]
    for place in filter(Path.is_socket, places):
        url = f"unix://{place}"
        client = _client(url, knobs, role)
        try:
            client.check()
            return url
        except ReplayTimeout:
            raise
        except ReplayUnavailable as error:
            log.info("server_absent socket=%s reason=%s", place, error)
        finally:
            client.close()
    return None


def _require_data(run: Path) -> None:
    if not (run / "replay").is_dir():
        raise ConfigError(f"the run in {run} has no replay yet: it ended before it began to train")


def _begin_run(archive: Archive, run: Path) -> None:
    """Make a new run directory with the configuration that came with an archive."""
    saved = archive.directory / FILE_NAME
    if run.exists() and any(run.iterdir()):
        raise ConfigError(f"{run} is not empty and holds no run; choose another directory")
    if not saved.is_file():
        raise ConfigError(
            f"there is no run in {run}, and {archive.directory} brings no {FILE_NAME} to begin one "
            "with; give the directory of a run, or the address of a server"
        )
    load_config(saved)
    run.mkdir(parents=True, exist_ok=True)
    (run / FILE_NAME).write_bytes(saved.read_bytes())


def _account(config: TrainConfig, clients: Sequence[ReplayClient]) -> CreditLimiter:
    """Return the train ratio's account of a run."""
    return plan_limits(
        config.replay,
        clients[0].schema(),
        train_ratio=config.train_ratio,
        batch_size=config.learner.batch_size,
        batch_length=config.learner.batch_length,
        window_steps=config.learner.batch_length + config.agent.context,
        streams=config.actors * config.envs_per_actor,
        shards=len(clients),
    )[1]


@contextmanager
def _bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show how far a job is while the block runs; yield what it reports to."""
    with Bar(console=console(), transient=True, disable=not console().is_terminal) as bar:
        task = bar.add_task(f"{what} …", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _show(report: CheckReport) -> None:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for letter, name in NAMES.items():
        found, scope = report.findings.found[letter], report.scope[letter]
        if found:
            state = Text(f"{found} violations", "bold red")
        elif scope.startswith("needs"):
            state = Text("not checked", "dim")
        else:
            state = Text("ok", "bold green")
        table.add_row(letter, name, state, Text(scope, "dim"))
    out = console()
    out.print(Text(report.source), soft_wrap=True)
    out.print(table)
    for violation in report.violations[:MOST_SHOWN]:
        out.print(Text(f"  {violation.invariant}  {violation}"), soft_wrap=True)
    hidden = report.findings.found.total() - min(len(report.violations), MOST_SHOWN)
    if hidden:
        out.print(f"  … and {hidden} more")
    for note in report.notes:
        out.print(Text(f"note: {note}"), soft_wrap=True)
    contents = report.contents_sha256[:16] or "not read"
    out.print(
        f"{count(report.steps)} steps in {count(report.chunks)} chunks of "
        f"{count(len(report.streams))} streams, {report.size_bytes / 1e6:,.1f} MB, contents "
        f"{contents}, checked in {duration(report.seconds)}",
        soft_wrap=True,
    )
