from collections.abc import Callable, Iterator
from dataclasses import FrozenInstanceError, fields, is_dataclass, replace
from typing import Any

import pytest

from dreamer.config import (
    BehaviourConfig,
    DecoderConfig,
    EncoderConfig,
    ExplorationConfig,
    HeadConfig,
    LossScales,
    OptimConfig,
    RSSMConfig,
    V3Config,
)
from dreamer.presets import AGENTS, with_fields
from dreamer.ranges import RANGES, is_number


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (
            lambda: RSSMConfig(deter=100),
            "must be a multiple of rssm.blocks, got 100 and 8; try --agent.rssm.deter 96",
        ),
        (lambda: RSSMConfig(classes=1), "2..256 (a replay record keeps one byte per group), got 1"),
        (lambda: RSSMConfig(classes=257), "got 257"),
        (lambda: RSSMConfig(unimix=1.0), "--agent.rssm.unimix must be in [0, 1), got 1.0"),
        (lambda: BehaviourConfig(imag_horizon=0), "must be >= 1 step, got 0"),
        (lambda: BehaviourConfig(discount_horizon=1.0), "must be > 1 step, got 1.0"),
        (lambda: EncoderConfig(kernel=4), "encoder.kernel must be odd"),
        (lambda: DecoderConfig(kernel=4), "decoder.kernel must be odd"),
        (lambda: DecoderConfig(depth=3), "a multiple of decoder.blocks, got 3·4 and 8"),
        (lambda: HeadConfig(bins=256), "bins must be odd so that the middle one is zero, got 256"),
        (lambda: V3Config(context=2), "context is 1"),
        (
            lambda: V3Config(rssm=RSSMConfig(deter=36, blocks=6)),
            "rssm.deter must be a multiple of decoder.blocks, got 36 and 8; "
            "try --agent.decoder.blocks 6",
        ),
    ],
)
def test_a_configuration_that_cannot_work_is_refused_where_it_is_built(
    build: Callable[[], Any], words: str
) -> None:
    with pytest.raises(ValueError) as refused:
        build()
    assert words in str(refused.value)


NAN, INF = float("nan"), float("inf")
NUMBERS = [
    ("v3", "optim.lr", -1.0, "--agent.optim.lr must be > 0, got -1.0"),
    ("v3", "optim.lr", NAN, "--agent.optim.lr must be > 0, got nan"),
    ("v3", "optim.lr", INF, "--agent.optim.lr must be > 0, got inf"),
    ("v3", "optim.agc_floor", 0.0, "--agent.optim.agc-floor must be > 0, got 0.0"),
    ("v3", "optim.warmup", -1, "--agent.optim.warmup must be >= 0, got -1"),
    ("v3", "optim.beta2", 1.0, "--agent.optim.beta2 must be in [0, 1), got 1.0"),
    ("v3", "rssm.hidden", 0, "--agent.rssm.hidden must be >= 1, got 0"),
    ("v3", "rssm.stoch", 0, "--agent.rssm.stoch must be >= 1, got 0"),
    ("v3", "rssm.blocks", 0, "--agent.rssm.blocks must be >= 1, got 0"),
    ("v3", "rssm.post_layers", 0, "--agent.rssm.post-layers must be >= 1, got 0"),
    ("v3", "encoder.mults", (2, 0), "--agent.encoder.mults must be >= 1, got (2, 0)"),
    ("v3", "decoder.mults", (), "--agent.decoder.mults must be >= 1, got ()"),
    ("v3", "actor.units", -5, "--agent.actor.units must be >= 1, got -5"),
    ("v3", "actor.min_std", 2.0, "must be <= actor.max_std, got 2.0 and 1.0"),
    ("v3", "critic.layers", 0, "--agent.critic.layers must be >= 1, got 0"),
    ("v3", "scales.rec", -1.0, "--agent.scales.rec must be >= 0, got -1.0"),
    ("v3", "behaviour.lambda_", 1.5, "--agent.behaviour.lambda_ must be in [0, 1], got 1.5"),
    ("v3", "behaviour.slow_rate", 0.0, "--agent.behaviour.slow-rate must be in (0, 1], got 0.0"),
    ("v3", "free_nats", NAN, "--agent.free-nats must be >= 0, got nan"),
    ("v3", "exploration.noise", NAN, "--agent.exploration.noise must be >= 0, got nan"),
    ("v1", "world.depth", 0, "--agent.world.depth must be >= 1, got 0"),
    ("v1", "rec_scale", -1.0, "--agent.rec-scale must be >= 0, got -1.0"),
    ("v2", "optim.model_lr", 0.0, "--agent.optim.model-lr must be > 0, got 0.0"),
    ("v2", "kl_balance", 1.1, "--agent.kl-balance must be in [0, 1], got 1.1"),
    ("v2", "slow_every", 0, "--agent.slow-every must be >= 1, got 0"),
    ("v3-2023", "heads.units", 0, "--agent.heads.units must be >= 1, got 0"),
    ("v3-2023", "imagination.discount", NAN, "imagination.discount must be in (0, 1), got nan"),
    ("v3-2023", "return_limit", 0.0, "--agent.return-limit must be > 0, got 0.0"),
    ("pro", "prototypes.temperature", 0.0, "--agent.prototypes.temperature must be > 0, got 0.0"),
    ("pro-v3", "prototypes.count", 0, "--agent.prototypes.count must be >= 1, got 0"),
    ("r2", "redundancy", -1.0, "--agent.redundancy must be >= 0, got -1.0"),
]


@pytest.mark.parametrize(("agent", "name", "value", "words"), NUMBERS)
def test_a_number_out_of_its_range_is_refused_with_its_flag_and_what_is_allowed(
    agent: str, name: str, value: Any, words: str
) -> None:
    with pytest.raises(ValueError) as refused:
        with_fields(AGENTS[agent].config, {name: value})
    assert words in str(refused.value)


def test_all_numbers_out_of_range_are_named_at_once() -> None:
    with pytest.raises(ValueError, match=r"lr must be > 0, got 0; --agent\.scales\.dyn must be"):
        with_fields(V3Config(), {"optim.lr": 0, "scales.dyn": -1})


def test_every_number_of_every_agent_has_a_range_and_every_range_a_number() -> None:
    names = {name for known in AGENTS.values() for name in numbers_of(known.config)}
    assert names == set(RANGES)


def numbers_of(config: Any) -> Iterator[str]:
    for item in fields(config):
        value = getattr(config, item.name)
        if is_dataclass(value):
            yield from numbers_of(value)
        elif is_number(value):
            yield item.name


def test_the_defaults_are_those_of_the_publication() -> None:
    config = V3Config()
    assert config.optim == OptimConfig(
        lr=4e-5, warmup=1000, beta1=0.9, beta2=0.999, eps=1e-20, agc=0.3, agc_floor=1e-3
    )
    assert config.scales == LossScales(
        rec=1.0, rew=1.0, con=1.0, dyn=1.0, rep=0.1, policy=1.0, value=1.0, repval=0.3
    )
    rule = config.behaviour
    assert (rule.imag_horizon, rule.discount_horizon, rule.lambda_) == (15, 333, 0.95)
    assert (rule.entropy, rule.slow_rate, rule.slow_regulariser) == (3e-4, 0.02, 1.0)
    assert (rule.return_rate, rule.return_low, rule.return_high) == (0.01, 0.05, 0.95)
    heads = (config.reward, config.cont, config.critic)
    assert [head.layers for head in heads] == [1, 1, 3]
    assert [head.outscale for head in heads] == [0.0, 1.0, 0.0]
    assert (config.actor.layers, config.actor.outscale, config.actor.unimix) == (3, 0.01, 0.01)
    assert (config.rssm.stoch, config.rssm.blocks, config.rssm.unimix) == (32, 8, 0.01)
    assert (config.free_nats, config.context) == (1.0, 1)


def test_configurations_do_not_change() -> None:
    with pytest.raises(FrozenInstanceError):
        V3Config().free_nats = 2.0  # type: ignore[misc]


def test_replacing_a_part_checks_it_again() -> None:
    with pytest.raises(ValueError, match="context"):
        replace(V3Config(), context=7)


def test_fields_are_given_by_keyword_only() -> None:
    assert all(field.kw_only for field in fields(V3Config))


def test_exploration_falls_by_half_down_to_its_floor() -> None:
    falling = ExplorationConfig(epsilon=0.4, half_life_updates=100, floor=0.1)
    shares = [falling.at(updates)[1] for updates in (-1, 0, 100, 150, 200, 10**6)]
    assert shares == pytest.approx([0.4, 0.4, 0.2, 0.4 * 0.5**1.5, 0.1, 0.1])
    assert falling.at(50)[0] == 0.0  # what is not there does not rise to the floor
    assert ExplorationConfig(noise=0.3).at(10**6) == (0.3, 0.0)
    with pytest.raises(ValueError, match="half_life_updates"):
        ExplorationConfig(half_life_updates=-1)
