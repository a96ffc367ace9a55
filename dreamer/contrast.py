"""DreamerV3 without a decoder: the state of a step predicts the embedding of what was seen in it.

R2-Dreamer asks every number of the prediction to follow its own number of the embedding and no
other (Barlow Twins); InfoNCE asks it to tell its own step from all others of the batch. The
embedding is a target here: the encoder learns through the posterior alone.
"""

from __future__ import annotations

from torch import Tensor

from dreamer import ops
from dreamer.agent import Losses, Metrics, Rollout
from dreamer.batch import Batch
from dreamer.earlier import ContrastConfig, R2Config
from dreamer.nets import Linear
from dreamer.v3 import DreamerV3


class ContrastLearner(DreamerV3):
    """What both objectives share: a linear projection of the state, beside the embedding."""

    config: ContrastConfig

    def build_objective(self, deter: int, stoch: int) -> None:
        """Build what the representation learns from: a projection to the embedding's width."""
        self.projection = Linear(deter + stoch, self.encoder.outputs, bias=False)

    def pairs(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """Return predictions and their targets, one row for every step: (B·T, E) each."""
        projected = self.projection(rollout.states.feature()).flatten(0, 1)
        return projected.float(), rollout.embed.detach().flatten(0, 1).float()

    def scale(self, loss: str) -> float:
        """Return the weight of a loss."""
        own = loss in self.objective_names
        return self.config.objective_scale if own else super().scale(loss)


class R2Dreamer(ContrastLearner):
    """R2-Dreamer: redundancy reduction between the state's projection and the embedding."""

    config: R2Config
    objective_names = ("barlow",)

    def representation_losses(self, batch: Batch, rollout: Rollout) -> tuple[Losses, Metrics]:
        """Return the distance of the cross-correlation from the identity."""
        predicted, seen = self.pairs(rollout)
        return {"barlow": ops.barlow_twins(predicted, seen, self.config.redundancy)}, {}


class InfoNCEDreamer(ContrastLearner):
    """The same with InfoNCE (van den Oord et al., 2018) over all steps of the batch."""

    objective_names = ("infonce",)

    def representation_losses(self, batch: Batch, rollout: Rollout) -> tuple[Losses, Metrics]:
        """Return the cross-entropy of finding each step's own embedding, and how often it is."""
        logits = ops.pair_logits(*self.pairs(rollout))
        found = (logits.argmax(-1) == ops.own_row(logits)).float().mean()
        each = ops.info_nce(logits).reshape(batch.reward.shape)
        return {"infonce": each}, {"contrast/found": found}
