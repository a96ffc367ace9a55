"""Which loss moves which parameters, agent by agent: what its paper says, and nothing else.

A table has two sides. `Case.reaches` says which parts a loss has a gradient for, whoever uses it;
slow copies are asked too, as if they could learn, so that a target that lost its detach shows.
`Case.moves` says what each step of an update changes. The two differ where an actor climbs through
a model: its gradient passes dynamics and heads, and moves the actor alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from dreamer import ops
from dreamer.agent import Agent
from dreamer.batch import Batch
from dreamer.dists import ActionDist
from dreamer.normalize import PercentileScale
from dreamer.presets import AGENTS
from dreamer.spaces import ActionSpace, ObsSpace
from tests.dreamer.cases import (
    ACTIONS,
    OBS,
    PIXELS,
    PUSH,
    TURN,
    VECTOR,
    batch_of,
    build,
    close,
    losses_of,
    wake_zero_layers,
)

EVERYTHING: ObsSpace = OBS | PIXELS
Parts = set[str]

PREFIXES = {
    "encoder": ("encoder.",),
    "core": ("rssm.core.",),
    "posterior": ("rssm.posterior.",),
    "prior": ("rssm.prior_net.",),
    "start": ("rssm.first_deter",),
    "decoder": ("decoder.",),
    "projection": ("projection.",),
    "embed_proj": ("prototypes.embed_proj.",),
    "feature_proj": ("prototypes.feature_proj.",),
    "centres": ("prototypes.centres",),
    "teacher": ("prototypes.slow_encoder.", "prototypes.slow_proj."),
    "reward": ("reward.",),
    "cont": ("cont.",),
    "actor": ("actor.",),
    "critic": ("critic.",),
    "slow_critic": ("slow_critic.",),
}
"""Part → how the names of its parameters begin."""

SEEN = {"encoder", "core", "posterior"}
"""What makes the state of a replayed step."""
DREAMT = {"core", "prior"}
"""What makes the state of an imagined step."""

# DreamerV1, arXiv:1912.01603v3. Its continuation head is only there for tasks that can end.
V1 = {
    "rec": SEEN | {"decoder"},  # Eq. 10, observation
    "rew": SEEN | {"reward"},  # Eq. 10, reward
    "kl": SEEN | {"prior"},  # Eq. 10, one KL for both of its sides
    "policy": DREAMT | {"reward", "critic", "actor"},  # Eq. 7: V_λ (Eq. 6) through the model
    "value": {"critic"},  # Eq. 8: towards V_λ, which is held still
}
V1_ENDS = V1 | {"con": SEEN | {"cont"}, "policy": V1["policy"] | {"cont"}}

# DreamerV2, arXiv:2010.02193v4. The prior's part of the KL leads to encoder and posterior too: by
# way of the state that it starts from, never by the posterior that it is compared with.
V2_MODEL = {
    "rec": SEEN | {"decoder"},  # Eq. 2, image
    "rew": SEEN | {"reward"},  # Eq. 2, reward
    "con": SEEN | {"cont"},  # Eq. 2, discount
    "dyn": SEEN | {"prior"},  # Algorithm 2, KL(sg(posterior) ‖ prior)
    "rep": SEEN,  # Algorithm 2, KL(posterior ‖ sg(prior))
}
V2_THROUGH = DREAMT | {"reward", "cont", "slow_critic", "actor"}
V2_SCORE = V2_MODEL | {"policy": {"actor"}, "value": {"critic"}}  # Eq. 6 with ρ = 1; Eq. 5
V2_DYNAMICS = V2_SCORE | {"policy": V2_THROUGH}  # Eq. 6 with ρ = 0, targets by the slow critic
V2_BOTH = V2_DYNAMICS  # Eq. 6 with 0 < ρ < 1

# DreamerV3 of January 2023, arXiv:2301.04104v1. Episodes begin with a learned state; its z₀ is the
# prior's mode, without gradient.
BEGUN = SEEN | {"start"}
V3_OF_2023_SCORE = {
    "rec": BEGUN | {"decoder"},  # Eq. 5, L_pred
    "rew": BEGUN | {"reward"},  # Eq. 5, L_pred
    "con": BEGUN | {"cont"},  # Eq. 5, L_pred
    "dyn": BEGUN | {"prior"},  # Eq. 5, L_dyn
    "rep": BEGUN,  # Eq. 5, L_rep
    "policy": {"actor"},  # Eq. 11, discrete actions
    "value": {"critic"},  # Eq. 8–10, and towards the slow critic, which is a target
}
# Eq. 11 with continuous actions: return and baseline both carry the gradient; the continuation has
# none, whichever way it is read.
V3_OF_2023_DYNAMICS = V3_OF_2023_SCORE | {"policy": DREAMT | {"reward", "critic", "actor"}}

# DreamerV3, arXiv:2301.04104v2: the score function for every kind of action, and a critic that
# shapes the states of the replay on purpose.
V3_BACKBONE = {
    "rew": SEEN | {"reward"},  # Eq. 3, L_pred
    "con": SEEN | {"cont"},  # Eq. 3, L_pred
    "dyn": SEEN | {"prior"},  # Eq. 3, L_dyn
    "rep": SEEN,  # Eq. 3, L_rep
    "policy": {"actor"},  # Eq. 6
    "value": {"critic"},  # Eq. 5
    "repval": SEEN | {"critic"},  # Eq. 5 on the replay: the return is held still, the state is not
}
V3 = V3_BACKBONE | {"rec": SEEN | {"decoder"}}  # Eq. 3, L_pred

# DreamerPro, arXiv:2110.14565, Eq. 2–6: the teacher assigns, without gradient, and two students
# predict it, one from the embedding and one from the state.
PROTOTYPES = {
    "swav": {"encoder", "embed_proj", "centres"},
    "temp": SEEN | {"feature_proj", "centres"},
    "norm": SEEN | {"embed_proj", "feature_proj"},  # in its code alone
}
PRO_SCORE = PROTOTYPES | {
    name: V2_SCORE[name] for name in ("rew", "dyn", "rep", "policy", "value")
}  # as V2, without a continuation
PRO_DYNAMICS = PRO_SCORE | {"policy": V2_THROUGH - {"cont"}}
PRO_V3 = V3_BACKBONE | PROTOTYPES

# R2-Dreamer, and InfoNCE (arXiv:1807.03748) in its place: the embedding is a target, so that the
# encoder learns by way of the posterior. That needs a test of its own, below.
R2 = V3_BACKBONE | {"barlow": SEEN | {"projection"}}
INFONCE = V3_BACKBONE | {"infonce": SEEN | {"projection"}}

MODEL = SEEN | {"prior", "reward"}


def three(objective: Parts, slow: Parts) -> dict[str, Parts]:
    """Return what the steps of an agent with three optimisers move."""
    model = MODEL | objective
    return {"model": model, "actor": {"actor"}, "critic": {"critic"}, "slow": slow}


def one(objective: Parts, slow: Parts) -> dict[str, Parts]:
    """Return what the steps of an agent with one optimiser move."""
    return {"": MODEL | {"cont", "actor", "critic"} | objective, "slow": slow}


STUDENTS = {"embed_proj", "feature_proj", "centres"}
# Prototypes go back to the sphere when the slow copies move.
FOLLOWS = {"slow_critic", "teacher", "centres"}

# Every KL counts, decay does not hide that there is no gradient, and update 0 has a rate.
EARLY = {"free_nats": 0.0, "imagination.horizon": 4, "optim.decay": 0.0}
LATE = {"free_nats": 0.0, "behaviour.imag_horizon": 4, "optim.warmup": 0}
# Without the entropy nothing but the model leads from the returns to the actor.
CLIMB = EARLY | {"imagination.entropy": 0.0}
BOTH = {"imagination.gradient": "both"}
MOVING = {"prototypes.freeze": 0}


class Case(NamedTuple):
    """An agent with one kind of actions, and its tables."""

    agent: str
    actions: ActionSpace
    reaches: dict[str, Parts]
    """Loss → parts that it has a gradient for."""
    moves: dict[str, Parts]
    """Optimiser, or the slow copies → parts that its step changes, in the order of the steps."""
    options: dict[str, Any]


V2_MOVES = three({"decoder", "cont"}, {"slow_critic"})
PRO_MOVES = three(STUDENTS, FOLLOWS)
CASES = {
    "v1-box": Case("v1", PUSH, V1, three({"decoder"}, set()), EARLY),
    "v1-discrete": Case(
        "v1", TURN, V1_ENDS, three({"decoder", "cont"}, set()), EARLY | {"cont": True}
    ),
    "v2-discrete": Case("v2", TURN, V2_SCORE, V2_MOVES, EARLY),
    "v2-box": Case("v2", PUSH, V2_DYNAMICS, V2_MOVES, CLIMB),
    "v2-both": Case("v2", ACTIONS, V2_BOTH, V2_MOVES, CLIMB | BOTH),
    "v3-2023-discrete": Case("v3-2023", TURN, V3_OF_2023_SCORE, three(
        {"start", "decoder", "cont"}, {"slow_critic"}
    ), EARLY),
    "v3-2023-box": Case("v3-2023", PUSH, V3_OF_2023_DYNAMICS, three(
        {"start", "decoder", "cont"}, {"slow_critic"}
    ), CLIMB | {"continuation": "probability"}),
    "v3": Case("v3", ACTIONS, V3, one({"decoder"}, {"slow_critic"}), LATE),
    "pro-discrete": Case("pro", TURN, PRO_SCORE, PRO_MOVES, EARLY | MOVING),
    "pro-box": Case("pro", PUSH, PRO_DYNAMICS, PRO_MOVES, CLIMB | MOVING),
    "pro-both": Case("pro", TURN, PRO_DYNAMICS, PRO_MOVES, CLIMB | BOTH | MOVING),
    "pro-v3": Case("pro-v3", PUSH, PRO_V3, one(STUDENTS, FOLLOWS), LATE | MOVING),
    "r2": Case("r2", PUSH, R2, one({"projection"}, {"slow_critic"}), LATE),
    "infonce": Case("infonce", TURN, INFONCE, one({"projection"}, {"slow_critic"}), LATE),
}  # fmt: skip
of_every_agent = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))


def agent_of(case: Case, obs: ObsSpace = VECTOR, **options: Any) -> Agent:
    agent = build(case.agent, obs, case.actions, **case.options | options)
    wake_zero_layers(agent)
    return agent


def part_of(name: str) -> str:
    """Return the only part that a parameter belongs to."""
    (part,) = (part for part, begins in PREFIXES.items() if name.startswith(begins))
    return part


def whole_parts(agent: Agent, touched: Iterable[bool]) -> Parts:
    """Return the parts whose parameters are touched; a part is touched as a whole or not at all."""
    parts: dict[str, dict[str, bool]] = {}
    for (name, _), flag in zip(agent.named_parameters(), touched, strict=True):
        parts.setdefault(part_of(name), {})[name] = flag
    torn = {part: each for part, each in parts.items() if len(set(each.values())) > 1}
    assert not torn, torn
    return {part for part, each in parts.items() if all(each.values())}


def reached(agent: Agent, loss: Tensor) -> Parts:
    params = list(agent.parameters())
    grads = torch.autograd.grad(loss.mean(), params, retain_graph=True, allow_unused=True)
    return whole_parts(agent, (grad is not None and bool(grad.any()) for grad in grads))


def snapshot(agent: Agent) -> list[Tensor]:
    return [param.detach().clone() for param in agent.parameters()]


def moved_since(agent: Agent, before: list[Tensor]) -> Parts:
    pairs = zip(before, agent.parameters(), strict=True)
    return whole_parts(agent, (not torch.equal(old, new) for old, new in pairs))


def steps_of_an_update(agent: Agent, batch: Batch) -> dict[str, Parts]:
    """Update, and return what each optimiser moved and what the slow copies did, in this order."""
    found: dict[str, Parts] = {}

    def watched(name: str, step: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any) -> Any:
            before = snapshot(agent)
            result = step(*given)
            found[name] = moved_since(agent, before)
            return result

        return run

    with pytest.MonkeyPatch.context() as patch:
        for group in agent.groups():
            step = watched(group.name, group.optimiser.step)
            patch.setattr(group.optimiser, "step", step)
        patch.setattr(agent, "update_slow", watched("slow", agent.update_slow))
        agent.update(batch)
    return found


def test_every_agent_has_a_table() -> None:
    assert {case.agent for case in CASES.values()} == set(AGENTS)


@of_every_agent
def test_each_loss_reaches_what_its_equation_says(case: Case) -> None:
    agent = agent_of(case, EVERYTHING).requires_grad_(True)
    losses, _, _ = losses_of(agent, batch_of(agent, length=4))
    assert {name: reached(agent, loss) for name, loss in losses.items()} == case.reaches


@of_every_agent
def test_the_optimisers_share_out_every_trained_parameter(case: Case) -> None:
    agent = agent_of(case, EVERYTHING)
    groups, params = agent.groups(), list(agent.parameters())
    held = [id(param) for group in groups for param in group.params]
    trained = [id(param) for param in params if param.requires_grad]
    assert sorted(held) == sorted(trained)
    found = {}
    for group in groups:
        own = {id(param) for param in group.params}
        found[group.name] = whole_parts(agent, (id(param) in own for param in params))
    follows = case.moves["slow"] - {"centres"}
    assert found == {name: parts for name, parts in case.moves.items() if name != "slow"}
    assert whole_parts(agent, (not param.requires_grad for param in params)) == follows


@of_every_agent
def test_each_step_of_an_update_moves_its_own_parts(case: Case) -> None:
    agent = agent_of(case)
    before = snapshot(agent)
    found = steps_of_an_update(agent, batch_of(agent))
    assert list(found.items()) == list(case.moves.items())
    assert moved_since(agent, before) == set().union(*case.moves.values())


@of_every_agent
def test_a_loss_alone_moves_what_it_reaches_among_the_parts_of_its_optimiser(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = agent_of(case)
    state = {name: value.clone() for name, value in agent.state_dict().items()}
    before = snapshot(agent)
    # What follows the critic would hide what a loss moves.
    monkeypatch.setattr(agent, "update_slow", lambda: None)
    behaviour = {"policy": "actor", "value": "critic"}
    found, want = {}, {}
    for loss, reaches in case.reaches.items():
        agent.load_state_dict(state)
        monkeypatch.setattr(agent, "scale", lambda name, only=loss: float(name == only))
        agent.update(batch_of(agent))
        found[loss] = moved_since(agent, before)
        owner = "" if "" in case.moves else behaviour.get(loss, "model")
        want[loss] = reaches & case.moves[owner]
    assert found == want
    assert all(param.grad is None for param in agent.parameters()), "a gradient was kept"


KL_SIDES = {"kl": {"posterior", "prior"}, "dyn": {"prior"}, "rep": {"posterior"}}


@of_every_agent
def test_a_kl_trains_the_sides_that_it_compares_as_the_paper_says(case: Case) -> None:
    agent = agent_of(case)
    batch = batch_of(agent)
    rollout = agent.observe(batch)
    losses, _ = agent.model_losses(batch, rollout)
    found = {}
    for name in KL_SIDES.keys() & losses.keys():
        # These are the comparison's own copies of the statistics: states come from others.
        sides = (rollout.post, rollout.prior)
        grads = torch.autograd.grad(
            losses[name].mean(), sides, retain_graph=True, allow_unused=True
        )
        pairs = zip(("posterior", "prior"), grads, strict=True)
        found[name] = {side for side, grad in pairs if grad is not None and grad.any()}
    assert found == {name: KL_SIDES[name] for name in KL_SIDES if name in case.reaches}


@of_every_agent
def test_the_actor_sees_states_and_judges_actions_without_gradient(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = agent_of(case)
    seen, judged, log_prob = [], [], ActionDist.log_prob

    def watched(policy: ActionDist, flat: Tensor) -> Tensor:
        judged.append(flat.requires_grad)
        return log_prob(policy, flat)

    monkeypatch.setattr(ActionDist, "log_prob", watched)
    agent.actor.register_forward_pre_hook(lambda _, given: seen.append(given[0].requires_grad))
    agent.update(batch_of(agent))
    assert seen and not any(seen) and not any(judged)
    score = case.reaches["policy"] == {"actor"}
    assert bool(judged) == (score or BOTH.items() <= case.options.items())


@pytest.mark.parametrize("name", ["v2", "pro"])
@pytest.mark.parametrize(
    ("gradient", "share"), [("reinforce", None), ("both", 0.1), ("dynamics", 1.0)]
)
def test_the_advantage_of_a_score_function_is_a_number(
    name: str, gradient: str, share: float | None
) -> None:
    options: dict[str, Any] = {"imagination.gradient": gradient}
    agent: Any = build(name, **options)
    policy = agent.actor(torch.randn(2, 3, agent.actor.mlp[0].linear.in_features))
    inputs = torch.randn(2, 2, 3, requires_grad=True).unbind(0)
    gain = agent.objective(policy, torch.eye(3).expand(2, 3, 3), *inputs)
    found: tuple[Any, ...] = torch.autograd.grad(gain.sum(), inputs, allow_unused=True)
    by_return, by_baseline = found
    assert by_baseline is None
    if share is None:
        assert by_return is None
    else:
        close(by_return, torch.full((2, 3), share))


def test_the_scale_of_returns_is_a_number() -> None:
    scale = PercentileScale(rate=1.0, low=0.05, high=0.95, limit=0.0)
    returns = torch.randn(4, 5, requires_grad=True)
    assert not scale.update(2.0 * returns).requires_grad and not scale.high.requires_grad


@pytest.mark.parametrize("name", ["pro-discrete", "pro-v3"])
def test_what_the_teacher_assigns_is_a_number_even_where_prototypes_move(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = agent_of(CASES[name]).requires_grad_(True)
    assigned, sinkhorn = [], ops.sinkhorn

    def watched(*given: Any) -> Tensor:
        assigned.append(sinkhorn(*given))
        return assigned[-1]

    monkeypatch.setattr(ops, "sinkhorn", watched)
    losses, _, _ = losses_of(agent, batch_of(agent, size=4))
    assert losses["swav"].requires_grad
    assert [scores.requires_grad for scores in assigned] == [False, False]


@pytest.mark.parametrize("name", ["pro-box", "pro-v3"])
def test_frozen_prototypes_hold_still_for_as_many_updates_as_asked(name: str) -> None:
    case = CASES[name]
    options: dict[str, Any] = {"prototypes.freeze": 2}
    agent = agent_of(case, **options)
    optimiser = next(iter(case.moves))
    for update in range(3):
        moved = steps_of_an_update(agent, batch_of(agent))[optimiser]
        assert moved == case.moves[optimiser] - ({"centres"} if update < 2 else set())


@pytest.mark.parametrize("name", ["r2", "infonce"])
def test_an_embedding_that_is_predicted_is_a_target(name: str) -> None:
    agent: Any = agent_of(CASES[name]).requires_grad_(True)
    batch = batch_of(agent)
    rollout = agent.observe(batch)
    # With the states held still, all that is left is what the projection and the target have.
    still = rollout._replace(states=rollout.states.detach())
    losses, _ = agent.representation_losses(batch, still)
    assert [reached(agent, loss) for loss in losses.values()] == [{"projection"}]
