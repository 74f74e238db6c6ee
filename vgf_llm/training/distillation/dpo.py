"""Direct preference optimisation: a transported response against the original that it was moved from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vgf_llm.training.batch import Counts, TrainBatch, policy_rows
from vgf_llm.training.distillation.losses import Metrics, dpo
from vgf_llm.training.rollout import Rollout


@dataclass(frozen=True)
class DPO:
    """Prefers the transported response whose reward was raised most to its original.

    Args:
        beta: Of DPO, above 0.
    """

    beta: float
    needs_reference = True

    def batch(self, rollout: Rollout) -> tuple[TrainBatch, Metrics]:
        """Return one pair per prompt, the transported response above its original; the unit is pairs.

        A pair whose transport did not raise the reward has weight 0.
        """
        pair_B2 = best_pair(rollout)
        rewards_B2 = rollout.pool_rewards_BM.gather(1, pair_B2)
        every_B2 = torch.ones_like(pair_B2, dtype=torch.bool)
        weights_B = (rewards_B2[:, 0] > rewards_B2[:, 1]).float()
        rows = policy_rows(rollout.pool.take(pair_B2), every_B2)
        return TrainBatch(rows, weights_B, Counts.of(weights_B.sum())), {}

    def loss(self, logps_RT: Tensor, batch: TrainBatch, counts: Counts) -> tuple[Tensor, Metrics]:
        """Return the loss over pairs of whole responses."""
        policy_B2 = logps_RT.masked_fill(~batch.rows.mask_RT, 0).sum(-1).view(-1, 2)
        reference_B2 = batch.reference.sum(-1).view(-1, 2)
        return dpo(
            chosen_policy_logps_B=policy_B2[:, 0],
            rejected_policy_logps_B=policy_B2[:, 1],
            chosen_reference_logps_B=reference_B2[:, 0],
            rejected_reference_logps_B=reference_B2[:, 1],
            beta=self.beta,
            weights_B=batch.weights,
            num_items=counts.policy,
        )


def best_pair(rollout: Rollout) -> Tensor:
    """Return the pair that DPO compares, [B, 2] by index in the pool: a transported response, and its original.

    It is the pair whose reward was raised most. The two differ by what the transport changed; the worst original in
    place of the source would mostly teach the order of the base's own samples, which needs no transport.
    """
    n, m = (scores["reward"].shape[1] for scores in (rollout.original_scores, rollout.transported_scores))
    rewards_BM = rollout.pool_rewards_BM
    source_M = torch.arange(m, device=rewards_BM.device) * n // m
    best_B = (rewards_BM[:, n:] - rewards_BM[:, source_M]).argmax(1)
    return torch.stack([n + best_B, source_M[best_B]], 1)
