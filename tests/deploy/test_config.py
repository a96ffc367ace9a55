from __future__ import annotations

import ast
import inspect
import textwrap
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pytest

from deploy.config import (
    MAY_CHANGE,
    ConfigError,
    TrainConfig,
    config_hash,
    differences,
    from_dict,
    load_config,
    require_resumable,
    resume_conflicts,
    save_config,
    with_values,
)
from deploy.presets import PRESETS, preset


@pytest.mark.parametrize("name", PRESETS)
def test_saved_configuration_reads_back_equal(name: str, tmp_path: Path) -> None:
    config = with_values(preset(name, "debug"), {"run_dir": tmp_path, "replay.tolerance_steps": 9})
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"stepps": 5}, "unknown field stepps; did you mean steps?"),
        ({"agent": {"rssm": {"detr": 8}}}, "unknown field agent.rssm.detr; did you mean deter?"),
        ({"agent": {"rssm": {"deter": "wide"}}}, "agent.rssm.deter"),
        ({"agent": {"rssm": {"deter": 13}}}, "must be a multiple of rssm.blocks"),
        ({"replay": 3}, "replay must hold fields, got 3"),
        ({"replay": {"codec": "lz4"}}, "replay.codec"),
        ({"learner": {"batch_size": 0}}, "learner.batch_size must be >= 1, got 0"),
    ],
)
def test_wrong_file_is_refused_with_the_field_and_a_hint(data: dict, said: str) -> None:
    with pytest.raises(ConfigError, match="a.yaml") as error:
        from_dict(data, where="a.yaml")
    assert said in str(error.value)


def test_broken_yaml_is_one_error_of_one_line(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("steps: [1\nenv: }")
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_file_that_is_no_mapping_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("- 1\n")
    with pytest.raises(ConfigError, match="holds list"):
        load_config(path)


def test_missing_fields_take_defaults() -> None:
    assert from_dict({"seed": 3}) == replace(TrainConfig(), seed=3)


def undocumented(config: object) -> list[str]:
    """Return the fields of a configuration tree that no docstring follows."""
    kind = type(config)
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0].body  # type: ignore[attr-defined]
    missing = []
    for here, below in zip(body, [*body[1:], None], strict=True):
        if isinstance(here, ast.AnnAssign) and isinstance(here.target, ast.Name):
            text = getattr(getattr(below, "value", None), "value", None)
            if not isinstance(text, str) or len(text) < 5:
                missing.append(f"{kind.__name__}.{here.target.id}")
    for field in fields(config):  # type: ignore[arg-type]
        if is_dataclass(value := getattr(config, field.name)):
            missing += undocumented(value)
    return missing


def test_every_field_of_the_tree_has_a_meaning() -> None:
    assert not undocumented(TrainConfig())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"steps": 0}, "--steps must be at least 1, got 0"),
        ({"actors": 0}, "--actors must be at least 1"),
        ({"envs_per_actor": -1}, "--envs-per-actor must be at least 1"),
        ({"seed": -1}, "--seed must be 0 to"),
        ({"train_ratio": 0.0}, "--train-ratio"),
        ({"train_ratio": float("nan")}, "--train-ratio"),
        ({"env": ""}, "--env is empty"),
        ({"device": "gpu"}, "--device must be auto, cpu, cuda"),
        ({"redis": "redis://a:1,redis://b:2", "lockstep": True}, "give --redis one address"),
        ({"redis": "redis://a:1,redis://a:1"}, "redis://a:1 is named more than once"),
        ({"redis": "embedded,localhost:1"}, "--redis must be embedded, redis://"),
        ({"redis": "embedded,redis://a:1", "lockstep": True}, "give --redis one address"),
        ({"redis": "redis://a:1,redis://me:word@b:2"}, "--redis holds a password"),
        ({"redis": "localhost:6379"}, "--redis must be embedded, redis://"),
        ({"ray": "ray://head:10001"}, "--ray must be local, auto or"),
        ({"steps": 100}, "--steps 100 ends the run before training starts"),
        ({"replay.capacity_steps": 32, "replay.min_size_steps": 8}, "holds no window of"),
    ],
)
def test_configuration_that_cannot_work_is_refused(change: dict, said: str) -> None:
    with pytest.raises(ConfigError, match="^--") as error:
        with_values(TrainConfig(), change)
    assert said in str(error.value)


def test_fields_that_depend_on_each_other_change_together() -> None:
    small = {"replay.min_size_steps": 8, "replay.capacity_steps": 128, "steps": 16}
    changed = with_values(TrainConfig(), small)
    assert (changed.steps, changed.replay.min_size_steps) == (16, 8)


def test_unknown_dotted_field_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"learner\.batchsize; did you mean batch_size"):
        with_values(TrainConfig(), {"learner.batchsize": 3})


def test_differences_name_fields_in_the_order_of_the_tree() -> None:
    changed = with_values(TrainConfig(), {"learner.batch_size": 8, "seed": 4})
    assert [str(found) for found in differences(TrainConfig(), changed)] == [
        "seed: 0 there, 4 now",
        "learner.batch_size: 16 there, 8 now",
    ]


def test_longer_run_with_more_actors_continues_and_another_agent_does_not() -> None:
    saved = preset("v3-cartpole")
    assert not resume_conflicts(saved, replace(saved, steps=99_999, actors=7, device="cpu"))
    found = resume_conflicts(saved, preset("v3-cartpole", "12m"))
    assert "agent.rssm.deter" in [difference.name for difference in found]


def test_hash_ignores_what_may_change_and_sees_everything_else() -> None:
    saved = preset("v3-cartpole")
    assert config_hash(saved) == config_hash(replace(saved, steps=99_999, redis="redis://a:1"))
    assert config_hash(saved) != config_hash(with_values(saved, {"agent.optim.lr": 1e-3}))


def test_fields_that_may_change_exist() -> None:
    config = TrainConfig()
    for name in MAY_CHANGE:
        value: object = config
        for part in name.split("."):
            value = getattr(value, part)


def test_run_of_another_configuration_is_refused_with_the_differences() -> None:
    saved = preset("v3-cartpole")
    require_resumable(saved, replace(saved, steps=50_000))
    with pytest.raises(ConfigError, match="runs/v3-cartpole-1 holds .*seed: 0 there, 1 now"):
        require_resumable(saved, replace(saved, seed=1))


def test_long_lists_of_differences_are_cut_and_counted() -> None:
    with pytest.raises(ConfigError, match=r"size: '1m' there, '12m' now; .*; 4 more\)"):
        require_resumable(preset("v3-cartpole", "1m"), preset("v3-cartpole", "12m"))


@pytest.mark.parametrize(
    ("config", "want"),
    [
        (preset("v3-cartpole"), "runs/v3-cartpole-0"),
        (preset("v3-cartpole", "12m"), "runs/v3-cartpole-12m-0"),
        (
            replace(preset("v3-cartpole"), env="dmc:cup-catch", seed=2),
            "runs/v3-cartpole-dmc-cup-catch-2",
        ),
        (replace(preset("v3-cartpole"), run_dir=Path("x")), "x"),
    ],
)
def test_run_directory_is_named_after_what_distinguishes_the_run(
    config: TrainConfig, want: str
) -> None:
    assert config.directory == Path(want)
