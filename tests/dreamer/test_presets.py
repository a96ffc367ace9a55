import subprocess
import sys

import pytest

from dreamer.agent import agent_class
from dreamer.presets import AGENTS, SIZES, agent_config, sized


@pytest.mark.parametrize("size", SIZES)
def test_a_size_sets_every_width(size: str) -> None:
    config = agent_config("v3", size)
    deter, hidden, classes, depth, units = SIZES[size]
    assert (config.rssm.deter, config.rssm.hidden, config.rssm.classes) == (deter, hidden, classes)
    assert config.rssm.stoch == {"debug": 4, "tiny": 16}.get(size, 32)
    assert config.encoder.depth == config.decoder.depth == depth
    parts = (config.encoder, config.decoder, config.reward, config.cont, config.critic)
    assert {part.units for part in parts} | {config.actor.units} == {units}


def test_a_size_leaves_everything_else_as_it_is() -> None:
    config = agent_config("v3", "1m")
    assert config.critic.outscale == 0.0 and config.critic.layers == 3


@pytest.mark.parametrize("before", SIZES)
def test_a_size_replaces_any_other_size(before: str) -> None:
    assert sized(agent_config("v3", before), "200m") == agent_config("v3", "200m")


def test_an_unknown_size_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match="unknown size '2m' of agent 'v3'; choose one of debug, .*1m, 12m"
    ):
        agent_config("v3", "2m")


def test_an_unknown_agent_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown agent 'v9'; choose one of .*v1, v2, .*v3"):
        agent_config("v9")
    with pytest.raises(ValueError, match="unknown agent 'v9'; choose one of .*v1, v2, .*v3"):
        agent_class("v9")


@pytest.mark.parametrize("name", AGENTS)
def test_every_registered_agent_can_be_imported(name: str) -> None:
    assert agent_class(name).__module__.startswith("dreamer.")


def test_configurations_load_without_torch() -> None:
    code = "import dreamer.presets, dreamer.spaces, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
