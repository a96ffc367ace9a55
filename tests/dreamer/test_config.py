from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields, replace
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


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (
            lambda: RSSMConfig(deter=100),
            "must be a multiple of rssm.blocks, got 100 and 8; try --agent.rssm.deter 96",
        ),
        (lambda: RSSMConfig(classes=1), "2..256 (a replay record keeps one byte per group), got 1"),
        (lambda: RSSMConfig(classes=257), "got 257"),
        (lambda: RSSMConfig(unimix=1.0), "share in [0, 1), got 1.0"),
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
