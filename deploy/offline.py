"""`dreamfleet train --offline SOURCE`: a learner alone, which reads a replay and changes nothing.

::

    archive ──┐
    run dir ──┼─ log ─▶ mirror ─ windows ─▶ learner ─▶ checkpoints
    server ───┘  (read only: no settlement, no fence, no weights published)
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.config import FILE_NAME, ConfigError, TrainConfig, config_hash, load_config, save_config
from deploy.interrupts import Interrupts
from deploy.launch import (
    build_agent,
    choose_device,
    make_recorder,
    make_step,
    record_schema,
    reporting,
    resume,
)
from deploy.preflight import require_startable
from deploy.probe import EnvFacts, probe
from deploy.progress import console, summary
from deploy.replaycmd import Access, open_replays
from deploy.rundir import begin, run_directory
from replay_service import Archive, ArchiveLog, Mirror, Schema, ServerLog
from replay_service.archive import MANIFEST
from replay_service.tail import LogSource

if TYPE_CHECKING:
    from learner.learner import Learner

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Source:
    """A replay to read."""

    log: LogSource | Sequence[LogSource]
    """Its chunks; of several servers the log of each."""
    schema: Schema
    """Their columns."""
    steps: int | None
    """Steps that it holds; None where it may grow."""


def source_config(source: str) -> TrainConfig | None:
    """Return the configuration that a run directory or an archive brings, None if there is none."""
    saved = Path(source) / FILE_NAME
    if "://" in source or not saved.is_file():
        return None
    return load_config(saved)


def offline_default(source: str, chosen: TrainConfig | None) -> TrainConfig | None:
    """Return what an offline run starts from: a chosen preset, or else the source's agent.

    The environment is the source's in both cases; None if the source does not say anything.
    """
    known = source_config(source)
    if known is None:
        return chosen
    if chosen is None:
        return replace(known, run_dir=None, offline=source, lockstep=False)
    return replace(chosen, env=known.env, environment=known.environment, offline=source)


def train_offline(config: TrainConfig) -> int:
    """Train, or continue, an agent on a replay that others have filled; return its exit code.

    Nothing is acted, and the replay is left as it is: several of these, of different agents, may
    read one replay, also while a run fills it. Returns 0 when all updates are done, and 128 + the
    signal when a signal stopped it.

    Raises:
        ConfigError: the source has no steps, no whole window, or not the columns that the agent
            needs for this environment; the message says which.
        ReplayError, LearnerError: the message says what to do.
    """
    assert config.offline is not None
    interrupts, outcome = Interrupts(), ""
    _require_other_run(config)
    with ExitStack() as stack:
        stack.enter_context(interrupts)
        run = stack.enter_context(run_directory(config))
        facts = probe(config.env, config.environment)
        require_startable(config, facts, choose_device(config.device))
        source = stack.enter_context(open_source(config))
        wanted = record_schema(config, facts)
        require_columns(config, wanted, source.schema)
        save_config(config, run / FILE_NAME)
        mirror = make_mirror(config, source, wanted, run)
        mirror.start()
        stack.callback(mirror.stop)
        learner = make_learner(config, run, facts, mirror)
        stack.callback(learner.recorder.close)
        resume(learner, run, source.steps)
        require_windows(config, mirror)
        begin(run)
        with (
            reporting(learner, list, run, f"{config.env} · {run} · offline"),
            interrupts.graceful(learner.stop.set),
        ):
            outcome = learner.run()
    if outcome:
        finish(config, run, learner)
    return 0 if outcome == "finished" else interrupts.exit_code


@contextmanager
def open_source(config: TrainConfig) -> Iterator[Source]:
    """Open the replay to read: an archive, a run directory (running or not), or an address.

    Raises:
        ConfigError: there is none.
        ReplayError: it cannot be read.
    """
    assert config.offline is not None
    path = Path(config.offline)
    if "://" not in config.offline and (path / MANIFEST).is_file():
        archive = Archive(path)
        if damaged := archive.damaged_files():
            raise ConfigError(
                f"the archive {path} is damaged: the contents of {', '.join(damaged)} are not what "
                "was exported; use a copy"
            )
        yield Source(log=ArchiveLog(archive), schema=archive.schema, steps=archive.steps)
        return
    known = source_config(config.offline)
    if known is not None and known.offline is not None:
        raise ConfigError(
            f"{path} has no replay of its own: it was trained offline from {known.offline}; give "
            "that instead"
        )
    knobs = config.replay
    access = Access(secrets=knobs.secrets, password_file=knobs.password_file, ca_file=knobs.ca_file)
    with open_replays(config.offline, access, role="reader") as (clients, _):
        yield Source(
            log=[ServerLog(client) for client in clients], schema=clients[0].schema(), steps=None
        )


def require_columns(config: TrainConfig, wanted: Schema, found: Schema) -> None:
    """Raise ConfigError, naming each of them, if columns that the agent reads are not there."""
    from learner.learner import LATENTS

    notes, latents = [], False
    for column in wanted.columns:
        there = found.by_name.get(column.name)
        if there != column:
            notes.append(f"{column} ({'missing' if there is None else f'there it is {there}'})")
            latents |= column.name in LATENTS
    if not notes:
        return
    hints = []
    if latents:
        hints.append(
            "deter and stoch are the latents that an agent of this kind and size stores while it "
            "acts: --agent.context 0 does without them"
        )
    if len(notes) > 2 * latents:
        hints.append(
            "observations and actions must be those of --env and --environment.*: name the "
            "environment with which the replay was filled"
        )
    raise ConfigError(
        f"the replay in {config.offline} cannot train {config.agent.name} on {config.env}: it "
        f"lacks {'; '.join(notes)}; {'; '.join(hints)}"
    )


def make_mirror(config: TrainConfig, source: Source, wanted: Schema, run: Path) -> Mirror:
    """Return a mirror of the columns that the agent reads."""
    window = config.learner.batch_length + config.agent.context
    capacity = config.replay.capacity_steps
    if source.steps is not None and source.steps > capacity:
        log.warning(
            "offline_truncated the archive has %d steps and the newest %d are kept; raise "
            "--replay.capacity-steps",
            source.steps,
            capacity,
        )
    if source.steps is not None:
        capacity = max(window, min(capacity, source.steps))
    return Mirror(
        source.log,
        source.schema,
        keep=wanted.by_name,
        capacity_steps=capacity,
        window_steps=window,
        page_steps=config.replay.page_steps,
        placement=config.replay.placement,
        device=choose_device(config.device),
        directory=run / "mirror",
        online=config.replay.online,
        sampling=config.replay.sampling,
    )


def require_windows(config: TrainConfig, mirror: Mirror) -> None:
    """Raise ConfigError if what was read holds nothing to train on."""
    if mirror.valid_starts:
        return
    if not mirror.size_steps:
        raise ConfigError(f"the replay in {config.offline} is empty: collect steps first")
    raise ConfigError(
        f"the replay in {config.offline} holds {mirror.size_steps} steps and no stretch of "
        f"{mirror.window_steps} (learner.batch_length + agent.context) in one stream: lower "
        "--learner.batch-length, or collect more"
    )


def make_learner(config: TrainConfig, run: Path, facts: EnvFacts, mirror: Any) -> Learner:
    """Build the agent, and a learner around it that only reads."""
    from learner.learner import Learner, RunFacts
    from learner.offline import NoAccount, NoPublisher, NoServer, OfflinePace

    knobs, digest, target = config.learner, config_hash(config), config.target_updates
    agent = build_agent(config, facts, choose_device(config.device))
    return Learner(
        knobs,
        RunFacts(
            directory=run,
            seed=config.seed,
            target_steps=0,
            config_hash=digest,
            target_updates=target,
        ),
        agent=agent,
        step=make_step(config, agent, mirror),
        mirror=mirror,
        client=NoServer(),
        limiter=NoAccount(knobs.batch_size * knobs.batch_length),
        pace=OfflinePace(mirror, target),
        publisher=NoPublisher(),
        recorder=make_recorder(config, run, facts, offline=True),
        fence=0,
    )


def finish(config: TrainConfig, run: Path, learner: Learner) -> None:
    """Draw the losses and show how the run went and what to try next."""
    from learner.report import write_losses

    title = f"{config.env} · {config.agent.name} · offline"
    write_losses(run / "metrics.jsonl", run / "curve.png", title)
    console().print(summary(run, asdict(learner.snapshot()), config.env))


def _require_other_run(config: TrainConfig) -> None:
    assert config.offline is not None
    if "://" not in config.offline and Path(config.offline).resolve() == config.directory.resolve():
        raise ConfigError(
            f"--offline {config.offline} is the run directory itself, and an offline run keeps "
            "checkpoints of its own; choose another --run-dir"
        )
