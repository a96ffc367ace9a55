"""The command line: `dreamfleet <command> …`. Heavy imports wait until a command needs them."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from deploy.config import FILE_NAME, ConfigError, TrainConfig, load_config, nearest

log = logging.getLogger("deploy.cli")  # also as `python -m`, where this is `__main__`

PROG = "dreamfleet"
PACKAGES = ("dreamer", "replay_service", "actors", "learner", "deploy", "benchmarks")
USER_ERROR, INTERNAL_ERROR, INTERRUPTED = 2, 1, 130

Options = TypeVar("Options")
_RULE = re.compile("[─╭╮╰╯-]*")


@dataclass(frozen=True, kw_only=True)
class Command:
    """One word after `dreamfleet`."""

    summary: str
    """What it does, for `dreamfleet --help`."""
    run: Callable[[list[str]], int]
    """Takes the arguments after the word, returns the exit code."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Errors of the user or of the machine are one line on the terminal and exit code 2; a fault of
    the program is one line and exit code 1. ``--debug`` shows the traceback of both.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    args = [arg for arg in args if arg != "--debug"]
    _set_up_logging(debug)
    # Read when torch loads OpenMP. By default its threads spin while they wait for each other, on
    # the cores that environments and Ray need: an update then takes many times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        return _dispatch(args)
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if debug:
            raise
        code = USER_ERROR if _is_expected(error) else INTERNAL_ERROR
        _complain(error, code)
        return code


def parse_train(args: list[str]) -> TrainConfig:
    """Return the configuration that `dreamfleet train ARGS` asks for.

    A run directory that holds a run is the start unless a preset or size is given; otherwise the
    preset is. Without one it is that of the run there or else of the environment, and the log names
    it. Every other flag changes one field.

    Raises:
        ConfigError: unknown flags (the nearest one is given), bad values.
        SystemExit: help was asked for.
    """
    from deploy.presets import PRESETS, cost, preset, preset_for

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset")
    first.add_argument("--size")
    first.add_argument("--run-dir", "--run_dir", type=Path)
    first.add_argument("--offline")
    first.add_argument("--env", default=TrainConfig().env)
    first.add_argument("--environment.obs", dest="obs")
    with _one_line_errors():
        chosen, _ = first.parse_known_args(args)
    saved = chosen.run_dir / FILE_NAME if chosen.run_dir and not chosen.preset else None
    run, note = load_config(saved) if saved and saved.exists() else None, ""
    if run and not chosen.size:
        default = run
    else:
        fitting, why = preset_for(chosen.env, image=chosen.obs in ("image", "both"))
        if run:
            fitting, why = run.preset, f"the run in {chosen.run_dir} has it"
        default = start = preset(chosen.preset or fitting, chosen.size)
        if chosen.offline:
            from deploy.offline import offline_default

            named = chosen.preset or chosen.size
            default = offline_default(chosen.offline, start if named else None) or start
        if default is start and not chosen.preset:
            note = f"{fitting}: {why} (--preset takes another)"
    presets = "\n".join(
        f"  {name}: {known.summary} ({cost(preset(name))})" for name, known in PRESETS.items()
    )
    config = parse(
        TrainConfig,
        args,
        command="train",
        default=default,
        description="Train an agent; the run directory keeps everything, and continues if it "
        f"exists. Values below are those of --preset {default.preset}. Presets:\n{presets}",
    )
    if note:
        log.info("preset_chosen %s", note)
    return config


def parse(
    kind: type[Options],
    args: list[str],
    *,
    command: str,
    default: Options | None = None,
    description: str | None = None,
) -> Options:
    """Return options of a dataclass from flags: one for every field, dotted for nested ones.

    Raises:
        ConfigError: unknown flags or bad values, in one line.
        SystemExit: help was asked for, and shown.
    """
    import tyro

    _refuse_unknown(kind if default is None else default, args, command)
    given: dict[str, Any] = {} if default is None else {"default": default}
    with _one_line_errors():
        return tyro.cli(kind, prog=f"{PROG} {command}", args=args, description=description, **given)


def _dispatch(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        _show_commands()
        return 0
    if args[0] == "--version":
        from importlib.metadata import version

        _console().print(f"{PROG} {version(PROG)}", highlight=False)
        return 0
    if args[0] not in COMMANDS:
        raise ConfigError(
            f"unknown command {args[0]}{nearest(args[0], list(COMMANDS))} "
            f"(commands: {', '.join(COMMANDS)})"
        )
    try:
        return COMMANDS[args[0]].run(args[1:])
    except SystemExit as done:  # help was shown
        return int(done.code or 0)


def _train(args: list[str]) -> int:
    _log_from(logging.INFO)
    config = parse_train(args)
    if config.offline is not None:
        from deploy.offline import train_offline

        return train_offline(config)
    from deploy.launch import train

    return train(config)


def _eval(args: list[str]) -> int:
    from deploy.evaluate import EvalOptions

    options = parse(EvalOptions, args, command="eval")
    from deploy.evaluate import evaluate

    return evaluate(options)


def _play(args: list[str]) -> int:
    from deploy.play import PlayOptions, watch

    return watch(parse(PlayOptions, args, command="play"))


def _check_env(args: list[str]) -> int:
    from deploy.checkenv import CheckOptions, check_env

    return check_env(parse(CheckOptions, args, command="check-env"))


def _doctor(args: list[str]) -> int:
    from deploy.doctor import DoctorOptions, doctor

    return doctor(parse(DoctorOptions, args, command="doctor"))


def _status(args: list[str]) -> int:
    from deploy.status import StatusOptions, status

    return status(parse(StatusOptions, args, command="status"))


def _scale(args: list[str]) -> int:
    from deploy.scale import ScaleOptions, scale

    return scale(parse(ScaleOptions, args, command="scale"))


def _stop(args: list[str]) -> int:
    from deploy.left import StopOptions, stop

    return stop(parse(StopOptions, args, command="stop"))


def _runs(args: list[str]) -> int:
    from deploy.runs import RunsOptions, runs

    return runs(parse(RunsOptions, args, command="runs"))


def _export(args: list[str]) -> int:
    from deploy.export import ExportOptions, export

    return export(parse(ExportOptions, args, command="export"))


def _report(args: list[str]) -> int:
    from deploy.report import ReportOptions, report

    return report(parse(ReportOptions, args, command="report"))


def _bench(args: list[str]) -> int:
    from deploy.bench import BenchOptions, bench

    return bench(parse(BenchOptions, args, command="bench"))


def _replay(args: list[str]) -> int:
    from deploy.replaycmd import ACTIONS

    if not args or args[0] in ("-h", "--help"):
        lines = [f"usage: {PROG} replay <action> [--help] …", ""]
        lines += [f"  {name:<10} {action.summary}" for name, action in ACTIONS.items()]
        _console().print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)
        return 0
    if args[0] not in ACTIONS:
        raise ConfigError(
            f"unknown action replay {args[0]}{nearest(args[0], list(ACTIONS))} "
            f"(actions: {', '.join(ACTIONS)})"
        )
    action = ACTIONS[args[0]]
    return action.run(parse(action.options, args[1:], command=f"replay {args[0]}"))


def _secrets(args: list[str]) -> int:
    from deploy.secretscmd import SecretsOptions, make_secrets

    return make_secrets(parse(SecretsOptions, args, command="secrets"))


COMMANDS: dict[str, Command] = {
    "train": Command(summary="train an agent, or continue a run", run=_train),
    "eval": Command(summary="play episodes with a run's newest checkpoint", run=_eval),
    "play": Command(summary="watch a run's agent: window, terminal or video", run=_play),
    "status": Command(summary="show how a run is doing, or how it ended", run=_status),
    "runs": Command(summary="list runs: preset, agent, steps, return, state", run=_runs),
    "report": Command(summary="write one HTML file about a run", run=_report),
    "export": Command(summary="write the acting agent as one file for torch or ONNX", run=_export),
    "scale": Command(summary="let actors join or leave, or servers join, a training", run=_scale),
    "stop": Command(summary="end actors that were left on a Ray cluster", run=_stop),
    "check-env": Command(summary="check an environment, and measure it", run=_check_env),
    "doctor": Command(summary="check this machine and what is installed on it", run=_doctor),
    "replay": Command(summary="check, export or import what a run has collected", run=_replay),
    "secrets": Command(summary="make passwords and certificates for a server", run=_secrets),
    "bench": Command(summary="measure learner, replay, actors and all of it", run=_bench),
}


def _show_commands() -> None:
    lines = [f"usage: {PROG} <command> [--help] [--debug] …", ""]
    lines += [f"  {name:<10} {command.summary}" for name, command in COMMANDS.items()]
    lines += ["", f"{PROG} <command> --help says what it takes; --debug adds tracebacks to errors."]
    lines += [f"To begin: {PROG} doctor, then {PROG} train --preset v3-cartpole"]
    _console().print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def _refuse_unknown(options: Any, args: list[str], command: str) -> None:
    """Raise ConfigError for the first flag that no field of the options has."""
    known = ["--help", *_flags(options, "--")]
    for arg in args:
        name = arg.split("=")[0].replace("_", "-")  # a parser takes both forms
        if re.match(r"--\D", name) and name not in known:
            raise ConfigError(
                f"unknown flag {arg.split('=')[0]}{nearest(name, known)} "
                f"({PROG} {command} --help lists all)"
            )


def _flags(options: Any, prefix: str) -> Iterator[str]:
    for item in fields(options):
        value: Any = getattr(options, item.name, None)
        factory: Any = item.default_factory
        name = item.name.replace("_", "-")
        if is_dataclass(value) and not isinstance(value, type):
            yield from _flags(value, f"{prefix}{name}.")
        elif is_dataclass(factory):
            yield from _flags(factory, f"{prefix}{name}.")
        else:
            yield prefix + name
            head, _, tail = f"{prefix}{name}".rpartition(".")
            yield f"{head}.no-{tail}" if head else f"--no-{tail[2:]}"


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """Turn a parser's message and exit into a ConfigError of one line."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            yield
    except SystemExit as done:
        if not done.code:
            raise
        raise ConfigError(_first_sentences(said.getvalue())) from None


def _first_sentences(box: str) -> str:
    """Return what stands in a parser's message below its title and above its first rule."""
    found: list[str] = []
    for line in box.splitlines()[1:]:
        text = line.strip().strip("│").strip()
        if not _RULE.fullmatch(text):
            found.append(text)
        elif found:
            break
    return re.sub(r"^(?:Error parsing [\w.]+: |Error parsing |\S+: error: )", "", " ".join(found))


def _is_expected(error: BaseException) -> bool:
    """Whether an exception is about input, files or the machine, and not a fault of the program."""
    ours = type(error).__module__.split(".")[0] in PACKAGES
    return ours or isinstance(error, ValueError | OSError)


def _complain(error: BaseException, code: int) -> None:
    text = " ".join(str(error).split()) or type(error).__name__
    if code == INTERNAL_ERROR:
        text = (
            f"{type(error).__name__}: {text} (a fault of dreamfleet: --debug shows the traceback)"
        )
    from rich.console import Console

    shown = Console(stderr=True, emoji=False)
    shown.print(f"{PROG}: [bold red]error:[/] ", end="", highlight=False, soft_wrap=True)
    shown.print(text, markup=False, highlight=False, soft_wrap=True)


def _console() -> Any:
    from rich.console import Console

    return Console(emoji=False)


def _set_up_logging(debug: bool) -> None:
    """Show warnings of all, and everything of our own with --debug."""
    from deploy.progress import log_handler

    logging.basicConfig(level=logging.WARNING, handlers=[log_handler()], force=True)
    _log_from(logging.DEBUG if debug else logging.WARNING)


def _log_from(level: int) -> None:
    """Show our own log from a level on; one that shows more already stays."""
    for package in PACKAGES:
        logger = logging.getLogger(package)
        logger.setLevel(min(level, logger.level or level))


if __name__ == "__main__":
    sys.exit(main())
