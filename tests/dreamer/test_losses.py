"""Every loss of every agent beside its equation, written out in numpy over what the networks give.

What is expected uses none of the losses, heads, latents and likelihoods of the package. The
distributions of continuous actions are compared with theirs in test_dists.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dreamer.agent import Rollout, Trajectory
from dreamer.batch import Batch
from dreamer.presets import AGENTS, with_fields
from dreamer.spaces import ActionSpace, DiscreteSpec, ImageSpec, ObsSpace
from tests.dreamer.cases import PUSH, TURN, VECTOR, batch_of, build, close

SEEN: ObsSpace = {"image": ImageSpec(shape=(64, 64, 3)), "gear": DiscreteSpec(classes=4), **VECTOR}
HORIZON_333 = 1 - 1 / 333
LAMBDA = 0.95

Array = Any
Arrays = dict[str, Array]
Map = Callable[[Array], Array]


def numbers(x: Tensor) -> Array:
    return x.detach().double().numpy()


def raw(head: Any, feature: Tensor) -> Array:
    """What the network of a head gives, before it means anything."""
    return numbers(head.out(head.mlp(feature)))


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def symlog(x: Array) -> Array:
    return np.sign(x) * np.log1p(np.abs(x))


def symexp(x: Array) -> Array:
    return np.sign(x) * np.expm1(np.abs(x))


def log_softmax(x: Array) -> Array:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def log_mixed(logits: Array, unimix: float) -> Array:
    return np.log((1 - unimix) * np.exp(log_softmax(logits)) + unimix / logits.shape[-1])


def unit_normal(target: Array, mean: Array) -> Array:
    return 0.5 * (target - mean) ** 2 + 0.5 * np.log(2 * np.pi)


def bernoulli(target: Array, logit: Array) -> Array:
    return -target * np.log(sigmoid(logit)) - (1 - target) * np.log(1 - sigmoid(logit))


def two_hot(target: Array, bins: Array) -> Array:
    """Weights on the two bins around each target, one target at a time."""
    out = np.zeros((*target.shape, len(bins)))
    for at in np.ndindex(target.shape):
        above = int(np.searchsorted(bins, target[at]))
        share = (target[at] - bins[above - 1]) / (bins[above] - bins[above - 1])
        out[at][above - 1], out[at][above] = 1 - share, share
    return out


class Scalar(NamedTuple):
    """What a reward or critic network gives, as a mean and as a loss."""

    mean: Map
    loss: Callable[[Array, Array], Array]


def over_bins(
    bins: Array, into: Callable[[Array], Array], back: Callable[[Array], Array]
) -> Scalar:
    return Scalar(
        lambda given: back((np.exp(log_softmax(given)) * bins).sum(-1)),
        lambda given, target: -(two_hot(into(target), bins) * log_softmax(given)).sum(-1),
    )


EVEN = np.linspace(-20, 20, 255)
NORMAL = Scalar(lambda given: given[..., 0], lambda given, y: unit_normal(y, given[..., 0]))
SYMLOG = over_bins(EVEN, symlog, symexp)
SYMEXP = over_bins(symexp(EVEN), lambda x: x, lambda x: x)


def softplus_std(x: Array) -> Array:
    return np.log1p(np.exp(x)) + 0.1


def sigmoid2_std(x: Array) -> Array:
    return 2 * sigmoid(x / 2) + 0.1


def kl_of(rollout: Rollout, classes: int, unimix: float, std: Map) -> Array:
    """KL(posterior ‖ prior) for every step, one group or one number at a time."""
    post, prior = numbers(rollout.post), numbers(rollout.prior)
    total = np.zeros(post.shape[:2])
    if classes:
        for start in range(0, post.shape[-1], classes):
            q, p = (log_mixed(x[..., start : start + classes], unimix) for x in (post, prior))
            total += (np.exp(q) * (q - p)).sum(-1)
        return total
    width = post.shape[-1] // 2
    for i in range(width):
        (m, s), (n, t) = ((x[..., i], std(x[..., width + i])) for x in (post, prior))
        total += np.log(t / s) + (s**2 + (m - n) ** 2) / (2 * t**2) - 0.5
    return total


class Case(NamedTuple):
    """How an agent of some configuration is written out."""

    name: str
    values: dict[str, Any]
    scalar: Scalar
    classes: int
    unimix: float = 0.0
    std: Map = sigmoid2_std
    actor_unimix: float = 0.0


# A bonus that can be seen beside the returns, and averages of their range that move fast and divide
# by small numbers too: at the published rate the first scale is 1 whatever the returns are.
_BONUS = {"imagination.entropy": 0.3}
_OF_2023 = {"return_rate": 0.5, "return_limit": 0.01, **_BONUS}
_OF_2025 = {f"behaviour.{key}": _OF_2023[key] for key in ("return_rate", "return_limit")}
_OF_2025["behaviour.entropy"] = 0.3
CASES = {
    "v1": Case("v1", {"cont": True}, NORMAL, 0, std=softplus_std),
    "v1 without end": Case("v1", {}, NORMAL, 0, std=softplus_std),
    "v2": Case("v2", _BONUS, NORMAL, 4),
    "v2 mixed": Case("v2", {"imagination.gradient": "both", **_BONUS}, NORMAL, 4),
    "v2 gaussian": Case("v2", {"world.classes": 0, "reward": "sign", **_BONUS}, NORMAL, 0),
    "v3-2023": Case("v3-2023", _OF_2023, SYMLOG, 4, 0.01, actor_unimix=0.01),
    "v3-2023 by probability": Case(
        "v3-2023", {"continuation": "probability", **_OF_2023}, SYMLOG, 4, 0.01, actor_unimix=0.01
    ),
    "v3": Case("v3", _OF_2025, SYMEXP, 4, 0.01, actor_unimix=0.01),
    "pro": Case("pro", _BONUS, NORMAL, 0),
    "pro with ends": Case("pro", {"cont": True, "world.classes": 4, **_BONUS}, NORMAL, 4),
    "pro mixed": Case("pro", {"imagination.gradient": "both", **_BONUS}, NORMAL, 0),
    "pro-v3": Case("pro-v3", _OF_2025, SYMEXP, 4, 0.01, actor_unimix=0.01),
    "r2": Case("r2", _OF_2025, SYMEXP, 4, 0.01, actor_unimix=0.01),
    "infonce": Case("infonce", _OF_2025, SYMEXP, 4, 0.01, actor_unimix=0.01),
}
ON_V3 = ("v3", "pro-v3", "r2", "infonce")


def made(case: Case, obs: ObsSpace, actions: ActionSpace) -> Any:
    """An agent whose heads predict something, and whose slow critic is another one."""
    agent: Any = build(case.name, obs, actions, **case.values)
    for name in ("reward", "critic", "slow_critic"):
        head = getattr(agent, name, None)
        if head is not None:
            nn.init.normal_(head.out.weight, std=0.3)
            if case.scalar is not NORMAL:
                # Random logits over bins up to 1e8 would hide everything else.
                head.out.bias.data = torch.tensor(-1.5 * np.abs(EVEN)).float()
    return agent


def reconstruction(agent: Any, batch: Batch, rollout: Rollout) -> Array:
    predicted = agent.decoder(rollout.states.deter, rollout.states.stoch.flatten(2))
    shown = {key: numbers(value) for key, value in predicted.items()}
    image, vector = numbers(batch.obs["image"]) / 255, numbers(batch.obs["vector"])
    if agent.config.name in ("v1", "v2"):
        total = unit_normal(image - 0.5, shown["image"]).sum((2, 3, 4))
        total += unit_normal(vector, shown["vector"]).sum(-1)
    else:
        linear = agent.config.name == "v3-2023"
        light = shown["image"] + 0.5 if linear else sigmoid(shown["image"])
        total = ((light - image) ** 2).sum((2, 3, 4))
        error = (shown["vector"] - symlog(vector)) ** 2
        total += np.where(linear & (error < 1e-8), 0.0, error).sum(-1)
    gear = batch.obs["gear"].long().numpy()[..., None]
    return total - np.take_along_axis(log_softmax(shown["gear"]), gear, -1)[..., 0]


def sinkhorn(scores: Array, eps: float) -> Array:
    """(N, K) → assignments whose rows sum to one, after three rounds over columns and rows."""
    samples, prototypes = scores.shape
    q = np.exp(scores / eps)
    q /= q.sum()
    for _ in range(3):
        for k in range(prototypes):
            q[:, k] /= q[:, k].sum() * prototypes
        for n in range(samples):
            q[n] /= q[n].sum() * samples
    return q * samples


def prototype_losses(agent: Any, views: Batch, rollout: Rollout, eps: float) -> Arrays:
    module = agent.prototypes

    def unit(x: Array) -> Array:
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    centres = unit(numbers(module.centres))
    seen = numbers(module.embed_proj(rollout.embed))
    felt = numbers(module.feature_proj(rollout.states.feature()))
    teacher = unit(numbers(module.slow_proj(module.slow_encoder(views.obs))))
    half = len(teacher) // 2
    targets, students, states = [], [], []
    for view in (slice(half), slice(half, None)):
        # The first step has seen nothing before it, and is left out.
        targets.append(sinkhorn((teacher[view, 1:] @ centres.T).reshape(-1, len(centres)), eps))
        students.append(log_softmax(unit(seen)[view, 1:] @ centres.T / 0.1))
        states.append(log_softmax(unit(felt)[view, 1:] @ centres.T / 0.1))
    first, second = (x.reshape(-1, len(centres)) for x in students)
    swapped = (targets[1] * first).sum(-1) + (targets[0] * second).sum(-1)
    own = np.concatenate(states).reshape(-1, len(centres))
    norms = [np.linalg.norm(x, axis=-1) for x in (seen, felt)]
    return {
        "swav": -0.5 * swapped,
        "temp": -(np.concatenate(targets) * own).sum(-1),
        "norm": sum(((norm - 1) ** 2).mean() for norm in norms),
    }


def contrast_losses(agent: Any, rollout: Rollout) -> Arrays:
    x = numbers(agent.projection(rollout.states.feature())).reshape(-1, agent.encoder.outputs)
    y = numbers(rollout.embed).reshape(x.shape)
    if agent.config.name == "infonce":
        log_p = log_softmax(x @ y.T)
        own = -np.array([log_p[n, n] for n in range(len(x))])
        return {"infonce": own.reshape(rollout.embed.shape[:2])}
    x, y = ((z - z.mean(0)) / (z.std(0, ddof=1) + 1e-8) for z in (x, y))
    c = x.T @ y / len(x)
    diagonal = np.eye(len(c), dtype=bool)
    return {"barlow": ((c[diagonal] - 1) ** 2).sum() + 5e-4 * (c[~diagonal] ** 2).sum()}


def representation(case: Case, agent: Any, batch: Batch, rollout: Rollout) -> Arrays:
    """What the agent's representation learns from, drawing what the agent itself would draw."""
    if agent.decoder is not None:
        return {"rec": reconstruction(agent, batch, rollout)}
    if case.name == "pro-v3":
        views = agent.prototypes.views(batch)
        return prototype_losses(agent, views, agent.observe(views), 0.05)
    if case.name == "pro":
        return prototype_losses(agent, batch, rollout, 0.0125)
    return contrast_losses(agent, rollout)


def predictions(case: Case, agent: Any, batch: Batch, rollout: Rollout) -> Arrays:
    feature, reward = rollout.states.feature(), numbers(batch.reward)
    reward = {"v2": np.tanh}.get(case.name, lambda x: x)(reward)
    if "reward" in case.values:
        reward = np.sign(numbers(batch.reward))
    found = {"rew": case.scalar.loss(raw(agent.reward, feature), reward)}
    if agent.cont is not None:
        discount = HORIZON_333 if case.name in ON_V3 else 1.0 if case.name == "v3-2023" else 0.99
        target = discount * (1 - numbers(batch.is_terminal))
        found["con"] = bernoulli(target, raw(agent.cont, feature)[..., 0])
    return found


def divergences(case: Case, kl: Array, free: float) -> Arrays:
    if case.name in ("v1", "v2", "pro"):
        floored = np.maximum(kl.mean(), free)
    else:
        floored = np.maximum(kl, free)
    return {"kl": floored} if case.name == "v1" else {"dyn": floored, "rep": floored}


@pytest.mark.parametrize("share", [0.5, 2.0], ids=["above the free nats", "below the free nats"])
@pytest.mark.parametrize("kind", CASES)
def test_model_losses_equal_their_equations_written_out(kind: str, share: float) -> None:
    case = CASES[kind]
    agent = made(case, SEEN, TURN)
    batch = batch_of(agent)
    batch = batch._replace(reward=10.0 * batch.reward)
    if case.name == "pro":
        batch = agent.prototypes.views(batch)
    rollout = agent.observe(batch)
    kl = kl_of(rollout, case.classes, case.unimix, case.std)
    assert kl.std() > 0.0
    # Of a floor for every step some steps are on either side, of one for the mean the mean is.
    free = float(kl.mean() * share if case.name in ("v1", "v2", "pro") else np.median(kl))
    agent.config = with_fields(agent.config, {"free_nats": free})
    torch.manual_seed(3)
    losses, _ = agent.model_losses(batch, rollout)
    torch.manual_seed(3)
    want = representation(case, agent, batch, rollout)
    want |= predictions(case, agent, batch, rollout) | divergences(case, kl, free)
    assert set(losses) == set(want)
    for name, expected in want.items():
        assert losses[name].shape == np.shape(expected), name
        close(losses[name], expected, rtol=1e-4, atol=1e-5)


def current_returns(reward: Array, value: Array, live: Array) -> Array:
    """Returns with the reward of the state itself, one trajectory and one step at a time."""
    out = np.zeros((len(reward), reward.shape[1] - 1))
    for i in range(len(out)):
        after = value[i, -1]
        for t in reversed(range(out.shape[1])):
            mixed = (1 - LAMBDA) * value[i, t + 1] + LAMBDA * after
            after = out[i, t] = reward[i, t] + live[i, t] * mixed
    return out


def next_returns(reward: Array, value: Array, live: Array, trace: Array) -> Array:
    """Returns from the next state's reward on, one trajectory and one step at a time."""
    out = np.zeros((len(reward), reward.shape[1] - 1))
    for i in range(len(out)):
        after = value[i, -1]
        for t in reversed(range(out.shape[1])):
            mixed = (1 - trace[i, t + 1]) * value[i, t + 1] + trace[i, t + 1] * after
            after = out[i, t] = reward[i, t + 1] + live[i, t + 1] * mixed
    return out


def products_before(live: Array) -> Array:
    """1, d₀, d₀d₁, …"""
    out = np.ones_like(live)
    for t in range(1, live.shape[1]):
        out[:, t] = out[:, t - 1] * live[:, t - 1]
    return out


class Acted(NamedTuple):
    """Log-probability of the actions taken, and entropy of the policy, (N, H+1) each."""

    log_prob: Array
    entropy: Array


def acted(case: Case, agent: Any, trajectory: Trajectory, steps: int) -> Acted:
    """Of the first ``steps`` states."""
    feature, actions = trajectory.feature[:, :steps], trajectory.actions[:, :steps]
    if agent.codec.continuous:
        policy = agent.actor(feature)
        torch.manual_seed(5)  # some entropies are means over samples
        return Acted(numbers(policy.log_prob(actions)), numbers(policy.entropy()))
    log_p = log_mixed(raw(agent.actor, feature), case.actor_unimix)
    return Acted((log_p * numbers(actions)).sum(-1), -(np.exp(log_p) * log_p).sum(-1))


def behaviour_of_v1(case: Case, agent: Any, batch: Batch, path: Trajectory) -> Arrays:
    feature = path.feature[:, 1:]  # the state that the trajectory starts in is left out
    reward, value = (raw(head, feature)[..., 0] for head in (agent.reward, agent.critic))
    live = np.full_like(reward, 0.99)
    if agent.cont is not None:
        live = sigmoid(raw(agent.cont, feature)[..., 0])
    returns, weight = current_returns(reward, value, live), products_before(live)[:, :-1]
    assert returns.shape == (10 if agent.cont else 12, 14)  # or without the last starts
    return {"policy": -weight * returns, "value": weight * unit_normal(returns, value[:, :-1])}


def behaviour_of_v2(case: Case, agent: Any, batch: Batch, path: Trajectory) -> Arrays:
    feature = path.feature
    reward, value, slow = (
        raw(head, feature)[..., 0] for head in (agent.reward, agent.critic, agent.slow_critic)
    )
    live = np.full_like(reward, 0.99)
    if agent.cont is not None:
        live = sigmoid(raw(agent.cont, feature)[..., 0])
        live[:, 0] = 0.99 * (1 - numbers(batch.is_terminal).flatten())
    returns, weight = current_returns(reward, slow, live), products_before(live)
    mix = {"dynamics": 1.0, "reinforce": 0.0, "both": 0.1}[agent.gradient]
    if case.name == "pro":
        # The replayed state is one of the fifteen; an action earns R of the state it is taken in.
        assert returns.shape == (24, 14)
        earned, baseline = returns, value[:, :14]
    else:
        assert returns.shape == (12, 15)
        earned, baseline = returns[:, 1:], slow[:, :14]
    how = acted(case, agent, path, 14)
    gain = mix * earned + (1 - mix) * how.log_prob * (earned - baseline)
    count = returns.shape[1]
    return {
        "policy": -weight[:, :14] * (gain + 0.3 * how.entropy),
        "value": weight[:, :count] * unit_normal(returns, value[:, :count]),
    }


def scale_of(returns: Array) -> float:
    """The first range of an average from zero that goes half of the way."""
    low, high = np.percentile(returns, [5, 95])
    return max(0.01, 0.5 * high - 0.5 * low)


def behaviour_of_v3_of_2023(case: Case, agent: Any, batch: Batch, path: Trajectory) -> Arrays:
    feature, steps = path.feature, 15
    reward, value, slow = (
        case.scalar.mean(raw(head, feature))
        for head in (agent.reward, agent.critic, agent.slow_critic)
    )
    live = sigmoid(raw(agent.cont, feature)[..., 0])
    if case.values.get("continuation") != "probability":
        live = (live > 0.5).astype(float)
    live[:, 0] = 1 - numbers(batch.is_terminal).flatten()
    live = HORIZON_333 * live
    returns = next_returns(reward, value, live, np.full_like(live, LAMBDA))
    weight = np.cumprod(live, 1)[:, :steps] / HORIZON_333
    advantage = (returns - value[:, :steps]) / scale_of(returns)
    how = acted(case, agent, path, steps)
    gain = advantage if agent.codec.continuous else how.log_prob * advantage
    critic = raw(agent.critic, feature[:, :steps])
    fit = case.scalar.loss(critic, returns) + case.scalar.loss(critic, slow[:, :steps])
    return {"policy": -weight * (gain + 0.3 * how.entropy), "value": weight * fit}


def behaviour_of_v3(
    case: Case, agent: Any, batch: Batch, path: Trajectory, rollout: Rollout
) -> Arrays:
    feature, steps = path.feature, 15
    reward, value, slow = (
        case.scalar.mean(raw(head, feature))
        for head in (agent.reward, agent.critic, agent.slow_critic)
    )
    live = sigmoid(raw(agent.cont, feature)[..., 0])
    returns = next_returns(reward, value, live, np.full_like(live, LAMBDA))
    weight = np.cumprod(live, 1)[:, :steps]
    advantage = (returns - value[:, :steps]) / scale_of(returns)
    how = acted(case, agent, path, steps + 1)
    score = how.log_prob[:, :steps] * advantage + 0.3 * how.entropy[:, :steps]
    critic = raw(agent.critic, feature[:, :steps])
    fit = case.scalar.loss(critic, returns) + case.scalar.loss(critic, slow[:, :steps])
    # On what was replayed
    last, terminal = numbers(batch.is_last), numbers(batch.is_terminal)
    boot = returns[:, 0].reshape(last.shape)
    goes_on = HORIZON_333 * (1 - terminal)
    replayed = next_returns(numbers(batch.reward), boot, goes_on, LAMBDA * (1 - last))
    start = rollout.states.feature()[:, :-1]
    critic, old = raw(agent.critic, start), case.scalar.mean(raw(agent.slow_critic, start))
    refit = case.scalar.loss(critic, replayed) + case.scalar.loss(critic, old)
    return {
        "policy": -weight * score,
        "value": weight * fit,
        "repval": (1 - last[:, :-1]) * refit,
    }


@pytest.mark.parametrize("actions", [TURN, PUSH], ids=["discrete", "box"])
@pytest.mark.parametrize("kind", CASES)
def test_behaviour_losses_equal_their_equations_written_out(
    kind: str, actions: ActionSpace
) -> None:
    case = CASES[kind]
    agent = made(case, VECTOR, actions)
    batch = batch_of(agent)
    batch.is_last[1, 2] = batch.is_first[1, 3] = True  # cut off, where the other row has ended
    if case.name == "pro":
        batch = agent.prototypes.views(batch)
    torch.manual_seed(1)
    rollout = agent.observe(batch)
    path = agent.imagine(rollout)
    torch.manual_seed(5)
    losses, _ = agent.behaviour_losses(batch, rollout, path)
    if case.name in ON_V3:
        want = behaviour_of_v3(case, agent, batch, path, rollout)
    else:
        written = {"v1": behaviour_of_v1, "v3-2023": behaviour_of_v3_of_2023}
        want = written.get(case.name, behaviour_of_v2)(case, agent, batch, path)
    assert set(losses) == set(want)
    for name, expected in want.items():
        assert np.std(expected) > 0.0
        close(losses[name], expected, rtol=1e-3, atol=1e-4)


_EARLY = {"rew": 1.0, "policy": 1.0, "value": 1.0}
_V3 = {**_EARLY, "con": 1.0, "dyn": 1.0, "rep": 0.1, "repval": 0.3}
SCALES = {
    "v1": {**_EARLY, "rec": 1.0, "con": 10.0, "kl": 1.0},
    "v2": {**_EARLY, "rec": 1.0, "con": 1.0, "dyn": 0.8, "rep": 0.2},
    "v3-2023": {**_EARLY, "rec": 1.0, "con": 1.0, "dyn": 0.5, "rep": 0.1},
    "v3": {**_V3, "rec": 1.0},
    "pro": {**_EARLY, "con": 1.0, "swav": 1.0, "temp": 1.0, "norm": 0.0, "dyn": 0.8, "rep": 0.2},
    "pro-v3": {**_V3, "swav": 1.0, "temp": 1.0, "norm": 1.0},
    "r2": {**_V3, "barlow": 0.05},
    "infonce": {**_V3, "infonce": 1.0},
}


@pytest.mark.parametrize("name", AGENTS)
def test_losses_have_the_published_weights(name: str) -> None:
    # What a head that is left out by default would have, too.
    agent = build(name, **({"cont": True} if name in ("v1", "pro") else {}))
    losses = [loss for group in agent.groups() for loss in group.losses]
    assert len(losses) == len(set(losses))
    assert {loss: agent.scale(loss) for loss in losses} == pytest.approx(SCALES[name])


@pytest.mark.parametrize("name", AGENTS)
def test_the_prior_and_the_posterior_are_each_trained_by_their_own_share(name: str) -> None:
    case = CASES[name]
    agent = build(name, **(case.values | {"free_nats": 0.0}))
    scales = SCALES[name]
    # One KL is both.
    share = [scales["kl"] if "kl" in scales else scales[loss] for loss in ("dyn", "rep")]
    batch = batch_of(agent)
    rollout = agent.observe(batch)
    # Leaves of their own: what moves them is this loss and no later step.
    post, prior = (x.detach().clone().requires_grad_() for x in (rollout.post, rollout.prior))
    rollout = rollout._replace(post=post, prior=prior)
    losses, _ = agent.model_losses(batch, rollout)
    names = [loss for loss in ("kl", "dyn", "rep") if loss in losses]
    total = torch.stack([agent.scale(loss) * losses[loss].mean() for loss in names]).sum()
    found = torch.autograd.grad(total, (prior, post))
    for side, leaf in enumerate((prior, post)):
        slope = np.zeros(leaf.shape[-1])
        for i in range(len(slope)):
            ends = []
            for step in (1e-4, -1e-4):
                moved = leaf.detach().double().clone()
                moved[0, 1, i] += step
                other = rollout._replace(post=moved) if side else rollout._replace(prior=moved)
                ends.append(kl_of(other, case.classes, case.unimix, case.std).mean())
            slope[i] = (ends[0] - ends[1]) / 2e-4
        assert np.abs(slope).max() > 1e-4
        close(found[side][0, 1], share[side] * slope, rtol=1e-3, atol=1e-7)
