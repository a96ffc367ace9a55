"""Recurrent cores: h' = f(h, z, a)."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreamer import ops
from dreamer.loop import Inside
from dreamer.nets import (
    PLAIN_ELU,
    BlockLinear,
    Dense,
    LayerNorm,
    Linear,
    RMSNorm,
    SplitDense,
    Style,
)


class Core(Protocol):
    """What the RSSM needs from a recurrent network; an ``nn.Module``."""

    deter: int
    """Width D of the state."""

    def project_action(self, action: Tensor, loop: Inside | None = None) -> Tensor:
        """(…, A) → (…, X): what depends on the action alone, for all time steps at once."""

    def state_layers(self) -> list[nn.Module]:
        """Return what depends on the state, so that a rollout applies it at every step."""

    def action_layers(self) -> list[nn.Module]:
        """Return what `project_action` applies, as far as it can run inside a loop."""

    def __call__(
        self, deter: Tensor, stoch: Tensor, action: Tensor, loop: Inside | None = None
    ) -> Tensor:
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

    def project_action(self, action: Tensor, loop: Inside | None = None) -> Tensor:
        """(…, A) → (…, D): the part of the hidden layer that depends on the action alone."""
        hidden = self.action_in(ops.unit_scale(action), loop)
        projected: Tensor = self.hidden_action(hidden, loop)
        return projected

    def state_layers(self) -> list[nn.Module]:
        """Return all layers but those of the action."""
        inputs = [self.deter_in, self.stoch_in]
        return [*inputs, self.hidden_deter, self.hidden_state, self.hidden_norm, self.gates]

    def action_layers(self) -> list[nn.Module]:
        """Return the layers of the action."""
        return [self.action_in, self.hidden_action]

    def forward(
        self, deter: Tensor, stoch: Tensor, action: Tensor, loop: Inside | None = None
    ) -> Tensor:
        """Return the next deterministic state (N, D).

        Args:
            deter: (N, D) float32.
            stoch: (N, S·K) flat sample.
            action: (N, D) from `project_action`.
        """
        inputs = torch.cat([self.deter_in(deter, loop), self.stoch_in(stoch, loop)], -1)
        hidden = self.hidden_deter(deter, loop) + self.hidden_state(inputs, loop) + action
        gates = self.gates(F.silu(self.hidden_norm(hidden, loop)), loop).float()
        # The gates are split inside each block, then regrouped.
        reset, cand, update = gates.unflatten(-1, (self.blocks, 3, -1)).unbind(-2)
        cand = torch.tanh(torch.sigmoid(reset) * cand).flatten(-2)
        update = torch.sigmoid(update - 1.0).flatten(-2)
        return torch.lerp(deter, cand, update)


class InputLayer(nn.Module):
    """act(norm(W[z, a])), with the action's part of the product taken out of the loop."""

    def __init__(self, stoch: int, action: int, hidden: int, style: Style) -> None:
        super().__init__()
        self.dense = SplitDense(stoch, action, hidden, style)

    def project_action(self, action: Tensor) -> Tensor:
        """(…, A) → (…, U), bias included."""
        return self.dense.project(action)

    def forward(self, stoch: Tensor, action: Tensor, loop: Inside | None = None) -> Tensor:
        """(N, Z), projected action (N, U) → (N, U)."""
        return self.dense.finish(stoch, action, loop)


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

    def project_action(self, action: Tensor, loop: Inside | None = None) -> Tensor:
        """(…, A) → (…, U)."""
        return self.input.project_action(action)

    def state_layers(self) -> list[nn.Module]:
        """Return the input layer; the cell is PyTorch's, with parameters of its own."""
        return [self.input]

    def action_layers(self) -> list[nn.Module]:
        """Return nothing: the action goes through a part of the input layer."""
        return []

    def forward(
        self, deter: Tensor, stoch: Tensor, action: Tensor, loop: Inside | None = None
    ) -> Tensor:
        """Return the next deterministic state (N, D)."""
        state: Tensor = self.cell(self.input(stoch, action, loop), deter)
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

    def project_action(self, action: Tensor, loop: Inside | None = None) -> Tensor:
        """(…, A) → (…, U)."""
        return self.input.project_action(ops.unit_scale(action) if self.unit_action else action)

    def state_layers(self) -> list[nn.Module]:
        """Return all layers."""
        return [self.input, self.gates, self.norm]

    def action_layers(self) -> list[nn.Module]:
        """Return nothing: the action goes through a part of the input layer."""
        return []

    def forward(
        self, deter: Tensor, stoch: Tensor, action: Tensor, loop: Inside | None = None
    ) -> Tensor:
        """Return the next deterministic state (N, D)."""
        hidden = torch.cat([self.input(stoch, action, loop), deter], -1)
        gates = self.gates(hidden, loop).float()
        reset, cand, update = self.norm(gates, loop).chunk(3, -1)
        cand = torch.tanh(torch.sigmoid(reset) * cand)
        return torch.lerp(deter, cand, torch.sigmoid(update - 1.0))
