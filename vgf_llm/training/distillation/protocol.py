"""The protocol of a distillation loss: rows to learn from, and their loss."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from vgf_llm.training.batch import Counts, TrainBatch
from vgf_llm.training.distillation.losses import Metrics
from vgf_llm.training.rollout import Rollout


class Distillation(Protocol):
    """Chooses what the policy learns from, and says how well it does."""

    @property
    def needs_reference(self) -> bool:
        """Whether `loss` reads the reference's log-probabilities of the rows."""
        ...

    def batch(self, rollout: Rollout) -> tuple[TrainBatch, Metrics]:
        """Return rows, weights and counts to learn from, and figures that the log line is to hold the means of."""
        ...

    def loss(self, logps_RT: Tensor, batch: TrainBatch, counts: Counts) -> tuple[Tensor, Metrics]:
        """Return this forward's share of the step's loss, a scalar, and figures.

        Args:
            logps_RT: The policy's log-probabilities of the rows' tokens, with a graph; of no meaning at padding.
            batch: What `batch` gave, with the reference's log-probabilities where they are needed.
            counts: Sums over all forwards and processes of the step.
        """
        ...
