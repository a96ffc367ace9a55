import torch
from torch import Tensor

from dreamer.core import BlockGRU
from dreamer.latent import OneHotLatent
from dreamer.rssm import RSSM, State
from tests.dreamer.cases import close

D, S, K, A, E, U = 16, 4, 4, 3, 6, 8


def make_rssm(post_layers: int = 1) -> RSSM:
    torch.manual_seed(0)
    core = BlockGRU(D, S * K, A, U, 8)
    return RSSM(core, OneHotLatent(S, K, 0.01), E, U, prior_layers=2, post_layers=post_layers)


def window(batch: int = 3, length: int = 6) -> tuple[Tensor, Tensor, Tensor, State]:
    draw = torch.Generator().manual_seed(1)
    embed = torch.randn(batch, length, E, generator=draw)
    action = torch.randn(batch, length, A, generator=draw)
    is_first = torch.zeros(batch, length, dtype=torch.bool)
    is_first[0, 0] = is_first[1, 3] = True
    stoch = torch.eye(K)[torch.randint(K, (batch, S), generator=draw)]
    return embed, action, is_first, State(torch.randn(batch, D, generator=draw).tanh(), stoch)


def plain_observe(
    rssm: RSSM, embed: Tensor, action: Tensor, is_first: Tensor, state: State
) -> tuple[State, Tensor]:
    """Nothing hoisted: mask, one core step, one posterior on [h, e], for each step."""
    deters, stochs, logits = [], [], []
    deter, stoch = state.deter, state.stoch.flatten(1)
    for t in range(embed.shape[1]):
        keep = (~is_first[:, t]).float()[:, None]
        drive = rssm.core.project_action(action[:, t] * keep)
        deter = rssm.core(deter * keep, stoch * keep, drive)
        hidden = rssm.posterior.first(torch.cat([deter, embed[:, t]], -1))
        stats = rssm.posterior.logits(rssm.posterior.rest(hidden))
        stoch = rssm.latent.sample(stats).flatten(1)
        deters.append(deter)
        stochs.append(stoch)
        logits.append(stats)
    stacked = torch.stack(stochs, 1).reshape(*embed.shape[:2], S, K)
    return State(torch.stack(deters, 1), stacked), torch.stack(logits, 1)


def test_observe_equals_the_plain_loop_with_nothing_hoisted() -> None:
    for post_layers in (1, 2):
        rssm = make_rssm(post_layers)
        torch.manual_seed(2)
        states, logits = rssm.observe(*window())
        torch.manual_seed(2)
        plain, plain_logits = plain_observe(rssm, *window())
        close(states.deter, plain.deter, rtol=1e-5, atol=1e-6)
        close(logits, plain_logits, rtol=1e-5, atol=1e-5)
        assert torch.equal(states.stoch.argmax(-1), plain.stoch.argmax(-1))


def test_observing_in_one_go_equals_observing_step_by_step() -> None:
    rssm = make_rssm()
    embed, action, is_first, state = window()
    torch.manual_seed(2)
    whole, whole_logits = rssm.observe(embed, action, is_first, state)
    torch.manual_seed(2)
    for t in range(embed.shape[1]):
        now = slice(t, t + 1)
        part, logits = rssm.observe(embed[:, now], action[:, now], is_first[:, now], state)
        state = State(part.deter[:, 0], part.stoch[:, 0])
        close(state.deter, whole.deter[:, t], rtol=1e-5, atol=1e-6)
        close(logits[:, 0], whole_logits[:, t], rtol=1e-5, atol=1e-5)


def test_a_first_record_forgets_the_state_before_it() -> None:
    rssm = make_rssm()
    embed, action, is_first, state = window()
    is_first[:, 0] = True
    _, logits = rssm.observe(embed[:, :1], action[:, :1], is_first[:, :1], state)
    _, fresh = rssm.observe(
        embed[:, :1], action[:, :1], torch.zeros_like(is_first[:, :1]), rssm.initial(3)
    )
    _, after = rssm.observe(
        embed[:, :1], torch.zeros_like(action[:, :1]), is_first[:, :1], rssm.initial(3)
    )
    close(logits, after)
    assert not torch.allclose(logits, fresh), "the previous action must be forgotten too"


def test_a_first_record_forgets_the_action_before_it() -> None:
    rssm = make_rssm()
    embed, action, is_first, state = window()
    other = torch.where(is_first[..., None], action + 5.0, action)
    torch.manual_seed(2)
    states, _ = rssm.observe(embed, action, is_first, state)
    torch.manual_seed(2)
    same, _ = rssm.observe(embed, other, is_first, state)
    assert torch.equal(states.deter, same.deter)


def test_a_first_record_cuts_the_gradient_to_what_came_before() -> None:
    rssm = make_rssm()
    embed, action, is_first, state = window()
    embed.requires_grad_()
    states, _ = rssm.observe(embed, action, is_first, state)
    (grad,) = torch.autograd.grad(states.deter[1, 5].sum(), embed)
    assert not grad[1, :3].any() and grad[1, 3:5].any()
    assert not grad[0].any() and not grad[2].any()


def test_gradients_flow_through_every_step_and_through_the_samples() -> None:
    rssm = make_rssm()
    embed, action, is_first, state = window()
    embed.requires_grad_()
    states, _ = rssm.observe(embed, action, torch.zeros_like(is_first), state)
    (grad,) = torch.autograd.grad(states.deter[:, 5].sum(), embed)
    # The embedding only enters through the sampled latent, so all of this is straight-through.
    assert all(grad[:, t].any() for t in range(5))
    assert not grad[:, 5].any()


def test_imagining_equals_a_core_step_and_a_sample_of_the_prior() -> None:
    rssm = make_rssm()
    _, action, _, state = window()
    torch.manual_seed(2)
    deter, stoch = rssm.imagine_step(state.deter, state.stoch.flatten(1), action[:, 0])
    torch.manual_seed(2)
    drive = rssm.core.project_action(action[:, 0])
    want = rssm.core(state.deter, state.stoch.flatten(1), drive)
    assert torch.equal(deter, want)
    assert torch.equal(stoch, rssm.latent.sample(rssm.prior(want)).flatten(1))


def test_initial_states_are_zeros() -> None:
    state = make_rssm().initial(2)
    assert state.deter.shape == (2, D) and state.stoch.shape == (2, S, K)
    assert not state.deter.any() and not state.stoch.any()


def test_feature_is_deter_then_flat_stoch() -> None:
    state = State(torch.tensor([[1.0, 2.0]]), torch.tensor([[[0.0, 1.0], [1.0, 0.0]]]))
    assert state.feature().tolist() == [[1.0, 2.0, 0.0, 1.0, 1.0, 0.0]]


def test_flatten_merges_batch_and_time_and_detach_cuts_both_parts() -> None:
    deter = torch.randn(2, 3, D, requires_grad=True)
    state = State(deter, torch.randn(2, 3, S, K, requires_grad=True))
    flat = state.flatten()
    assert flat.deter.shape == (6, D) and flat.stoch.shape == (6, S, K)
    assert torch.equal(flat.deter[4], deter[1, 1])
    cut = state.detach()
    assert not cut.deter.requires_grad and not cut.stoch.requires_grad


def test_gradients_of_a_rollout_equal_those_of_the_plain_loop() -> None:
    for post_layers in (1, 2):
        rssm = make_rssm(post_layers)
        found = []
        for observe in (RSSM.observe, plain_observe):
            torch.manual_seed(2)
            states, stats = observe(rssm, *window())
            total = (states.deter**2).sum() + (states.stoch * stats.unflatten(-1, (S, K))).sum()
            params = [*rssm.core.parameters(), *rssm.posterior.parameters()]
            found.append(torch.autograd.grad(total, params))
        for ours, plain in zip(*found, strict=True):
            close(ours, plain, rtol=1e-3, atol=1e-4)
