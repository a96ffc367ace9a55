"""Learning a representation by predicting assignments to prototypes (DreamerPro)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreamer import ops
from dreamer.agent import Losses, Metrics
from dreamer.batch import Batch
from dreamer.earlier import PrototypesConfig
from dreamer.nets import Linear, glorot_uniform_
from dreamer.rssm import State
from dreamer.slow import frozen_copy, move_towards

LOSSES = ("swav", "temp", "norm")


class Prototypes(nn.Module):
    """Prototypes, projections, and the slowly moving teacher.

    The teacher sees both views and assigns every step to prototypes. One student predicts the
    assignment of the other view from its embedding, another that of its own view from the
    recurrent state (arXiv:2110.14565, Eq. 2–6).
    """

    count: Tensor

    def __init__(
        self, config: PrototypesConfig, encoder: nn.Module, embed: int, feature: int
    ) -> None:
        super().__init__()
        self.config = config
        self.embed_proj = Linear(embed, config.size, init=glorot_uniform_)
        self.feature_proj = Linear(feature, config.size, init=glorot_uniform_)
        self.centres = nn.Parameter(F.normalize(torch.randn(config.count, config.size), dim=-1))
        self.slow_encoder = frozen_copy(encoder)
        self.slow_proj = frozen_copy(self.embed_proj)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def views(self, batch: Batch) -> Batch:
        """Return the batch twice, images shifted at random: one shift per sequence and view."""
        twice = Batch(
            obs={key: torch.cat([x, x]) for key, x in batch.obs.items()},
            prev_action=torch.cat([batch.prev_action] * 2),
            reward=torch.cat([batch.reward] * 2),
            is_first=torch.cat([batch.is_first] * 2),
            is_last=torch.cat([batch.is_last] * 2),
            is_terminal=torch.cat([batch.is_terminal] * 2),
            initial=State(*(torch.cat([x, x]) for x in batch.initial)),
        )
        return twice._replace(obs={key: self.shifted(x) for key, x in twice.obs.items()})

    def shifted(self, obs: Tensor) -> Tensor:
        """Shift images (n, T, h, w, c) uint8 → float in [0, 255]; return anything else as it is."""
        if obs.dim() != 5:
            return obs
        n, steps, channels = obs.shape[0], obs.shape[1], obs.shape[4]
        most = self.config.shift
        shift = (torch.rand(n, 2, device=obs.device) * 2.0 - 1.0) * most
        if self.config.whole_pixels:
            shift = torch.floor(torch.rand(n, 2, device=obs.device) * (2 * most + 1)) - most
        together = obs.float().permute(0, 2, 3, 1, 4).flatten(3)  # all steps move alike
        moved = ops.random_shift(together, shift).unflatten(-1, (steps, channels))
        views: Tensor = moved.permute(0, 3, 1, 2, 4)
        return views

    def losses(
        self, obs: dict[str, Tensor], embed: Tensor, feature: Tensor
    ) -> tuple[Losses, Metrics]:
        """Return the losses of two views stacked along the batch: (2B, T, …) each."""
        student, dynamics = self.embed_proj(embed).float(), self.feature_proj(feature).float()
        with torch.no_grad():
            teacher = F.normalize(self.slow_proj(self.slow_encoder(obs)).float(), dim=-1)[:, 1:]
            scores = teacher @ F.normalize(self.centres, dim=-1).T
            halves = [half.flatten(0, 1) for half in scores.chunk(2)]
            first, second = (
                ops.sinkhorn(half, self.config.eps, self.config.iterations) for half in halves
            )
        centres = self._centres()
        log_p = self._log_probs(student[:, 1:], centres)
        one, two = (half.flatten(0, 1) for half in log_p.chunk(2))
        swav = -0.5 * ((second * one).sum(-1) + (first * two).sum(-1))
        log_p = self._log_probs(dynamics[:, 1:], centres).flatten(0, 1)
        targets = torch.cat([first, second])
        losses = {
            "swav": swav,
            "temp": -(targets * log_p).sum(-1),
            "norm": (student.norm(dim=-1) - 1).square().mean()
            + (dynamics.norm(dim=-1) - 1).square().mean(),
        }
        return losses, self._usage(targets)

    def _centres(self) -> Tensor:
        """Return the prototypes (K, P), without gradient while they are frozen."""
        held = self.centres.detach()
        return held + (self.centres - held) * (self.count >= self.config.freeze)

    def _log_probs(self, projected: Tensor, centres: Tensor) -> Tensor:
        scores = F.normalize(projected, dim=-1) @ centres.T
        log_p: Tensor = F.log_softmax(scores / self.config.temperature, -1)
        return log_p

    def _usage(self, targets: Tensor) -> Metrics:
        """Return how many prototypes are some step's first choice, and entropies of assignment."""
        chosen = torch.zeros(self.config.count, device=targets.device)
        chosen = chosen.index_fill(0, targets.argmax(-1), 1.0)
        mean = targets.mean(0)
        return {
            "prototypes/live": chosen.sum(),
            "prototypes/entropy_nats": -(targets * (targets + 1e-20).log()).sum(-1).mean(),
            "prototypes/mean_entropy_nats": -(mean * (mean + 1e-20).log()).sum(),
        }

    @torch.no_grad()
    def move(self, encoder: nn.Module) -> None:
        """Move the teacher towards the student and put the prototypes back on the sphere.

        The first move goes all the way, as in the published code.
        """
        rate = (self.count == 0).float().clamp_min(self.config.ema_rate)
        move_towards(self.slow_encoder, encoder, rate)
        move_towards(self.slow_proj, self.embed_proj, rate)
        self.centres.copy_(F.normalize(self.centres, dim=-1))
        self.count += 1
