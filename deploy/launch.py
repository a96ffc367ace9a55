"""The topology of a run, top to bottom: what is started, what is connected to what, what is left.

::

    environments ─▶ actors ─ chunks ─▶ replay server ─ log ─▶ mirror ─ windows ─▶ learner
                       ▲                     ▲ budget                              │
                       └────── WeightHub ◀───┴──────── weights, settlement ────────┘
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.cluster import actor_resources, ray_cluster, this_node
from deploy.config import FILE_NAME, ConfigError, TrainConfig, config_hash, save_config
from deploy.interrupts import Interrupts
from deploy.join import Joining
from deploy.preflight import require_startable
from deploy.probe import EnvFacts, probe
from deploy.progress import console, follow, summary
from deploy.rundir import begin, run_directory, run_id
from deploy.scale import heed_order
from deploy.sentinel import Sentinel
from deploy.servers import (
    connect,
    create_replay,
    look_after,
    owner_of,
    replay_server,
    servers_here,
    servers_of,
    servers_outside,
    take_fence,
    with_joined,
)
from deploy.status import STATUS_FILE
from replay_service import (
    Column,
    CreditLimiter,
    Mirror,
    ReplayClient,
    Schema,
    ShardedClient,
    estimate_memory,
    listed,
    plan_limits,
    with_absolute_paths,
)

if TYPE_CHECKING:
    from deploy.crew import Crew, Standing
    from dreamer.agent import Agent
    from learner.checkpoint import Checkpoint
    from learner.learner import Learner
    from learner.record import Recorder
    from learner.step import UpdateStep

log = logging.getLogger(__name__)

DRAIN_S = 5.0
"""Time in which actors may hand over what they hold when a run ends."""
STATUS_EVERY_S = 1.0
REBUILDING_EVERY_S = 2.0
"""How often a run that is continued says how far its mirror is."""
PUBLISH_S = 120.0
"""Time in which the hub must have answered; the first time it may still be starting."""


def train(config: TrainConfig) -> int:
    """Train, or continue, the run that the configuration describes, and return its exit code.

    Starts or connects to everything, and takes down again what it has started, whatever ends the
    run. Returns 0 when the target is reached, and 128 + the signal when a signal stopped it.

    Raises:
        ConfigError, ReplayError, ClusterError, LearnerError: the message says what to do.
    """
    interrupts, outcome = Interrupts(), ""
    with ExitStack() as stack:
        stack.enter_context(interrupts)
        run = stack.enter_context(run_directory(config))
        config = with_joined(config, run)
        sentinel = stack.enter_context(Sentinel())

        # What is learnt from what
        facts, device = probe(config.env, config.environment), choose_device(config.device)
        require_startable(config, facts, device)
        schema, streams = record_schema(config, facts), config.actors * config.envs_per_actor
        window = config.learner.batch_length + config.agent.context
        limits, limiter = plan_limits(
            config.replay,
            schema,
            train_ratio=config.train_ratio,
            batch_size=config.learner.batch_size,
            batch_length=config.learner.batch_length,
            window_steps=window,
            streams=streams,
            shards=len(config.addresses),
        )
        check_memory(config, schema, streams, device, run)
        save_config(config, run / FILE_NAME)

        # Replay: the server with the log, and the learner's mirror of it
        url = stack.enter_context(replay_server(config, run))
        clients = stack.enter_context(ExitStack())
        client = clients.enter_context(closing(connect(config, url, owner_of(run))))
        limits = create_replay(
            client,
            schema,
            limits,
            run,
            take_over=config.replay.take_over,
            outside=servers_outside(config, client),
        )
        mirror = make_mirror(config, client, schema, window, device, run)
        mirror.start()
        stack.callback(mirror.stop)

        # Ray: the hub that hands out weights, and the actors that use them
        stack.enter_context(
            ray_cluster(config.ray, cpus=config.actors + config.eval.actors + 1, sentinel=sentinel)
        )
        interrupts.reinstall()
        standing = standing_crew(config, run)
        hub = weight_hub(run, standing)
        fleet = make_fleet(config, run, facts, schema, client, hub, url, standing)

        # The learner, from where it was
        learner = make_learner(config, run, facts, mirror, client, limiter, hub, fleet, device)
        learner.reseeder = look_after(config, url, learner, limits)
        joining = Joining(config, run, url, schema, limits, learner, fleet, clients)
        stack.callback(learner.recorder.close)
        export_fleet(learner, fleet)
        stack.enter_context(findable(config, client, learner))
        count_on(learner, resume(learner, run, client.stats().size_steps))
        stack.push(lambda _, error, __: fleet.end(DRAIN_S, leave=leaves(config, interrupts, error)))
        begin(run)
        fleet.start(learner.stop.set)
        with reporting(learner, lambda: heeded(run, fleet, joining), run, f"{config.env} · {run}"):
            with interrupts.graceful(learner.stop.set):
                outcome = learner.run()
            fleet.check()
    if outcome:
        finish(config, run, learner)
    return 0 if outcome == "finished" else interrupts.exit_code


def record_schema(config: TrainConfig, facts: EnvFacts) -> Schema:
    """Return the columns of the replay: what the environment emits and what the agent stores."""
    from dreamer.policy import record_columns

    columns = record_columns(config.agent, facts.obs_space, facts.action_space)
    return Schema(tuple(Column(*column) for column in columns))


def choose_device(wanted: str) -> str:
    """Return the device that the learner computes on. Raises ConfigError if it is not there."""
    import torch

    there = torch.cuda.is_available()
    if wanted == "auto":
        return "cuda" if there else "cpu"
    if wanted.startswith("cuda"):
        number = torch.device(wanted).index or 0
        if not there or number >= torch.cuda.device_count():
            found = torch.cuda.device_count() if there else 0
            raise ConfigError(
                f"--device {wanted} is not there: torch sees {found} CUDA devices; use --device "
                "auto or cpu, and `dreamfleet doctor` to see why"
            )
    return wanted


def check_memory(config: TrainConfig, schema: Schema, streams: int, device: str, run: Path) -> None:
    """Refuse a run that will not fit, with the arithmetic; say what it needs otherwise."""
    import shutil

    import torch

    from replay_service.memory import available_ram_bytes

    plan = estimate_memory(
        schema,
        config.replay,
        streams=streams,
        writers=config.actors,
        servers=servers_here(config),
    )
    free = {"ram": available_ram_bytes(), "disk": shutil.disk_usage(run).free, "cuda": 0}
    if device.startswith("cuda"):
        free["cuda"] = torch.cuda.mem_get_info(device)[0]
    placement: str = config.replay.placement
    if placement == "auto":
        # The mirror looks for a place by itself; here only what always needs RAM is checked.
        fits = [name for name in ("cuda", "ram", "disk") if plan.mirror_bytes <= free[name] * 0.6]
        placement = fits[0] if fits else "ram"
    plan.check(free, placement)
    log.info("memory_planned %s", plan.describe())
    for note in plan.notes:
        log.warning("memory_note %s", note)


def make_mirror(
    config: TrainConfig,
    client: ReplayClient | ShardedClient,
    schema: Schema,
    window: int,
    device: str,
    run: Path,
) -> Mirror:
    """Return the learner's mirror of all servers, for windows of so many steps."""
    return Mirror(
        servers_of(client),
        schema,
        capacity_steps=config.replay.capacity_steps,
        window_steps=window,
        page_steps=config.replay.page_steps,
        placement=config.replay.placement,
        device=device,
        directory=run / "mirror",
        online=config.replay.online,
        sampling=config.replay.sampling,
    )


def standing_crew(config: TrainConfig, run: Path) -> Standing | None:
    """Return how the actors outlive this process; None where Ray, or lockstep, ends with it."""
    from deploy.crew import Standing

    if config.ray == "local" or config.lockstep:
        return None
    return Standing(run_id=run_id(run), config=config.fleet)


def leaves(config: TrainConfig, interrupts: Interrupts, error: BaseException | None) -> bool:
    """Whether a run that ends now leaves its actors to the next learner of its directory.

    A signal does if that is wished; a learner that fails does, for it may be started again. A run
    that has reached its target, or whose actors cannot work, does not. What has another learner
    already is left to it, whatever else ends this one.
    """
    from actors.fleet import FleetError
    from learner.learner import LearnerReplaced

    if isinstance(error, LearnerReplaced):
        return True
    if interrupts.received:
        return config.fleet.keep
    return error is not None and not isinstance(error, FleetError)


def weight_hub(run: Path, standing: Standing | None) -> Any:
    """Start the hub on this node, or take over the one that the last learner has left.

    The newest weights are kept in the run directory.
    """
    from actors.hub import start_hub
    from actors.roster import standing_hub

    directory = run.absolute() / "weights"
    if standing is None:
        return start_hub(directory, this_node())
    return standing_hub(
        standing.namespace, str(directory), this_node(), standing.config.orphan_after_s
    )


def make_fleet(
    config: TrainConfig,
    run: Path,
    facts: EnvFacts,
    schema: Schema,
    client: ReplayClient | ShardedClient,
    hub: Any,
    url: str,
    standing: Standing | None,
) -> Crew:
    """Describe the actors; they start when the learner is ready.

    Of the replay server they get the address alone: each reads its password from a file.
    """
    from actors.actor import ActorSpec
    from actors.fleet import Supervision
    from deploy.crew import Crew

    token = config.actor.metrics_token_file
    spec = ActorSpec(
        run=config.preset,
        shown_as=run.name,
        env_id=config.env,
        envs=config.envs_per_actor,
        environment=config.environment,
        # An actor runs in another directory.
        actor=replace(config.actor, metrics_token_file=token and token.absolute()),
        agent=config.agent,
        obs_space=facts.obs_space,
        action_space=facts.action_space,
        schema=schema.to_dict(),
        replay=with_absolute_paths(config.replay),
        replay_url=url,
        seed=config.seed,
        lockstep=config.lockstep,
    )
    return Crew(
        spec,
        hub,
        client,
        actors=config.actors,
        evaluation=config.eval,
        # A private Ray has one node, and nothing to decide: any number of actors may join later.
        cpus_per_actor=0.0 if config.ray == "local" else Supervision.cpus_per_actor,
        resources=actor_resources(config.actors + config.eval.actors),
        standing=standing,
    )


def build_agent(config: TrainConfig, facts: EnvFacts, device: str) -> Agent:
    """Build the agent with fresh parameters on its device, and set torch up for it."""
    import torch

    from dreamer.agent import make_agent
    from learner.tuning import tune_for

    if config.learner.threads:
        torch.set_num_threads(config.learner.threads)
    tune_for(device)
    torch.manual_seed(config.seed)
    agent = make_agent(config.agent, facts.obs_space, facts.action_space).to(device)
    wanted = config.learner.precision
    bf16 = wanted == "bf16" or (wanted == "auto" and device.startswith("cuda"))
    agent.amp = torch.bfloat16 if bf16 else None
    return agent


def make_learner(
    config: TrainConfig,
    run: Path,
    facts: EnvFacts,
    mirror: Any,
    client: ReplayClient | ShardedClient,
    limiter: CreditLimiter,
    hub: Any,
    fleet: Crew,
    device: str,
) -> Learner:
    """Build the agent and the learner around it."""
    import torch

    from actors.hub import sender
    from learner.learner import Learner, RunFacts
    from learner.pace import FreePace, LockstepPace
    from learner.publish import Publisher

    knobs, digest = config.learner, config_hash(config)
    agent = build_agent(config, facts, device)
    fence, kind = take_fence(client, run), agent.amp or torch.float32
    publisher = Publisher(
        agent, sender(hub, PUBLISH_S), fence=fence, config_hash=digest, dtype=kind
    )
    recorder = make_recorder(config, run, facts)
    fleet.bind(publisher, fence, recorder.clock)
    turns = LockstepPace(mirror, limiter, fleet.collect, fleet.cut)
    return Learner(
        knobs,
        RunFacts(
            directory=run,
            seed=config.seed,
            target_steps=config.steps,
            config_hash=digest,
            lockstep=config.lockstep,
        ),
        agent=agent,
        step=make_step(config, agent, mirror),
        mirror=mirror,
        client=client,
        limiter=limiter,
        pace=turns if config.lockstep else FreePace(mirror, limiter),
        publisher=publisher,
        recorder=recorder,
        fence=fence,
    )


def make_recorder(
    config: TrainConfig, run: Path, facts: EnvFacts, *, offline: bool = False
) -> Recorder:
    """Open the run's records, and serve its metrics where the configuration says."""
    from learner.record import Recorder

    knobs = config.learner
    return Recorder(
        run,
        action_repeat=facts.action_repeat,
        config_hash=config_hash(config),
        port=knobs.metrics_port,
        host=knobs.metrics_listen,
        token_file=knobs.metrics_token_file,
        offline=offline,
    )


def make_step(config: TrainConfig, agent: Agent, mirror: Any) -> UpdateStep:
    """Prepare one update of the agent: from the mirror's windows to new parameters."""
    from learner.step import UpdateStep

    knobs = config.learner
    return UpdateStep(
        agent,
        mirror,
        batch_size=knobs.batch_size,
        batch_length=knobs.batch_length,
        mode=knobs.mode,
        # A run in lockstep is the same again elsewhere too, whatever compilers are there.
        updates=0 if config.lockstep else config.target_updates,
    )


def export_fleet(learner: Learner, fleet: Crew) -> None:
    """Serve the metrics of the fleet at the learner's port: this process supervises it."""
    from actors.metrics import FleetMetrics

    learner.recorder.exporter.registry.register(FleetMetrics(fleet.summary))


@contextmanager
def findable(
    config: TrainConfig, client: ReplayClient | ShardedClient, learner: Learner
) -> Iterator[None]:
    """Have the learner's metrics in the list that the replay service gives to Prometheus."""
    port, knobs = learner.recorder.port, config.learner
    if port is None:
        yield
        return
    first = servers_of(client)[0]
    labels = {"role": "learner", "run": learner.facts.directory.name}
    listen, host = knobs.metrics_listen, knobs.metrics_host
    with listed(first, port, listen=listen, host=host, labels=labels):
        yield


def resume(learner: Learner, run: Path, log_steps: int | None = None) -> Checkpoint | None:
    """Rebuild the mirror from the log, and continue from the newest valid checkpoint if any.

    Blocks while the log is read, and says every two seconds how far that is.

    Args:
        learner: with a mirror that has been started.
        run: its directory.
        log_steps: that the log holds, where that is known.
    """
    from learner.checkpoint import load_newest

    mirror, said = learner.mirror, time.monotonic()
    for episodes in mirror.rebuild():
        learner.recorder.score(episodes)
        if time.monotonic() - said >= REBUILDING_EVERY_S:
            say_rebuilding(learner, run, log_steps)
            said = time.monotonic()
    saved = load_newest(run / "checkpoints")
    if saved is None:
        return None
    for reason in saved.skipped:
        log.warning("checkpoint_skipped the previous one is used: %s", reason)
    learner.restore(saved)
    log.info(
        "resumed checkpoint=%s updates=%d env_steps=%d replay=%d",
        saved.path.name,
        learner.updates,
        learner.env_steps,
        mirror.size_steps,
    )
    return saved


def say_rebuilding(learner: Learner, run: Path, log_steps: int | None) -> None:
    """Show on the terminal and in ``status.json`` how far the mirror has been rebuilt."""
    from learner.status import write_status

    mirror = learner.mirror
    of = "" if log_steps is None else f" of the {log_steps:,} steps in the log"
    learner.pace.reason = (
        f"updates wait for the mirror: {mirror.size_steps:,}{of} are read "
        f"({mirror.rebuild_share:.0%})"
    )
    snapshot = learner.snapshot()
    log.info("mirror_rebuilding %s", snapshot.waiting_for)
    write_status(run / STATUS_FILE, snapshot)


def count_on(learner: Learner, saved: Checkpoint | None) -> None:
    """Open the replay, counting on from a checkpoint if the replay that belongs to it is gone."""
    if saved is not None:
        before = saved.manifest["env_steps"]
        bare = any(not one.stats().committed_chunks for one in servers_of(learner.client))
        if bare and learner.env_steps < before:
            learner.continue_account(before)
        elif learner.env_steps < before:
            log.warning(
                "replay_lost the checkpoint was made at %d environment steps and the replay has "
                "seen %d: training waits until actors have made up for them",
                before,
                learner.env_steps,
            )
    # Closed by `create_replay`, or by a learner that died while it put back what was lost.
    learner.client.restored(learner.fence)


def heeded(run: Path, fleet: Crew, joining: Joining) -> list[dict[str, Any]]:
    """Follow `dreamfleet scale`, and return what each actor says about itself."""
    heed_order(run, fleet)
    joining.heed()
    return fleet.stats()


@contextmanager
def reporting(
    learner: Learner, actors: Callable[[], list[dict[str, Any]]], run: Path, title: str
) -> Iterator[None]:
    """Keep ``status.json`` and the view on the terminal up to date while the block runs.

    ``actors`` is called about once a second and returns what each actor says about itself.
    """
    from learner.status import write_status

    done = threading.Event()

    def report() -> None:
        while True:
            learner.recorder.note_actors(actors())
            write_status(run / STATUS_FILE, learner.snapshot())
            if done.wait(STATUS_EVERY_S):
                return

    thread = threading.Thread(target=report, name="status", daemon=True)
    thread.start()
    try:
        with follow(lambda: asdict(learner.snapshot()), title):
            yield
    except BaseException:
        learner.outcome = "failed"
        raise
    finally:
        done.set()
        thread.join(DRAIN_S)
        write_status(run / STATUS_FILE, learner.snapshot())


def finish(config: TrainConfig, run: Path, learner: Learner) -> None:
    """Draw the curve and show how the run went and what to try next."""
    from learner.report import write_curve

    write_curve(run / "scores.jsonl", run / "curve.png", f"{config.env} · {config.agent.name}")
    console().print(summary(run, asdict(learner.snapshot()), config.env))
