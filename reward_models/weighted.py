"""Several reward models as one value: the weighted sum of their scores, for a flow that climbs all of them at once.

    V(x, u) = sum_m w_m R_m(x, u)

Members share one input embedding table, since particles are embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from reward_models.ensemble import RewardEnsemble
from reward_models.modelling import RewardModel


class WeightedRewards(RewardEnsemble):
    """The weighted sum of reward models over one embedding table; same surface as a single model."""

    def __init__(self, members: Sequence[RewardModel], weights: Sequence[float]) -> None:
        """Check that the members can share particles.

        Args:
            members: At least one; their input embedding tables must be equal.
            weights: One a member.

        Raises:
            ModelError: No member, or different tables.
            ValueError: The number of weights is not that of the members.
        """
        super().__init__(members)
        if len(weights) != len(members):
            raise ValueError(f"weights must be {len(members)} numbers, got {list(weights)}")
        self.weights = list(weights)

    def join(self, scores: Sequence[Tensor]) -> Tensor:
        """Add up the members' scores by their weights."""
        return torch.stack([weight * score for weight, score in zip(self.weights, scores, strict=True)]).sum(0)
