"""Weighted likelihood: every response of the pool counts by the softmax of its reward."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vgf_llm.training.batch import Counts, TrainBatch, policy_rows
from vgf_llm.training.distillation.losses import Metrics, group_weights, weighted_nll
from vgf_llm.training.rollout import Rollout


@dataclass(frozen=True)
class WeightedNLL:
    """Distils originals and transported responses by weighted likelihood.

    Args:
        temperature: alpha of the weights softmax(reward / alpha), above 0.
        kept: Responses of highest weight per prompt that are trained on; None keeps all.
    """

    temperature: float
    kept: int | None = None
    needs_reference = False

    def batch(self, rollout: Rollout) -> tuple[TrainBatch, Metrics]:
        """Return the responses of weight above 0, one row and one weight each; the unit is weighted tokens."""
        rewards_BM = rollout.pool_rewards_BM
        weights_BM = group_weights(rewards_BM, self.temperature, self.kept)
        keep_BM = weights_BM > 0
        rows, weights_R = policy_rows(rollout.pool, keep_BM), weights_BM[keep_BM]
        count = (weights_R.unsqueeze(1) * rows.mask_RT).sum()
        distilled_B = (rewards_BM.masked_fill(~keep_BM, 0) * weights_BM).sum(1)
        return TrainBatch(rows, weights_R, Counts.of(count)), {"distilled_reward": distilled_B}

    def loss(self, logps_RT: Tensor, batch: TrainBatch, counts: Counts) -> tuple[Tensor, Metrics]:
        """Return the weighted negative log-likelihood per token."""
        return weighted_nll(logps_RT, batch.rows.mask_RT, batch.weights, counts.policy)
