"""Losses of reward models: tensors in, `(loss, metrics)` out.

Bradley-Terry (1952) on pairs, with the margin of Llama 2 (arXiv 2307.09288, eq. 2) and the centring penalty of
Eisenstein et al. (arXiv 2312.09244) against the free additive constant of each model.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vgf_llm.flow.shapes import check_shapes


def bradley_terry(
    chosen_B: Tensor, rejected_B: Tensor, margin_B: Tensor | None = None, centring: float = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the negative log-likelihood that the chosen response beats the rejected one.

    L = mean_b [ -log sigmoid(c_b - r_b - m_b) + centring * (c_b + r_b)^2 ]

    Args:
        chosen_B: rewards of the preferred responses.
        rejected_B: rewards of the others, same shape.
        margin_B: how much better the chosen one is known to be, in reward units, at least 0; None: 0.
        centring: weight of the penalty, at least 0 (0.01 is usual).

    Returns:
        The scalar loss, and detached scalars: `accuracy` (share of pairs with c > r), `reward_margin` (mean c - r),
        `reward_mean` and `reward_std` (over all 2B rewards, population).

    Raises:
        ValueError: the shapes differ, or there is no pair.
    """
    if chosen_B.shape != rejected_B.shape or chosen_B.ndim != 1 or len(chosen_B) == 0:
        raise ValueError(
            f"bradley_terry needs two vectors of one size, got {tuple(chosen_B.shape)} and {tuple(rejected_B.shape)}"
        )
    check_shapes(chosen_B=chosen_B, margin_B=margin_B)
    difference_B = chosen_B - rejected_B
    shifted_B = difference_B if margin_B is None else difference_B - margin_B.to(difference_B)
    loss = -F.logsigmoid(shifted_B).mean()
    if centring:
        loss = loss + centring * (chosen_B + rejected_B).square().mean()
    rewards_2B = torch.cat([chosen_B, rejected_B]).detach()
    metrics = {
        "accuracy": (difference_B > 0).float().mean().detach(),
        "reward_margin": difference_B.mean().detach(),
        "reward_mean": rewards_2B.mean(),
        "reward_std": rewards_2B.std(correction=0),
    }
    return loss, metrics
