import torch
import torch.nn.functional as F
from torch import Tensor

from dreamer.core import BlockGRU, KerasGRU, LayerNormGRU
from dreamer.nets import PLAIN_ELU
from tests.dreamer.cases import close, golden


def make_core() -> BlockGRU:
    torch.manual_seed(0)
    core = BlockGRU(deter=12, stoch=6, action=3, hidden=5, blocks=3)
    with torch.no_grad():
        for param in core.parameters():
            param.add_(0.3 * torch.randn_like(param))
    return core


def rms(x: Tensor, scale: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-4).sqrt() * scale


def official_step(core: BlockGRU, deter: Tensor, stoch: Tensor, action: Tensor) -> Tensor:
    """One block after the other, each with one kernel over [its part of h, all inputs]."""
    action = action / action.abs().clamp(min=1.0)
    inputs = torch.cat([core.deter_in(deter), core.stoch_in(stoch), core.action_in(action)], -1)
    blocks, width = core.blocks, core.deter // core.blocks
    rows = [slice(g * width, (g + 1) * width) for g in range(blocks)]
    hidden = []
    for g, part in enumerate(rows):
        own = core.hidden_deter.weight[g]
        shared = torch.cat([core.hidden_state.weight[part], core.hidden_action.weight[part]], 1)
        kernel = torch.cat([own, shared.T])  # (D/g + 3U, D/g)
        bias = core.hidden_deter.bias[part]
        hidden.append(torch.cat([deter[:, part], inputs], -1) @ kernel + bias)
    normed = rms(torch.cat(hidden, -1), core.hidden_norm.weight)
    active = normed * torch.sigmoid(normed)
    out = []
    for g, part in enumerate(rows):
        bias = core.gates.bias[g * 3 * width : (g + 1) * 3 * width]
        gates = active[:, part] @ core.gates.weight[g] + bias
        reset, cand, update = gates.split(width, -1)
        cand = torch.tanh(torch.sigmoid(reset) * cand)
        update = torch.sigmoid(update - 1)
        out.append(update * cand + (1 - update) * deter[:, part])
    return torch.cat(out, -1)


def test_block_gru_equals_the_concatenated_kernels_of_every_block() -> None:
    core = make_core()
    deter, stoch = torch.randn(4, 12).tanh(), torch.randn(4, 6)
    action = 3 * torch.randn(4, 3)
    close(
        core(deter, stoch, core.project_action(action)),
        official_step(core, deter, stoch, action),
        rtol=1e-5,
        atol=1e-6,
    )


def test_block_gru_matches_the_golden_gate_arithmetic() -> None:
    given, want = golden("gru_v2_v3")
    core = BlockGRU(deter=1, stoch=1, action=1, hidden=1, blocks=1)
    with torch.no_grad():
        core.gates.weight.zero_()
        core.gates.bias.copy_(
            torch.tensor([given["reset_pre"], given["cand_pre"], given["update_pre"]])
        )
    state = torch.tensor([[given["h"]]])
    close(core(state, torch.zeros(1, 1), torch.zeros(1, 1))[0, 0], want["h_next"])


def test_block_gru_keeps_most_of_the_old_state_when_its_gates_say_nothing() -> None:
    core = BlockGRU(deter=4, stoch=1, action=1, hidden=2, blocks=2)
    with torch.no_grad():
        core.gates.weight.zero_()
    deter = torch.tensor([[0.2, -0.4, 0.6, 1.0]])
    keep = 1 - torch.sigmoid(torch.tensor(-1.0))
    close(core(deter, torch.zeros(1, 1), torch.zeros(1, 4)), deter * keep)


def test_block_gru_keeps_the_state_inside_the_unit_cube() -> None:
    core = make_core()
    deter = torch.zeros(8, 12)
    for _ in range(50):
        stoch, action = 1e4 * torch.randn(8, 6), 1e8 * torch.randn(8, 3)
        deter = core(deter, stoch, core.project_action(action))
    assert deter.abs().max() <= 1.0


def test_block_kernel_is_initialised_with_the_width_of_all_blocks_as_fan_in() -> None:
    torch.manual_seed(0)
    core = BlockGRU(deter=256, stoch=16, action=2, hidden=64, blocks=8)
    fan_in = 256 + 8 * 3 * 64
    for weight in (core.hidden_deter, core.hidden_state, core.hidden_action):
        close(weight.weight.var(), 1 / fan_in, rtol=0.05)
    close(core.gates.weight.var(), 1 / 256, rtol=0.05)


def test_keras_gru_equals_its_equations() -> None:
    torch.manual_seed(0)
    core = KerasGRU(deter=5, stoch=3, action=2, hidden=4)
    h, z, a = torch.randn(6, 5), torch.randn(6, 3), torch.randn(6, 2)
    ours = core(h, z, core.project_action(a))
    linear = core.input.dense.linear
    x = F.elu(torch.cat([z, a], -1) @ linear.weight.T + linear.bias)
    into = (x @ core.cell.weight_ih.T + core.cell.bias_ih).chunk(3, -1)
    back = (h @ core.cell.weight_hh.T + core.cell.bias_hh).chunk(3, -1)
    reset, keep = torch.sigmoid(into[0] + back[0]), torch.sigmoid(into[1] + back[1])
    cand = torch.tanh(into[2] + reset * back[2])
    close(ours, keep * h + (1 - keep) * cand, rtol=1e-5, atol=1e-6)


def test_layer_norm_gru_equals_its_equations() -> None:
    torch.manual_seed(0)
    core = LayerNormGRU(deter=5, stoch=3, action=2, hidden=4, style=PLAIN_ELU)
    h, z, a = torch.randn(6, 5), torch.randn(6, 3), torch.randn(6, 2)
    ours = core(h, z, core.project_action(a))
    linear = core.input.dense.linear
    x = F.elu(torch.cat([z, a], -1) @ linear.weight.T + linear.bias)
    gates = torch.cat([x, h], -1) @ core.gates.weight.T + core.gates.bias
    gates = (gates - gates.mean(-1, keepdim=True)) / torch.sqrt(
        gates.var(-1, unbiased=False, keepdim=True) + 1e-3
    )
    reset, cand, update = gates.chunk(3, -1)
    cand = torch.tanh(torch.sigmoid(reset) * cand)
    update = torch.sigmoid(update - 1)
    close(ours, update * cand + (1 - update) * h, rtol=1e-5, atol=1e-6)


def test_only_later_agents_scale_large_actions_down() -> None:
    torch.manual_seed(0)
    plain = LayerNormGRU(deter=5, stoch=3, action=2, hidden=4, style=PLAIN_ELU)
    unit = LayerNormGRU(deter=5, stoch=3, action=2, hidden=4, style=PLAIN_ELU, unit_action=True)
    unit.load_state_dict(plain.state_dict())
    action = torch.tensor([[4.0, -0.5]])
    close(unit.project_action(action), plain.project_action(torch.tensor([[1.0, -0.5]])))
    assert not torch.allclose(unit.project_action(action), plain.project_action(action))
