import pytest
import torch
from torch import Tensor, distributions

from dreamer.actor import ActionCodec, Actor
from dreamer.dists import ActionDist, BoundedNormal, Categorical
from dreamer.spaces import (
    ActionSpace,
    BoxAction,
    DiscreteAction,
    MultiBinaryAction,
    MultiDiscreteAction,
)
from tests.dreamer.cases import ACTIONS, close, golden

BOX = BoxAction(low=(-1.0, 0.0, -5.0), high=(1.0, 2.0, 5.0))
SPACES: dict[str, ActionSpace] = {
    "discrete": {"action": DiscreteAction(classes=4)},
    "box": {"action": BOX},
    "multidiscrete": {"action": MultiDiscreteAction(classes=(2, 3, 5))},
    "multibinary": {"action": MultiBinaryAction(size=3)},
    "dict": ACTIONS,
}
SIZES = {"discrete": 4, "box": 3, "multidiscrete": 10, "multibinary": 6, "dict": 15}


def make_actor(space: ActionSpace, outscale: float = 1.0, unimix: float = 0.01) -> Actor:
    return Actor(
        6,
        space,
        layers=1,
        units=8,
        continuous=lambda mean, std: BoundedNormal(mean, std, 0.1, 1.0),
        outscale=outscale,
        unimix=unimix,
    )


def policy(kind: str, repeats: int = 1, **changes: float) -> ActionDist:
    torch.manual_seed(0)
    actor = make_actor(SPACES[kind], **changes)
    dist = actor(torch.randn(3, 5, 6).repeat(repeats, 1, 1))
    assert isinstance(dist, ActionDist)
    return dist


@pytest.mark.parametrize("kind", SPACES)
def test_samples_have_the_flat_size_and_survive_the_record(kind: str) -> None:
    codec, flat = ActionCodec(SPACES[kind]), policy(kind).sample()
    assert codec.size == SIZES[kind]
    assert flat.shape == (3, 5, codec.size) and not flat.requires_grad
    assert torch.equal(codec.flatten(codec.record(flat)), flat)


@pytest.mark.parametrize("kind", SPACES)
def test_the_mode_is_the_most_likely_action(kind: str) -> None:
    dist = policy(kind)
    best = dist.log_prob(dist.mode())
    for _ in range(20):
        assert (dist.log_prob(dist.sample()) <= best + 1e-6).all()


@pytest.mark.parametrize("kind", SPACES)
def test_entropy_is_the_mean_of_minus_log_prob_over_samples(kind: str) -> None:
    dist = policy(kind, repeats=4000)
    drawn = -dist.log_prob(dist.sample()).reshape(4000, 3, 5).mean(0)
    close(drawn, dist.entropy()[:3], rtol=0.0, atol=0.15)


def test_records_have_the_types_and_shapes_of_the_replay() -> None:
    record = ActionCodec(ACTIONS).record(policy("dict").sample())
    kinds = {key: (value.dtype, tuple(value.shape[2:])) for key, value in record.items()}
    assert kinds == {
        "action.turn": (torch.int32, ()),
        "action.push": (torch.float32, (2,)),
        "action.keys": (torch.int32, (2,)),
        "action.bits": (torch.int32, (2,)),
    }


def test_the_flat_action_concatenates_sorted_keys() -> None:
    codec = ActionCodec(ACTIONS)
    flat = codec.flatten(
        {
            "action.turn": torch.tensor(2),
            "action.push": torch.tensor([0.5, -3.0]),
            "action.keys": torch.tensor([1, 2]),
            "action.bits": torch.tensor([0, 1]),
        }
    )
    bits, keys, push, turn = [1, 0, 0, 1], [0, 1, 0, 0, 1, 0], [0.5, -3.0], [0, 0, 1]
    assert flat.tolist() == [*bits, *keys, *push, *turn]


def test_an_empty_action_space_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one action"):
        ActionCodec({})


def test_continuous_log_prob_and_entropy_match_the_golden_actor() -> None:
    given, want = golden("normal_v3_actor")
    mean = torch.atanh(torch.tensor(given["mean"]))
    std = torch.logit((torch.tensor(given["std"]) - 0.1) / 0.9) - 2.0
    dist = BoundedNormal(mean, std, 0.1, 1.0)
    close(dist.log_prob(torch.tensor(given["action"])), want["log_prob"], rtol=1e-5)
    close(dist.entropy(), want["entropy"], rtol=1e-5)


def test_deviations_match_the_golden_parametrisation() -> None:
    _, want = golden("std_parametrisations")
    dist = BoundedNormal(torch.zeros(2), torch.tensor([0.0, -2.0]), 0.1, 1.0)
    close(dist.std, [want["v3_bounded_normal_std@0"], want["v3_bounded_normal_std@-2"]])


def test_continuous_samples_are_not_clipped() -> None:
    torch.manual_seed(0)
    dist = BoundedNormal(torch.full((1000, 1), 9.0), torch.zeros(1000, 1), 0.1, 1.0)
    sample = dist.rsample()
    assert sample.max() > 1.5
    close(sample.mean(), 1.0, atol=0.1)
    close(sample.std(), 0.8927, rtol=0.1)


def test_discrete_log_prob_and_entropy_equal_torch_distributions() -> None:
    logits = torch.randn(7, 5)
    dist = Categorical(logits, unimix=0.01)
    reference = distributions.Categorical(probs=0.99 * logits.softmax(-1) + 0.01 / 5)
    index = torch.arange(7) % 5
    close(dist.log_prob(torch.eye(5)[index]), reference.log_prob(index), rtol=1e-5)
    close(dist.entropy(), reference.entropy(), rtol=1e-5)


def test_parts_add_their_log_probs_and_entropies() -> None:
    dist = policy("dict")
    flat = dist.sample()
    slices = flat.split([part.size for part in dist.parts], -1)
    terms = [part.log_prob(x) for part, x in zip(dist.parts, slices, strict=True)]
    assert len(terms) == 2 + 2 + 1 + 1
    close(dist.log_prob(flat), sum(terms, torch.zeros(())), rtol=1e-5)
    entropies = [part.entropy() for part in dist.parts]
    close(dist.entropy(), sum(entropies, torch.zeros(())), rtol=1e-5)


def test_log_prob_of_a_dictionary_equals_torch_distributions_part_by_part() -> None:
    torch.manual_seed(0)
    actor, feature = make_actor(ACTIONS), torch.randn(4, 6)
    out = actor.out(actor.mlp(feature)).split([2, 2, 2, 4, 2, 2, 3], -1)

    def categorical(logits: Tensor) -> distributions.Categorical:
        share = 0.01 / logits.shape[-1]
        return distributions.Categorical(probs=0.99 * logits.softmax(-1) + share)

    normal = distributions.Normal(out[4].tanh(), 0.9 * torch.sigmoid(out[5] + 2) + 0.1)
    dist = actor(feature)
    flat = dist.sample()
    record = actor.codec.record(flat)
    want = normal.log_prob(record["action.push"]).sum(-1)
    discrete = [*record["action.bits"].unbind(-1), *record["action.keys"].unbind(-1)]
    for logits, index in zip((*out[:4], out[6]), [*discrete, record["action.turn"]], strict=True):
        want = want + categorical(logits).log_prob(index)
    close(dist.log_prob(flat), want, rtol=1e-5, atol=1e-5)


def test_a_fresh_policy_is_nearly_uniform_but_not_exactly() -> None:
    dist = policy("discrete", outscale=0.01)
    assert dist.entropy().min() > 0.999 * torch.tensor(4.0).log()
    assert dist.entropy().std() > 0
