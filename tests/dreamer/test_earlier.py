"""DreamerV1, V2, V3 of 2023 and Pro: counts, and what is their own."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dreamer.agent import Agent, make_agent
from dreamer.decoder import SQUARED_LINEAR
from dreamer.earlier import (
    AdamsConfig,
    ProConfig,
    PrototypesConfig,
    V1Config,
    V2Config,
    V3Of2023Config,
)
from dreamer.policy import Policy
from dreamer.presets import AGENTS, agent_config
from dreamer.spaces import ActionSpace, BoxAction, DiscreteAction, ImageSpec, ObsSpace
from dreamer.weights import pack
from tests.dreamer.cases import (
    ACTIONS,
    PIXELS,
    PUSH,
    TURN,
    VECTOR,
    batch_of,
    build,
    close,
    golden,
    losses_of,
    random_obs,
)

EARLIER = [name for name in AGENTS if name != "v3"]


def count(module: nn.Module) -> int:
    return sum(param.numel() for param in module.parameters())


@pytest.mark.parametrize(
    ("key", "size", "channels", "actions"),
    [
        ("param_count_v2_dmc_A6_rgb", "dmc", 3, BoxAction(low=(-1.0,) * 6, high=(1.0,) * 6)),
        ("param_count_v2_atari_A18_gray", "atari", 1, DiscreteAction(classes=18)),
    ],
)
def test_parameter_counts_of_v2_match_the_tables(
    key: str, size: str, channels: int, actions: Any
) -> None:
    _, want = golden(key)
    with torch.device("meta"):
        obs: ObsSpace = {"image": ImageSpec(shape=(64, 64, channels))}
        agent: Any = make_agent(agent_config("v2", size), obs, {"action": actions})
    parts = {"enc": "encoder", "rssm": "rssm", "dec": "decoder", "reward": "reward"}
    parts |= {"critic": "critic", "actor": "actor"}
    parts |= {"discount": "cont"} if "discount" in want else {}
    found = {short: count(getattr(agent, part)) for short, part in parts.items()}
    assert found == {short: want[short] for short in parts}


def test_parameter_counts_of_v1_follow_from_its_layers() -> None:
    agent: Any = build_published("v1")
    convs = sum((a * 16 + 1) * b for a, b in [(3, 32), (32, 64), (64, 128), (128, 256)])
    assert count(agent.encoder) == convs
    dense = (36 + 1) * 200 + 3 * 200 * (200 + 200) + 6 * 200
    prior = (200 + 1) * 200 + (200 + 1) * 60
    posterior = (200 + 1024 + 1) * 200 + (200 + 1) * 60
    assert count(agent.rssm) == dense + prior + posterior
    hidden = (230 + 1) * 400
    assert count(agent.reward) == hidden + 401 * 400 + 401
    assert count(agent.critic) == hidden + 2 * 401 * 400 + 401
    assert count(agent.actor) == hidden + 3 * 401 * 400 + 401 * 12


@pytest.mark.parametrize(
    ("size", "deter", "depth", "units", "layers"),
    [
        ("xs", 256, 24, 256, 1),
        ("s", 512, 32, 512, 2),
        ("m", 1024, 48, 640, 3),
        ("l", 2048, 64, 768, 4),
        ("xl", 4096, 96, 1024, 5),
    ],
)
def test_parameter_counts_of_v3_of_2023_follow_from_its_layers(
    size: str, deter: int, depth: int, units: int, layers: int
) -> None:
    agent: Any = build_published("v3-2023", size, PIXELS | VECTOR)
    feature, embed = deter + 1024, 8 * depth * 16 + 1024

    def mlp(inputs: int, width: int, depth: int, outputs: int) -> int:
        # No bias before a norm, which has a scale and a shift.
        hidden = inputs * width + (depth - 1) * width**2 + depth * 2 * width
        return hidden + (width + 1) * outputs

    channels = [3, depth, 2 * depth, 4 * depth, 8 * depth]
    pairs = list(zip(channels[:-1], channels[1:], strict=True))
    convs = sum(16 * a * b + 2 * b for a, b in pairs)
    # The vectors' MLPs stay 5 of 1024 at every size.
    vectors = 3 * 1024 + 4 * 1024**2 + 5 * 2 * 1024
    assert count(agent.encoder) == convs + vectors
    stem = (feature + 1) * 16 * 8 * depth
    deconvs = sum(16 * a * b for a, b in pairs) + 3 + sum(2 * b for b in channels[1:-1])
    assert count(agent.decoder) == stem + deconvs + mlp(feature, 1024, 5, 3)
    core = (1024 + 6) * units + 2 * units + (units + deter) * 3 * deter + 2 * 3 * deter
    prior, posterior = mlp(deter, units, 1, 1024), mlp(deter + embed, units, 1, 1024)
    assert count(agent.rssm) == core + prior + posterior + deter  # the learned start
    for part, outputs in {"reward": 255, "critic": 255, "cont": 1, "actor": 12}.items():
        assert count(getattr(agent, part)) == mlp(feature, units, layers, outputs), part


def test_parameter_counts_of_pro_follow_from_its_layers() -> None:
    agent: Any = build_published("pro")
    convs = sum((a * 16 + 1) * b for a, b in [(3, 48), (48, 96), (96, 192), (192, 384)])
    assert count(agent.encoder) == count(agent.prototypes.slow_encoder) == convs
    proto = agent.prototypes
    assert count(proto.embed_proj) == count(proto.slow_proj) == (1536 + 1) * 32
    assert count(proto.feature_proj) == (232 + 1) * 32
    assert proto.centres.shape == (2500, 32)
    assert count(agent.reward) == count(agent.critic) == 233 * 400 + 3 * 401 * 400 + 401
    gru = (400 + 1) * 600 + 2 * 600
    dense = (38 + 1) * 200
    prior = (200 + 1) * 200 + (200 + 1) * 64
    posterior = (200 + 1536 + 1) * 200 + (200 + 1) * 64
    assert count(agent.rssm) == dense + gru + prior + posterior
    assert agent.decoder is None and agent.cont is None


def build_published(name: str, size: str = "dmc", obs: ObsSpace = PIXELS) -> Agent:
    with torch.device("meta"):
        actions: ActionSpace = {"action": BoxAction(low=(-1.0,) * 6, high=(1.0,) * 6)}
        return make_agent(agent_config(name, size), obs, actions)


@pytest.mark.parametrize("name", EARLIER)
@pytest.mark.parametrize("actions", [TURN, PUSH, ACTIONS], ids=["discrete", "box", "mixed"])
def test_every_agent_trains_on_vectors_with_any_action(name: str, actions: ActionSpace) -> None:
    agent = build(name, VECTOR, actions)
    for _ in range(2):
        metrics, _ = agent.update(batch_of(agent))
    assert all(torch.isfinite(value) and value.dim() == 0 for value in metrics.values())


@pytest.mark.parametrize("name", EARLIER)
def test_every_agent_trains_on_pixels_and_shows_pictures(name: str) -> None:
    agent = build(name, PIXELS, TURN)
    batch = batch_of(agent)
    metrics, _ = agent.update(batch)
    assert all(torch.isfinite(value) for value in metrics.values())
    if name in ("r2", "infonce"):
        assert agent.open_loop(batch, context=2) == {}, "nothing decodes"
        return
    truth, made, seen = agent.open_loop(batch, context=2)["image"]
    assert {x.shape for x in (truth, *made)} == {(2, 6, 64, 64, 3)}
    assert all(0 <= x.min() and x.max() <= 1 for x in (truth, *made) if seen is None)
    # Without a decoder there are two different views, and nothing is predicted.
    assert (len(made), seen is None) == ((2, True) if agent.decoder is None else (1, False))
    assert len(made) == 1 or not torch.equal(*made)


@pytest.mark.parametrize("name", EARLIER)
@pytest.mark.parametrize("size", ["reward", "vector"])
def test_updates_stay_finite_under_extreme_data(name: str, size: str) -> None:
    agent = build(name)
    batch = batch_of(agent)
    huge = torch.tensor([1e8, -1e8, 1e-8, 0.0, 1.0, -1.0])
    if size == "reward":
        batch = batch._replace(reward=huge.expand(2, 6))
    elif name in ("v1", "v2", "pro"):
        # These read vectors as they are, so that squares of 1e8 are what the losses have to bear.
        batch = batch._replace(obs={"vector": huge[None, :, None].expand(2, 6, 3)})
    else:
        batch = batch._replace(obs={"vector": 1e30 * huge[None, :, None].expand(2, 6, 3)})
    metrics, _ = agent.update(batch)
    assert all(torch.isfinite(value) for value in metrics.values())
    assert all(torch.isfinite(param).all() for param in agent.parameters())


@pytest.mark.parametrize("name", AGENTS)
def test_every_trained_module_reports_the_norm_of_its_gradient(name: str) -> None:
    agent = build(name)
    metrics, _ = agent.update(batch_of(agent))
    trained = {key.split(".")[0] for key, p in agent.named_parameters() if p.requires_grad}
    norms = {key: metrics[f"grad_norm/{key}"] for key in trained}
    assert norms["actor"] > 0 and norms["encoder"] > 0
    for group in agent.groups():
        whole = metrics[f"grad_norm/{group.name}" if group.name else "grad_norm"]
        inside = trained - {"actor", "critic"} if group.name == "model" else trained
        inside = {group.name} if group.name in ("actor", "critic") else inside
        close(torch.stack([norms[key] for key in sorted(inside)]).norm(), whole, rtol=1e-4)


@pytest.mark.parametrize("name", ["v1", "v2", "v3-2023"])
def test_reconstruction_weighs_what_it_is_told_and_nothing_else_changes(name: str) -> None:
    found = []
    for weight in (1.0, 20.0):
        torch.manual_seed(0)
        agent = build(name, rec_scale=weight)
        found.append(agent.update(batch_of(agent))[0])
    light, heavy = found
    close(heavy["grad_norm/decoder"], 20.0 * light["grad_norm/decoder"], rtol=1e-3)
    close(heavy["grad_norm/reward"], light["grad_norm/reward"], rtol=1e-3)


def test_the_kl_of_v1_stops_below_its_free_nats() -> None:
    agent = build("v1", free_nats=1000.0)
    losses, rollout, _ = losses_of(agent, batch_of(agent))
    assert losses["kl"] == 1000.0
    (grad,) = torch.autograd.grad(losses["kl"], rollout.post)
    assert not grad.any()


def test_an_episode_that_ended_teaches_v2_nothing_after_its_end() -> None:
    agent: Any = build("v2")
    losses, _, _ = losses_of(agent, batch_of(agent))
    ended = 2  # the record that is terminal in `batch_of`
    assert losses["value"][ended, 0] != 0 and not losses["value"][ended, 1:].any()


def test_squared_errors_too_small_to_matter_are_none_in_v3_of_2023() -> None:
    target = torch.tensor([0.0, 0.0])
    error = SQUARED_LINEAR.vector(torch.tensor([9e-5, 2e-4]), target)
    close(error, [0.0, 4e-8], rtol=1e-3)


def test_v2_copies_its_critic_at_once_and_then_after_every_hundred_updates() -> None:
    agent: Any = build("v2", slow_every=3)
    same = []
    for _ in range(7):
        with torch.no_grad():
            agent.critic.out.bias += 1.0
        agent.update_slow()
        same.append(torch.equal(agent.critic.out.bias, agent.slow_critic.out.bias))
    assert same == [True, False, False, True, False, False, True]


def test_v3_of_2023_starts_episodes_from_a_learned_state() -> None:
    agent: Any = build("v3-2023")
    batch = batch_of(agent)
    with torch.no_grad():
        agent.rssm.first_deter.fill_(0.7)
    start = agent.rssm.start()
    close(start[0], torch.full((16,), 0.7).tanh())
    rollout = agent.observe(batch)
    (grad,) = torch.autograd.grad(rollout.states.deter[:, 0].sum(), agent.rssm.first_deter)
    assert grad.any()


@pytest.mark.parametrize(("name", "act"), [("v1", F.relu), ("v2", F.elu), ("pro", F.elu)])
def test_only_the_convolutions_of_v1_have_relu(name: str, act: Any) -> None:
    modules = build(name, PIXELS | VECTOR).named_modules()
    acts = {key: module.act for key, module in modules if hasattr(module, "act")}
    assert {found for key, found in acts.items() if ".towers." in key} == {act}
    assert {found for key, found in acts.items() if ".towers." not in key} == {F.elu}


def test_the_defaults_of_earlier_agents_are_those_of_their_publications() -> None:
    v1, v2, v3, pro = V1Config(), V2Config(), V3Of2023Config(), ProConfig()
    v1_adam = AdamsConfig(
        model_lr=6e-4, actor_lr=8e-5, critic_lr=8e-5, eps=1e-7, behaviour_eps=1e-7,
        model_clip=100.0, behaviour_clip=100.0, decay=0.0,
    )  # fmt: skip
    v2_adam = replace(v1_adam, eps=1e-5, behaviour_eps=1e-5, decay=1e-6)
    assert v1.optim == v1_adam
    assert v2.optim == replace(v2_adam, model_lr=1e-4, critic_lr=2e-4)
    assert pro.optim == replace(v2_adam, model_lr=3e-4)
    assert v3.optim == replace(
        v1_adam, model_lr=1e-4, actor_lr=3e-5, critic_lr=3e-5, eps=1e-8, behaviour_eps=1e-5,
        model_clip=1000.0,
    )  # fmt: skip
    rules = [config.imagination for config in (v1, v2, v3, pro)]
    assert [(rule.horizon, rule.lambda_) for rule in rules] == [(15, 0.95)] * 4
    assert [rule.discount for rule in rules] == [0.99, 0.99, 1 - 1 / 333, 0.99]
    assert [rule.entropy for rule in rules] == [0.0, 2e-3, 3e-4, 1e-4]
    assert (v2.imagination.gradient, v2.imagination.mix, v2.kl_balance) == ("auto", 0.1, 0.8)
    assert (v1.free_nats, v2.free_nats, v3.free_nats, pro.free_nats) == (3.0, 0.0, 1.0, 1.0)
    assert (v1.cont, v1.cont_scale, v2.cont, v2.cont_scale, pro.cont) == (False, 10, True, 1, False)
    assert (v2.reward, pro.reward, v2.slow_every, pro.slow_every) == ("tanh", "identity", 100, 100)
    assert (v3.slow_rate, v3.slow_regulariser, v3.continuation) == (0.02, 1.0, "mode")
    assert (v3.return_rate, v3.return_low, v3.return_high, v3.return_limit) == (0.01, 0.05, 0.95, 1)
    assert pro.prototypes == PrototypesConfig(
        count=2500, size=32, temperature=0.1, eps=0.0125, iterations=3, freeze=10_000,
        ema_rate=0.05, norm_scale=0.0, shift=3.0, whole_pixels=False, rollout="augmented",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "deviation"),
    [
        ("v1", "v1_actor_std@0"),
        ("v2", "v2_truncnormal_std@0"),
        ("v3-2023", "v3_bounded_normal_std@0"),
        ("pro", "dreamerpro_tanhnormal_std@0"),
    ],
)
def test_a_policy_without_opinion_has_the_published_deviation(name: str, deviation: str) -> None:
    agent: Any = build(name, VECTOR, PUSH)
    nn.init.zeros_(agent.actor.out.weight)
    policy = agent.actor(agent.rssm.initial(1).feature())
    close(policy.parts[0].std, [[golden("std_parametrisations")[1][deviation]]], rtol=1e-5)


def test_agents_are_evaluated_as_their_publications_do() -> None:
    greedy = {name for name, known in AGENTS.items() if known.config.evaluation == "greedy"}
    assert greedy == {"v1", "v2", "pro", "pro-v3", "r2", "infonce"}


@pytest.mark.parametrize("name", EARLIER)
def test_the_policy_alone_acts_from_published_weights(name: str) -> None:
    agent = build(name)
    assert set(agent.policy_tensors()) <= set(agent.state_dict())
    policy = Policy(agent.config, VECTOR, TURN)
    policy.load(pack(agent.policy_tensors(), (0, 1)))
    obs = random_obs(VECTOR, (3,))
    for mode in ("explore", "sample", "greedy"):
        actions, latents = policy.step(obs, np.ones(3, bool), mode=mode)
        assert actions["action"].shape == (3,)
        assert set(latents) == ({"deter", "stoch"} if agent.config.context else set())


def test_actors_of_v1_explore_and_its_evaluation_does_not() -> None:
    agent = build("v1", VECTOR, PUSH)
    policy = Policy(agent.config, VECTOR, PUSH, seed=0)
    policy.load(pack(agent.policy_tensors(), (0, 1)))
    assert agent.config.evaluation == "greedy"
    obs, first = random_obs(VECTOR, (400,)), np.ones(400, bool)
    obs = {key: np.zeros_like(value) for key, value in obs.items()}
    with torch.no_grad():
        policy.actor.out.weight.zero_()  # type: ignore[union-attr, operator]
        policy.actor.out.bias[1] = -30.0  # type: ignore[union-attr, index]
    still, _ = policy.step(obs, first, mode="sample")
    moved, _ = policy.step(obs, first, mode="explore")
    assert still["action"].std() < 0.01
    assert 0.25 < moved["action"].std() < 0.35


@pytest.mark.parametrize("name", AGENTS)
def test_agents_before_2024_begin_with_uniform_actions(name: str) -> None:
    agent = build(name, VECTOR, ACTIONS)
    with torch.no_grad():  # a policy that always does the same
        agent.actor.out.weight.zero_()  # type: ignore[union-attr, operator]
        agent.actor.out.bias.copy_(-30.0 * torch.arange(len(agent.actor.out.bias)))  # type: ignore
    obs, first = random_obs(VECTOR, (3000,)), np.ones(3000, bool)

    def explored(updates: int) -> dict[str, Any]:
        policy = Policy(agent.config, VECTOR, ACTIONS, seed=0)
        policy.load(pack(agent.policy_tensors(), (0, updates)))
        return policy.step(obs, first, mode="explore")[0]

    turns, push = explored(0)["action.turn"], explored(0)["action.push"]
    if name in ("v1", "v2", "v3-2023", "pro"):
        assert np.bincount(turns, minlength=3) == pytest.approx(1000, abs=150)
        assert np.histogram(push, 4, (-1, 1))[0] == pytest.approx(1500, abs=200)
        assert np.bincount(explored(0)["action.keys"][:, 1]) == pytest.approx(750, abs=150)
    else:
        assert (turns == 0).mean() > 0.95, "the policy acts from the beginning"
    assert (explored(1)["action.turn"] == 0).mean() > 0.95


def test_options_of_another_agent_are_refused() -> None:
    config = replace(agent_config("v2", "debug"), name="v3")
    with pytest.raises(ValueError, match="agent 'v3' takes the options of V3Config, got V2Config"):
        make_agent(config, VECTOR, TURN)
