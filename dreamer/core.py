"""Recurrent cores: h' = f(h, z, a)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreamer import ops
from dreamer.nets import BlockLinear, Dense, Linear, RMSNorm


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
