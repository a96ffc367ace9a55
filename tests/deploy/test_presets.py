from __future__ import annotations

import pytest

from deploy.config import ConfigError, TrainConfig
from deploy.presets import PRESETS, cost, preset, record_bytes
from dreamer.presets import AGENTS, SIZES


@pytest.mark.parametrize("name", PRESETS)
def test_preset_builds_and_remembers_its_name(name: str) -> None:
    config = preset(name)
    assert (config.preset, config.size) == (name, PRESETS[name].size)
    assert config.replay.capacity_steps <= max(config.steps, 100_000)


@pytest.mark.parametrize("name", PRESETS)
def test_every_size_of_the_agent_fits_its_preset(name: str) -> None:
    for size in AGENTS[PRESETS[name].agent].sizes:
        config = preset(name, size)
        assert (config.size, config.agent.name) == (size, PRESETS[name].agent)


def test_schedules_of_earlier_agents_make_the_published_updates() -> None:
    published = {
        "v1-dmc-vision": 0.2,
        "v2-dmc-vision": 0.2,
        "v2-atari": 0.0625,
        "v3-2023-dmc-vision": 0.5,
        "v1-atari": 0.4,  # as many per frame as with action repeat 2
        "v3-2023-atari": 0.0625,
        "v3-2023-atari100k": 1.0,
        "pro-dmc-vision": 0.2,
    }
    for name, updates in published.items():
        config = preset(name)
        replayed = config.learner.batch_size * config.learner.batch_length
        assert config.train_ratio / replayed == updates, name


def test_presets_draw_windows_as_their_papers_do() -> None:
    drawn = {
        name: (sampling.windows, sampling.ends, preset(name).replay.online)
        for name in PRESETS
        if (sampling := preset(name).replay.sampling)
    }
    within = {name for name in PRESETS if name.startswith(("v1-", "v2-", "pro-"))}
    # Episodes of CartPole begin shorter than a window, so there they must be cut together.
    within -= {"pro-v3-dmc-vision", "v1-cartpole", "v2-cartpole", "v1-balance", "v2-balance"}
    within -= {"pro-minigrid", "v1-minigrid", "v2-minigrid"}
    for name, (windows, ends, online) in drawn.items():
        assert windows == ("episodes" if name in within else "any"), name
        assert ends == (name in ("v2-atari", "v2-atari100k", "v2-crafter", "pro-atari")), name
        new = name.startswith(("v3-", "pro-v3-", "r2-", "infonce-")) and "2023" not in name
        assert online == new, name


@pytest.mark.parametrize("size", SIZES)
def test_size_sets_all_widths_and_nothing_else(size: str) -> None:
    small, chosen = preset("v3-cartpole"), preset("v3-cartpole", size)
    deter, hidden, classes, depth, units = SIZES[size]
    assert (chosen.agent.rssm.deter, chosen.agent.rssm.hidden) == (deter, hidden)
    assert (chosen.agent.rssm.classes, chosen.agent.encoder.depth) == (classes, depth)
    assert chosen.agent.actor.units == units
    assert chosen.agent.optim == small.agent.optim
    assert chosen.learner == small.learner


def test_published_numbers_are_the_published_ones() -> None:
    want = {
        "v3-dmc-proprio": ("1m", 300_000, 512.0),
        "v3-dmc-vision": ("12m", 600_000, 512.0),
        "v3-atari": ("200m", 51_000_000, 32.0),
        "v3-atari100k": ("200m", 110_000, 256.0),
        "v3-crafter": ("200m", 1_100_000, 512.0),
    }
    got = {name: (preset(name).size, preset(name).steps, preset(name).train_ratio) for name in want}
    assert got == want


def test_unknown_preset_and_size_name_the_nearest_and_all() -> None:
    with pytest.raises(ConfigError, match="did you mean v3-cartpole.*v3-minigrid"):
        preset("v3-cartpol")
    with pytest.raises(ConfigError, match=r"unknown --size 13m of v3; did you mean 1\w*m"):
        preset("v3-cartpole", "13m")


def test_help_of_the_top_level_lists_every_preset_and_size() -> None:
    import inspect

    text = inspect.getsource(TrainConfig)
    for name in [*PRESETS, *SIZES]:
        assert name in text, name


def test_cost_counts_updates_and_the_bytes_of_the_replay() -> None:
    atari = preset("v2-atari")  # one grey channel, no latents
    assert record_bytes(atari) == 64 * 64 + 64
    assert cost(atari) == "0.0625 updates per step, 3,125,000 in all; 7.7 GiB of replay"
    deter, groups = 2048, 32  # half precision and a byte each
    assert record_bytes(preset("v3-dmc-vision")) == 3 * 64 * 64 + 2 * deter + groups + 64
    assert "less than 0.1 GiB" in cost(preset("v1-cartpole"))
