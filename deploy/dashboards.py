"""The Grafana dashboards, made by code: `python -m deploy.dashboards` writes their JSON files.

The code is Grafana's own builder (grafana-foundation-sdk, of the extra `dev`); the files work
without it. A test compares them with what this module makes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from grafana_foundation_sdk.builders import dashboard, prometheus, timeseries
from grafana_foundation_sdk.builders.common import StackingConfig
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import StackingMode
from grafana_foundation_sdk.models.dashboard import DashboardCursorSync, DataSourceRef

DIRECTORY = Path(__file__).parent / "grafana" / "provisioning" / "dashboards"
SOURCE = DataSourceRef(type_val="prometheus", uid="prometheus")
"""The source that provisioning/datasources gives this uid."""
RUN = '{run=~"$run"}'
HEIGHT = 8


@dataclass(frozen=True)
class Panel:
    """One graph: a title, a unit of Grafana's, and the legend and query of each set of curves."""

    title: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    stacked: bool = False
    text: str = ""


@dataclass(frozen=True)
class Page:
    """One dashboard; panels are laid out three in a row."""

    uid: str
    title: str
    panels: tuple[Panel, ...]

    def queries(self) -> Iterator[str]:
        """Yield every query of every panel."""
        for panel in self.panels:
            yield from (query for _, query in panel.queries)


ANNOTATIONS = (
    ("learner restarts", "changes(dreamer_replay_log_fence[1m]) > 0", "orange"),
    ("replay server restarts", "changes(dreamer_replay_log_epoch[1m]) > 0", "red"),
)
"""Name, query and colour of the lines that all dashboards show."""


def _rate(name: str, labels: str = "", window: str = "1m") -> str:
    return f"rate(dreamer_{name}{labels}[{window}])"


def _mean(name: str, by: str = "slot") -> str:
    """Return the mean of a histogram of the actors over five minutes."""
    total, count = (f"sum by ({by}) ({_rate(name + end, '', '5m')})" for end in ("_sum", "_count"))
    return f"{total} / {count}"


OVERVIEW = Page(
    "dreamfleet-overview",
    "dreamfleet: run overview",
    (
        Panel(
            "What bounds the run",
            "percentunit",
            (("{{cause}}", f"dreamer_bound_share{RUN}"),),
            stacked=True,
            text="Share of the time by cause; the largest is the verdict of dreamfleet status.",
        ),
        Panel(
            "Return of the last 20 episodes",
            "none",
            (
                ("train", f"dreamer_episode_return{RUN}"),
                ("eval", f"dreamer_eval_return{RUN}"),
            ),
        ),
        Panel("Environment steps", "ops", (("steps", _rate("replay_inserted_steps_total", RUN)),)),
        Panel("Updates", "ops", (("updates", _rate("updates_total", RUN)),)),
        Panel(
            "Train ratio",
            "none",
            (
                (
                    "actual",
                    _rate("replay_sampled_steps_total", RUN, "10m")
                    + " / "
                    + _rate("replay_inserted_steps_total", RUN, "10m"),
                ),
                ("target", f"dreamer_replay_ratio_target{RUN}"),
            ),
        ),
        Panel(
            "Actors",
            "none",
            (
                ("{{state}}", f"dreamer_fleet_actors{RUN}"),
                ("desired", f"dreamer_fleet_actors_desired{RUN}"),
            ),
        ),
        Panel(
            "Age of the last checkpoint",
            "s",
            (("age", f"time() - (dreamer_checkpoint_last_success_timestamp_seconds{RUN} > 0)"),),
        ),
        Panel(
            "More actors that would keep the learner busy",
            "none",
            (("actors", f"dreamer_bound_actors_wanted{RUN}"),),
        ),
        Panel("Processes with metrics", "none", (("{{job}}", "sum by (job) (up)"),)),
        Panel(
            "Alerts that fire",
            "none",
            (
                (
                    "{{alertname}}",
                    'sum by (alertname) (ALERTS{alertstate="firing"}) or vector(0)',
                ),
            ),
        ),
    ),
)
ACTORS = Page(
    "dreamfleet-actors",
    "dreamfleet: actors",
    (
        Panel(
            "Steps by slot", "ops", (("{{slot}}", f"sum by (slot) ({_rate('env_steps_total')})"),)
        ),
        Panel("A step of the environment", "s", (("{{slot}}", _mean("env_step_seconds")),)),
        Panel("A call of the policy", "s", (("{{slot}}", _mean("policy_seconds")),)),
        Panel("Handing over to the writer", "s", (("{{slot}}", _mean("insert_seconds")),)),
        Panel("Share of actors that wait", "percentunit", (("waiting", "avg(dreamer_blocked)"),)),
        Panel("Actors replaced", "none", (("{{reason}}", "dreamer_actor_restarts_total"),)),
        Panel(
            "Age of the weights",
            "s",
            (
                (
                    "half of them",
                    "quantile(0.5, time() - (dreamer_weights_received_timestamp_seconds > 0))",
                ),
                ("oldest", "max(time() - (dreamer_weights_received_timestamp_seconds > 0))"),
            ),
        ),
        Panel(
            "Slowest ten",
            "ops",
            (("{{slot}}", f"bottomk(10, sum by (slot) ({_rate('env_steps_total')}))"),),
        ),
        Panel("Slots given up", "none", (("slots", "dreamer_slots_quarantined"),)),
    ),
)
REPLAY = Page(
    "dreamfleet-replay",
    "dreamfleet: replay",
    (
        Panel("Inserted", "Bps", (("bytes", _rate("replay_log_inserted_bytes_total")),)),
        Panel(
            "Steps",
            "ops",
            (
                ("inserted", _rate("replay_log_inserted_steps_total")),
                ("evicted", _rate("replay_log_evicted_steps_total")),
            ),
        ),
        Panel(
            "Steps held",
            "none",
            (
                ("on the server", "dreamer_replay_log_size_steps"),
                ("capacity", "dreamer_replay_log_capacity_steps"),
                ("in the mirror", f"dreamer_replay_size_steps{RUN}"),
            ),
        ),
        Panel(
            "Memory of the server",
            "bytes",
            (
                ("used", "dreamer_replay_log_memory_used_bytes"),
                ("limit", "dreamer_replay_log_memory_limit_bytes"),
            ),
        ),
        Panel(
            "Train ratio: drift",
            "none",
            (("drift", f"dreamer_replay_drift_steps{RUN}"),),
            text="Inserted steps times the ratio, less replayed steps.",
        ),
        Panel(
            "For how long one side waits",
            "s",
            (
                ("updates", f"dreamer_updates_waiting_seconds{RUN}"),
                ("inserts", f"dreamer_inserts_waiting_seconds{RUN}"),
            ),
        ),
        Panel(
            "Answers that inserted nothing",
            "ops",
            tuple(
                (name, _rate(f"replay_log_{name}_total"))
                for name in ("duplicates", "gaps", "waits")
            ),
        ),
        Panel("Lag of the mirror", "none", (("chunks", f"dreamer_mirror_lag_chunks{RUN}"),)),
        Panel(
            "Replay servers",
            "none",
            (
                ("that share the work", f"dreamer_replay_servers{RUN}"),
                ("that do not answer", f"dreamer_replay_servers_away{RUN}"),
            ),
        ),
        Panel(
            "Lost to the mirror or damaged",
            "none",
            (
                ("missed steps", f"dreamer_mirror_missed_steps_total{RUN}"),
                ("quarantined chunks", "dreamer_replay_log_quarantined_chunks_total"),
            ),
        ),
    ),
)
LEARNER = Page(
    "dreamfleet-learner",
    "dreamfleet: learner",
    (
        Panel(
            "Where the time goes",
            "percentunit",
            (("{{phase}}", _rate("step_seconds_total", RUN, "5m")),),
            stacked=True,
        ),
        Panel("Losses", "none", (("{{name}}", f"dreamer_loss{RUN}"),)),
        Panel(
            "Posterior and prior, in nats",
            "none",
            (("{{which}}", f"dreamer_kl_nats{RUN}"),),
            text="dyn or kl is the divergence between them, before free nats.",
        ),
        Panel(
            "Entropy of the policy, in nats", "none", (("entropy", f"dreamer_entropy_nats{RUN}"),)
        ),
        Panel(
            "Returns and values in imagination",
            "none",
            (
                ("return, {{p}} %", f"dreamer_return_percentile{RUN}"),
                ("value, {{p}} %", f"dreamer_value_percentile{RUN}"),
                ("value, mean", f"dreamer_value_mean{RUN}"),
            ),
        ),
        Panel("Gradient norms", "none", (("{{module}}", f"dreamer_grad_norm{RUN}"),)),
        Panel(
            "What is clipped",
            "percentunit",
            (("{{group}}", f"dreamer_grad_clip_fraction{RUN}"),),
            text="Share of clipped tensors, or of updates clipped as one.",
        ),
        Panel(
            "What an update moves parameters by",
            "none",
            (
                ("{{group}}", f"dreamer_update_rms{RUN}"),
                ("{{group}}, learning rate", f"dreamer_lr{RUN}"),
            ),
        ),
        Panel("Size of the parameters", "none", (("{{group}}", f"dreamer_param_norm{RUN}"),)),
        Panel(
            "Prototypes",
            "none",
            (("{{name}}", f'dreamer_train_metric{{name=~"prototypes/.*",{RUN[1:]}'),),
            text="DreamerPro's: how many are some step's first choice, and entropies in nats.",
        ),
        Panel("Other training metrics", "none", (("{{name}}", f"dreamer_train_metric{RUN}"),)),
        Panel("Skipped updates", "none", (("skipped", f"dreamer_skipped_updates_total{RUN}"),)),
        Panel("Publishing weights", "s", (("seconds", f"dreamer_publish_seconds{RUN}"),)),
        Panel("Size of the weights", "bytes", (("bytes", f"dreamer_weights_bytes{RUN}"),)),
        Panel("Writing a checkpoint", "s", (("seconds", f"dreamer_checkpoint_seconds{RUN}"),)),
        Panel(
            "What failed",
            "none",
            (
                ("checkpoints", f"dreamer_checkpoint_failures_total{RUN}"),
                ("publications", f"dreamer_weights_rejected_total{RUN}"),
            ),
        ),
        Panel("Fence", "none", (("fence", f"dreamer_fence{RUN}"),)),
    ),
)
INFRA = Page(
    "dreamfleet-infra",
    "dreamfleet: machines",
    (
        Panel("Redis is there", "none", (("up", "redis_up"),)),
        Panel(
            "Redis: commands", "ops", (("commands", "rate(redis_commands_processed_total[1m])"),)
        ),
        Panel("Redis: clients", "none", (("clients", "redis_connected_clients"),)),
        Panel(
            "Redis: memory",
            "bytes",
            (("used", "redis_memory_used_bytes"), ("limit", "redis_memory_max_bytes")),
        ),
        Panel("Ray: processor", "percent", (("{{instance}}", "ray_node_cpu_utilization"),)),
        Panel("Ray: memory", "bytes", (("{{instance}}", "ray_node_mem_used"),)),
        Panel(
            "Ray: object store",
            "bytes",
            (("{{Location}}", "sum by (Location) (ray_object_store_memory)"),),
        ),
        Panel("GPU", "percent", (("{{gpu}}", "DCGM_FI_DEV_GPU_UTIL"),)),
        Panel("GPU: memory", "decmbytes", (("{{gpu}}", "DCGM_FI_DEV_FB_USED"),)),
        Panel("GPU: memory of the learner", "bytes", (("{{kind}}", "dreamer_gpu_memory_bytes"),)),
    ),
)
PAGES = (OVERVIEW, ACTORS, REPLAY, LEARNER, INFRA)


def metrics_in(query: str) -> set[str]:
    """Return the names of the metrics that a query reads."""
    bare = re.sub(r'"[^"]*"|\b(?:by|without|on|ignoring) \([^)]*\)', "", query)
    return set(re.findall(r"\b(?:dreamer|redis|ray|DCGM|up)(?:_\w+)?\b(?!:)", bare))


def render(page: Page) -> str:
    """Return a dashboard as the JSON text that Grafana reads."""
    board = (
        dashboard.Dashboard(page.title)
        .uid(page.uid)
        .tags(["dreamfleet"])
        .refresh("10s")
        .time("now-1h", "now")
        .tooltip(DashboardCursorSync.CROSSHAIR)
    )
    board.with_variable(
        dashboard.QueryVariable("run")
        .label("run")
        .datasource(SOURCE)
        .query("label_values(dreamer_updates_total, run)")
        .include_all(True)
        .all_value(".*")
        .multi(True)
    )
    for name, query, colour in ANNOTATIONS:
        board.annotation(
            dashboard.AnnotationQuery()
            .name(name)
            .datasource(SOURCE)
            .enable(True)
            .icon_color(colour)
            .expr(query)
        )
    for panel in page.panels:
        board.with_panel(_panel(panel))
    return JSONEncoder(sort_keys=True, indent=2).encode(board.build()) + "\n"


def _panel(panel: Panel) -> timeseries.Panel:
    made = timeseries.Panel().title(panel.title).unit(panel.unit).datasource(SOURCE)
    made.height(HEIGHT).span(8)
    if panel.text:
        made.description(panel.text)
    if panel.stacked:
        made.stacking(StackingConfig().mode(StackingMode.NORMAL)).fill_opacity(60)
    for letter, (legend, query) in zip("ABC", panel.queries, strict=False):
        made.with_target(prometheus.Dataquery().ref_id(letter).expr(query).legend_format(legend))
    return made


def main() -> None:
    """Write every dashboard into `DIRECTORY`."""
    for page in PAGES:
        (DIRECTORY / f"{page.uid}.json").write_text(render(page))


if __name__ == "__main__":
    main()
