"""The estimated KL per token from the policy to the reference, as a penalty on any distillation loss."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from vgf_llm.training.batch import Counts, TrainBatch
from vgf_llm.training.distillation.losses import Metrics, kl_anchor
from vgf_llm.training.distillation.protocol import Distillation
from vgf_llm.training.rollout import Rollout


@dataclass(frozen=True)
class Anchored:
    """A distillation loss plus the penalty.

    Args:
        inner: The loss.
        coefficient: Weight of the penalty, above 0.
    """

    inner: Distillation
    coefficient: float
    needs_reference = True

    def batch(self, rollout: Rollout) -> tuple[TrainBatch, Metrics]:
        """Return what the loss learns from, with its tokens counted."""
        batch, metrics = self.inner.batch(rollout)
        tokens = batch.rows.mask_RT.sum().float()
        return replace(batch, counts=replace(batch.counts, tokens=tokens)), metrics

    def loss(self, logps_RT: Tensor, batch: TrainBatch, counts: Counts) -> tuple[Tensor, Metrics]:
        """Return the loss and the weighted penalty, added."""
        loss, metrics = self.inner.loss(logps_RT, batch, counts)
        penalty, more = kl_anchor(logps_RT, batch.reference, batch.rows.mask_RT, counts.tokens)
        return loss + self.coefficient * penalty, metrics | more
