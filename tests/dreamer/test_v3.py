import math
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dreamer import ops
from dreamer.agent import Losses, Rollout, Trajectory
from dreamer.batch import Batch
from dreamer.config import LossScales, OptimConfig, V3Config
from dreamer.presets import SIZES, agent_config
from dreamer.rssm import State
from dreamer.spaces import BoxAction, DiscreteAction, ImageSpec, ObsSpace, VectorSpec
from dreamer.v3 import DreamerV3
from tests.dreamer.cases import (
    ACTIONS,
    GOLDEN,
    OBS,
    PUSH,
    TURN,
    VECTOR,
    close,
    debug_agent,
    debug_config,
    golden,
    losses_of,
    random_batch,
    wake_zero_layers,
)

PIXELS: ObsSpace = {"image": ImageSpec(shape=(64, 64, 3))}
# Sizes of our own have no published counts; of size 12m only the total is known.
OURS = ("debug", "tiny")
COUNTED = [size for size in SIZES if size not in (*OURS, "12m")]
PARTS = {
    "dyn": "rssm",
    "enc": "encoder",
    "dec": "decoder",
    "rew": "reward",
    "con": "cont",
    "val": "critic",
    "pol": "actor",
}


def parameters(module: nn.Module) -> int:
    return sum(param.numel() for param in module.parameters())


def meta_agent(size: str, obs: ObsSpace, box: BoxAction) -> DreamerV3:
    with torch.device("meta"):
        return DreamerV3(agent_config("v3", size), obs, {"action": box})


@pytest.mark.parametrize("size", COUNTED)
def test_parameter_counts_match_the_published_tables_part_by_part(size: str) -> None:
    _, want = golden(f"param_count_size{size}_dmc_vision_A6")
    agent = meta_agent(size, PIXELS, BoxAction(low=(-1.0,) * 6, high=(1.0,) * 6))
    got = {key: parameters(getattr(agent, part)) for key, part in PARTS.items()}
    assert got | {"total": sum(got.values())} == want


def test_parameter_count_of_size_12m_is_the_published_total() -> None:
    agent = meta_agent("12m", PIXELS, BoxAction(low=(-1.0,) * 6, high=(1.0,) * 6))
    total = sum(parameters(getattr(agent, part)) for part in PARTS.values())
    assert round(total / 1e6, 2) == 10.49


def test_parameter_counts_on_vectors_match_those_of_the_official_code() -> None:
    _, want = golden("param_count_size1m_dmc_proprio_walker_obs24_A6")
    obs: ObsSpace = {"orientations": VectorSpec(shape=(14,)), "rest": VectorSpec(shape=(10,))}
    one: ObsSpace = {"vector": VectorSpec(shape=(24,))}
    agent = meta_agent("1m", one, BoxAction(low=(-1.0,) * 6, high=(1.0,) * 6))
    got = {key: parameters(getattr(agent, part)) for key, part in PARTS.items()}
    assert got | {"total": sum(got.values())} == want
    split = meta_agent("1m", obs, BoxAction(low=(-1.0,) * 6, high=(1.0,) * 6))
    assert sum(parameters(getattr(split, part)) for part in PARTS.values()) == want["total"]


def test_every_golden_parameter_count_is_tested() -> None:
    counted = {name.split("_")[2] for name in GOLDEN if name.startswith("param_count_size")}
    assert counted == {f"size{size}" for size in COUNTED}


def test_loss_names_equal_scale_names() -> None:
    agent = debug_agent(OBS, ACTIONS)
    losses, _, _ = losses_of(agent, random_batch(agent))
    assert set(losses) == {field.name for field in fields(LossScales)}
    assert {name for group in agent.groups() for name in group.losses} == set(losses)


def test_every_loss_is_per_step_until_the_mean() -> None:
    agent = debug_agent(OBS, ACTIONS)
    losses, _, trajectory = losses_of(agent, random_batch(agent, size=2, length=5))
    shapes = {name: tuple(loss.shape) for name, loss in losses.items()}
    model = dict.fromkeys(("rec", "rew", "con", "dyn", "rep"), (2, 5))
    assert shapes == model | {"policy": (10, 15), "value": (10, 15), "repval": (2, 4)}
    assert trajectory.actions.shape == (10, 16, agent.codec.size)
    assert all(loss.dtype == torch.float32 for loss in losses.values())


def test_the_slow_critic_starts_as_a_copy_and_follows_without_gradient() -> None:
    agent = debug_agent()
    pairs = list(zip(agent.critic.parameters(), agent.slow_critic.parameters(), strict=True))
    assert all(torch.equal(fast, slow) for fast, slow in pairs)
    assert not any(slow.requires_grad for _, slow in pairs)
    given, want = golden("slow_critic_ema")
    assert agent.config.behaviour.slow_rate == given["rate"]
    with torch.no_grad():
        for fast, slow in pairs:
            fast.fill_(1.0)
            slow.fill_(0.0)
    for expected in want["slow"]:
        agent.update_slow()
        close(pairs[0][1], torch.full_like(pairs[0][1], expected), rtol=1e-5)


def test_imagination_starts_at_every_replayed_state_and_has_no_gradient() -> None:
    agent = debug_agent(OBS, ACTIONS)
    rollout = agent.observe(random_batch(agent, size=2, length=5))
    trajectory = agent.imagine(rollout)
    assert trajectory.feature.shape == (10, 16, 16 + 4 * 4)
    assert torch.equal(trajectory.feature[:, 0], rollout.states.feature().detach().flatten(0, 1))
    assert not trajectory.feature.requires_grad and not trajectory.actions.requires_grad
    assert not trajectory.actions[:, -1].any()


def test_model_losses_equal_their_equations() -> None:
    agent = debug_agent()
    wake_zero_layers(agent)
    batch = random_batch(agent)
    rollout = agent.observe(batch)
    losses, _ = agent.model_losses(batch, rollout)
    feature = torch.cat([rollout.states.deter, rollout.states.stoch.flatten(2)], -1)
    target = (1 - 1 / 333) * (1.0 - batch.is_terminal.float())
    logit = agent.cont.out(agent.cont.mlp(feature))[..., 0]
    cross = -target * nn.functional.logsigmoid(logit) - (1 - target) * nn.functional.logsigmoid(
        -logit
    )
    close(losses["con"], cross, rtol=1e-4)
    logits = agent.reward.out(agent.reward.mlp(feature))
    close(losses["rew"], ops.twohot_loss(logits, batch.reward, ops.symexp_bins()), rtol=1e-4)
    log_q, log_p = (
        (0.99 * stats.unflatten(-1, (4, 4)).softmax(-1) + 0.01 / 4).log()  # type: ignore[no-untyped-call]
        for stats in (rollout.post, rollout.prior)
    )
    kl = (log_q.exp() * (log_q - log_p)).sum((-2, -1))
    close(losses["dyn"], kl.clamp(min=1.0), rtol=1e-4)
    close(losses["rep"], kl.clamp(min=1.0), rtol=1e-4)


def plain_behaviour(agent: DreamerV3, batch: Batch, rollout: Rollout, path: Trajectory) -> Losses:
    """The actor and critic losses written out with loops, from the heads' means."""
    feature, rule = path.feature, agent.config.behaviour
    reward, live = agent.reward(feature).mean(), agent.cont(feature).mean()
    value, slow = agent.critic(feature).mean(), agent.slow_critic(feature).mean()
    steps = feature.shape[1] - 1
    returns = torch.zeros(len(feature), steps)
    after = value[:, -1]
    for t in reversed(range(steps)):
        mixed = 0.05 * value[:, t + 1] + 0.95 * after
        after = returns[:, t] = reward[:, t + 1] + live[:, t + 1] * mixed
    weight = torch.stack([live[:, : t + 1].prod(1) for t in range(steps)], 1)
    low, high = (0.01 * x for x in ops.percentiles(returns, 0.05, 0.95))
    advantage = (returns - value[:, :-1]) / max(1.0, float(high - low))
    policy = agent.actor(feature[:, :-1])
    score = policy.log_prob(path.actions[:, :-1]) * advantage + rule.entropy * policy.entropy()
    critic = agent.critic(feature[:, :-1])
    fit = critic.loss(returns) + critic.loss(slow[:, :-1])
    length = batch.reward.shape[1]
    boot = returns[:, 0].reshape(-1, length)
    replayed = torch.zeros(len(boot), length - 1)
    after = boot[:, -1]
    for t in reversed(range(length - 1)):
        trace = 0.95 * (~batch.is_last[:, t + 1]).float()
        mixed = (1 - trace) * boot[:, t + 1] + trace * after
        live_on = (1 - 1 / 333) * (~batch.is_terminal[:, t + 1]).float()
        after = replayed[:, t] = batch.reward[:, t + 1] + live_on * mixed
    start = rollout.states.feature()[:, :-1]
    old = agent.critic(start)
    refit = old.loss(replayed) + old.loss(agent.slow_critic(start).mean())
    return {
        "policy": -weight * score,
        "value": weight * fit,
        "repval": (~batch.is_last[:, :-1]).float() * refit,
    }


def test_behaviour_losses_equal_their_equations_written_out() -> None:
    agent = debug_agent(OBS, ACTIONS)
    wake_zero_layers(agent)
    with torch.no_grad():
        for param in agent.slow_critic.parameters():
            param.add_(0.01 * torch.randn_like(param))
        # Predictions of ordinary size: random logits over bins up to 1e8 would hide everything.
        for head in (agent.reward, agent.critic, agent.slow_critic):
            head.out.weight.mul_(0.1)
            head.out.bias.copy_(-ops.symlog(head.bins).abs())
    batch = random_batch(agent)
    rollout = agent.observe(batch)
    trajectory = agent.imagine(rollout)
    want = plain_behaviour(agent, batch, rollout, trajectory)
    losses, _ = agent.behaviour_losses(batch, rollout, trajectory)
    for name, expected in want.items():
        close(losses[name], expected.detach(), rtol=1e-3, atol=1e-5)


def test_the_replay_critic_learns_nothing_from_the_last_record_of_an_episode() -> None:
    agent = debug_agent()
    batch = random_batch(agent)
    losses, _, _ = losses_of(agent, batch)
    assert batch.is_last[0, 2] and losses["repval"][0, 2] == 0.0
    assert (losses["repval"][1] != 0).all()


def test_a_reward_after_an_episode_end_does_not_reach_the_critic_before_it() -> None:
    agent = debug_agent()
    batch = random_batch(agent)
    reward = batch.reward.clone()
    reward[0, 3:] = 1e3
    seen = []
    for changed in (batch, batch._replace(reward=reward)):
        torch.manual_seed(3)
        seen.append(losses_of(agent, changed)[0]["repval"][0, :2])
    assert torch.equal(*seen)


def training_config(lr: float = 3e-3, **changes: Any) -> V3Config:
    return debug_config(optim=OptimConfig(lr=lr, warmup=0), **changes)


@pytest.mark.parametrize(
    ("obs", "actions"), [(VECTOR, TURN), (OBS, ACTIONS)], ids=["vector", "everything"]
)
def test_the_world_model_overfits_one_batch(obs: ObsSpace, actions: Any) -> None:
    agent = debug_agent(obs, actions, training_config(lr=1e-2))
    batch = random_batch(agent)
    if "image" in batch.obs:
        # Independent noise in every pixel is more than this size can remember.
        brightness = 40 * torch.arange(1, 6, dtype=torch.uint8).reshape(1, 5, 1, 1, 1)
        batch.obs["image"] = brightness.expand_as(batch.obs["image"])
    names = ("rec", "rew", "con", "dyn")
    totals = []
    for _ in range(40):
        metrics, _ = agent.update(batch)
        totals.append(sum(metrics[f"loss/{name}"].item() for name in names))
    assert totals[-1] < 0.6 * totals[0]


def test_a_policy_learns_which_action_is_rewarded_in_imagination() -> None:
    agent = debug_agent(VECTOR, PUSH, training_config())
    feature = torch.zeros(64, 16, 16 + 16)
    torch.manual_seed(0)
    for _ in range(150):
        action = agent.actor(feature).sample()
        policy = agent.actor(feature)
        loss = -(policy.log_prob(action) * action[..., 0].clamp(-1, 1)).mean()
        params = list(agent.actor.parameters())
        grads = torch.autograd.grad(loss, params)
        with torch.no_grad():
            torch._foreach_add_(params, grads, alpha=-0.1)
    assert agent.actor(feature[:1, 0]).mode().item() > 0.8


def test_a_seeded_run_reproduces_bit_for_bit() -> None:
    runs = []
    for _ in range(2):
        agent = debug_agent(OBS, ACTIONS, training_config())
        batch = random_batch(agent)
        for step in range(3):
            torch.manual_seed(step)
            agent.update(batch)
        runs.append(agent.state_dict())
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())


def test_update_zero_moves_no_parameter_but_the_next_one_does() -> None:
    agent = debug_agent()
    before = [param.detach().clone() for param in agent.parameters()]
    agent.update(random_batch(agent))
    assert all(torch.equal(a, b) for a, b in zip(before, agent.parameters(), strict=True))
    agent.update(random_batch(agent))
    moved = [not torch.equal(a, b) for a, b in zip(before, agent.parameters(), strict=True)]
    assert sum(moved) > len(moved) / 2


EXTREMES: dict[str, Callable[[Batch], Batch]] = {
    "huge rewards": lambda b: b._replace(reward=b.reward.sign() * 1e8),
    "tiny rewards": lambda b: b._replace(reward=b.reward * 1e-8),
    "zero rewards": lambda b: b._replace(reward=b.reward * 0),
    "huge vectors": lambda b: b._replace(obs=b.obs | {"vector": b.obs["vector"].sign() * 1e8}),
    "tiny vectors": lambda b: b._replace(obs=b.obs | {"vector": b.obs["vector"] * 1e-8}),
    "largest vectors": lambda b: b._replace(obs=b.obs | {"vector": b.obs["vector"].sign() * 3e38}),
    "black images": lambda b: b._replace(obs=b.obs | {"image": b.obs["image"] * 0}),
    "white images": lambda b: b._replace(obs=b.obs | {"image": b.obs["image"] | 255}),
    "huge actions": lambda b: b._replace(prev_action=b.prev_action * 1e8),
    "all first": lambda b: b._replace(is_first=b.is_first | True),
    "all last": lambda b: b._replace(is_last=b.is_last | True, is_terminal=b.is_terminal | True),
}


@pytest.mark.parametrize("kind", EXTREMES)
def test_updates_stay_finite_under_extreme_data(kind: str) -> None:
    agent = debug_agent(OBS, ACTIONS, training_config())
    batch = EXTREMES[kind](random_batch(agent))
    for _ in range(4):
        metrics, latents = agent.update(batch)
    wrong = [name for name, value in metrics.items() if not math.isfinite(value)]
    assert not wrong
    assert all(torch.isfinite(value).all() for value in agent.state_dict().values())
    assert torch.isfinite(latents["deter"]).all()


def test_updates_stay_finite_and_close_under_autocast() -> None:
    totals = []
    for amp in (None, torch.bfloat16):
        agent = debug_agent(OBS, ACTIONS, training_config())
        agent.amp = amp
        batch = random_batch(agent)
        metrics, _ = agent.update(batch)
        totals.append(metrics["loss/rec"].item())
        assert all(math.isfinite(value) for value in metrics.values())
        assert all(param.dtype == torch.float32 for param in agent.parameters())
    assert totals[1] == pytest.approx(totals[0], rel=0.02)


class OnDevice(TorchDispatchMode):
    """Record every operation on a tensor that is not on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.elsewhere: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        if any(x.device.type != "meta" for x in tensors):
            self.elsewhere.append(str(func))
        return out


class NoTensorFromNumbers(TorchFunctionMode):
    """Record every tensor made of Python numbers: on CUDA that is a copy from the host."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy):
            self.made.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_an_update_never_leaves_the_device() -> None:
    with torch.device("meta"):
        agent = DreamerV3(debug_config(), OBS, ACTIONS)
    source = random_batch(debug_agent(OBS, ACTIONS))
    batch = source._replace(
        obs={key: value.to("meta") for key, value in source.obs.items()},
        initial=State(*(part.to("meta") for part in source.initial)),
        **{
            name: getattr(source, name).to("meta")
            for name in ("prev_action", "reward", "is_first", "is_last", "is_terminal")
        },
    )
    with NoTensorFromNumbers() as numbers, OnDevice() as operations:
        agent.update(batch)
    assert not operations.elsewhere and not numbers.made


def test_open_loop_predictions_start_with_the_reconstruction_of_the_context() -> None:
    agent = debug_agent(OBS, ACTIONS)
    batch = random_batch(agent, size=2, length=8)
    videos = agent.open_loop(batch, context=5)
    assert set(videos) == {"image"}
    truth, (model,), seen = videos["image"]
    assert seen is not None and seen.tolist() == [8 * [True], 5 * [True] + 3 * [False]]
    assert truth.shape == model.shape == (2, 8, 16, 16, 3)
    close(truth, batch.obs["image"] / 255.0)
    assert 0 <= model.min() and model.max() <= 1


def test_open_loop_predictions_see_nothing_after_the_context() -> None:
    agent = debug_agent(OBS, ACTIONS)
    batch = random_batch(agent, size=1, length=8)
    later = {key: value.clone() for key, value in batch.obs.items()}
    later["image"][:, 5:] = 0
    batch.is_first.zero_()
    models = []
    for obs in (batch.obs, later):
        torch.manual_seed(0)
        models.append(agent.open_loop(batch._replace(obs=obs), context=5)["image"].made[0])
    assert torch.equal(*models)


@pytest.mark.parametrize("name", ["image", "vector"])
def test_discrete_and_continuous_agents_train_on_any_observation(name: str) -> None:
    for actions in ({"action": DiscreteAction(classes=2)}, PUSH):
        agent = debug_agent({name: OBS[name]}, dict(actions))
        metrics, _ = agent.update(random_batch(agent))
        assert all(math.isfinite(value) for value in metrics.values())


def test_scales_multiply_the_losses() -> None:
    config = training_config(scales=replace(LossScales(), rec=0.0))
    agent = debug_agent(config=config)
    before = [param.detach().clone() for param in agent.decoder.parameters()]
    agent.update(random_batch(agent))
    assert all(torch.equal(a, b) for a, b in zip(before, agent.decoder.parameters(), strict=True))


def test_metrics_stay_on_the_device_as_numbers_without_axes() -> None:
    agent = debug_agent(OBS, ACTIONS)
    metrics, _ = agent.update(random_batch(agent))
    assert all(value.dim() == 0 and not value.requires_grad for value in metrics.values())
    assert {f"loss/rec_{key}" for key in OBS} | {"lr", "grad_norm"} <= set(metrics)
