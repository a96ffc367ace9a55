"""Recurrent cores: h' = f(h, z, a)."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreamer import ops
from dreamer.nets import PLAIN_ELU, BlockLinear, Dense, LayerNorm, Linear, RMSNorm, Style


class Core(Protocol):
    """What the RSSM needs from a recurrent network; an ``nn.Module``."""

    deter: int
    """Width D of the state."""

    def project_action(self, action: Tensor) -> Tensor:
        """(…, A) → (…, X): what depends on the action alone, for all time steps at once."""

    def __call__(self, deter: Tensor, stoch: Tensor, action: Tensor) -> Tensor:
        """(N, D), flat sample (N, Z), projected action (N, X) → next state (N, D)."""


class BlockGRU(nn.Module):
    """Block-diagonal GRU of DreamerV3 (Nature 2025).

    Every block g sees its own part of h and all of the three projected inputs. The official
    block kernel over [h_g, x] is kept as two parameters, a block product on h and a dense product
    on x: the same function, and the dense part that only needs the action is computed for all
    time steps at once (`project_action`).
    """

    def __init__(self, deter: int, stoch: int, action: int, hidden: int, blocks: int) -> None:
        super().__init__()
        self.deter, self.blocks = deter, blocks
        self.deter_in = Dense(deter, hidden)
        self.stoch_in = Dense(stoch, hidden)
        self.action_in = Dense(action, hidden)
        fan_in = deter + 3 * hidden * blocks
        self.hidden_deter = BlockLinear(deter, deter, blocks, fan_in=fan_in)
        self.hidden_state = Linear(2 * hidden, deter, fan_in=fan_in)
        self.hidden_action = Linear(hidden, deter, fan_in=fan_in)
        # One bias is enough for the sum of the three products.
        self.hidden_state.bias = self.hidden_action.bias = None  # type: ignore[assignment]
        self.hidden_norm = RMSNorm(deter)
        self.gates = BlockLinear(deter, 3 * deter, blocks)

    def project_action(self, action: Tensor) -> Tensor:
        """(…, A) → (…, D): the part of the hidden layer that depends on the action alone."""
        projected: Tensor = self.hidden_action(self.action_in(ops.unit_scale(action)))
        return projected

    def forward(self, deter: Tensor, stoch: Tensor, action: Tensor) -> Tensor:
        """Return the next deterministic state (N, D).

        Args:
            deter: (N, D) float32.
            stoch: (N, S·K) flat sample.
            action: (N, D) from `project_action`.
        """
        inputs = torch.cat([self.deter_in(deter), self.stoch_in(stoch)], -1)
        hidden = self.hidden_deter(deter) + self.hidden_state(inputs) + action
        gates = self.gates(F.silu(self.hidden_norm(hidden))).float()
        # The gates are split inside each block, then regrouped.
        reset, cand, update = gates.unflatten(-1, (self.blocks, 3, -1)).unbind(-2)
        cand = torch.tanh(torch.sigmoid(reset) * cand).flatten(-2)
        update = torch.sigmoid(update - 1.0).flatten(-2)
        return torch.lerp(deter, cand, update)


class InputLayer(nn.Module):
    """act(norm(W[z, a])), with the action's part of the product taken out of the loop."""

    def __init__(self, stoch: int, action: int, hidden: int, style: Style) -> None:
        super().__init__()
        self.dense = Dense(stoch + action, hidden, style)
        self.stoch = stoch

    def project_action(self, action: Tensor) -> Tensor:
        """(…, A) → (…, U), bias included."""
        linear = self.dense.linear
        return F.linear(action, linear.weight[:, self.stoch :], linear.bias)

    def forward(self, stoch: Tensor, action: Tensor) -> Tensor:
        """(N, Z), projected action (N, U) → (N, U)."""
        weight = self.dense.linear.weight[:, : self.stoch]
        return self.dense.finish(F.linear(stoch, weight) + action)


class KerasGRU(nn.Module):
    """ELU layer on [z, a], then Keras' GRU, whose update gate keeps the old state (DreamerV1)."""

    def __init__(self, deter: int, stoch: int, action: int, hidden: int) -> None:
        super().__init__()
        self.deter = deter
        self.input = InputLayer(stoch, action, hidden, PLAIN_ELU)
        # PyTorch's cell is Keras' with reset_after: the reset gate acts after the product with h.
        self.cell = nn.GRUCell(hidden, deter)
        nn.init.xavier_uniform_(self.cell.weight_ih)
        nn.init.orthogonal_(self.cell.weight_hh)
        nn.init.zeros_(self.cell.bias_ih)
        nn.init.zeros_(self.cell.bias_hh)

    def project_action(self, action: Tensor) -> Tensor:
        """(…, A) → (…, U)."""
        return self.input.project_action(action)

    def forward(self, deter: Tensor, stoch: Tensor, action: Tensor) -> Tensor:
        """Return the next deterministic state (N, D)."""
        state: Tensor = self.cell(self.input(stoch, action), deter)
        return state.float()


class LayerNormGRU(nn.Module):
    """Input layer on [z, a], then a GRU whose three gates share one norm (DreamerV2, V3 of 2023).

    The candidate comes from the same product as the gates, and the update gate writes it, with a
    bias of −1 that lets the state last.
    """

    def __init__(
        self,
        deter: int,
        stoch: int,
        action: int,
        hidden: int,
        style: Style,
        *,
        unit_action: bool = False,
    ) -> None:
        super().__init__()
        self.deter, self.unit_action = deter, unit_action
        self.input = InputLayer(stoch, action, hidden, style)
        self.gates = Linear(hidden + deter, 3 * deter, init=style.hidden_init, bias=style.bias)
        self.norm = LayerNorm(3 * deter)

    def project_action(self, action: Tensor) -> Tensor:
        """(…, A) → (…, U)."""
        return self.input.project_action(ops.unit_scale(action) if self.unit_action else action)

    def forward(self, deter: Tensor, stoch: Tensor, action: Tensor) -> Tensor:
        """Return the next deterministic state (N, D)."""
        hidden = torch.cat([self.input(stoch, action), deter], -1)
        reset, cand, update = self.norm(self.gates(hidden).float()).chunk(3, -1)
        cand = torch.tanh(torch.sigmoid(reset) * cand)
        return torch.lerp(deter, cand, torch.sigmoid(update - 1.0))
