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


def objectives_loss(
    chosen_BK: Tensor, rejected_BK: Tensor, difference_BK: Tensor, margin_scale: float = 0.0, centring: float = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute Bradley-Terry's loss over what pairs state on each of several objectives.

    L = mean over stated (b, k) of [ -log sigmoid(s (c_bk - r_bk) - margin_scale |d_bk|) + centring * (c_bk + r_bk)^2 ]

    with s = sign(d_bk). A pair states an objective where d is not 0; its responses may trade places from one objective
    to the next.

    Args:
        chosen_BK: rewards of the preferred responses on K objectives.
        rejected_BK: rewards of the others.
        difference_BK: d, by how much the preferred response is better on each objective.
        margin_scale: reward units per unit of difference that the loss asks for, at least 0.
        centring: weight of the penalty, at least 0.

    Returns:
        The scalar loss, and the metrics of `bradley_terry` over the stated (b, k).

    Raises:
        ValueError: the shapes differ, or no pair states anything.
    """
    check_shapes(chosen_BK=chosen_BK, rejected_BK=rejected_BK, difference_BK=difference_BK)
    stated_BK = difference_BK != 0
    if not stated_BK.any():
        raise ValueError("objectives_loss needs a difference that is not 0, got none")
    chosen_X, rejected_X, difference_X = chosen_BK[stated_BK], rejected_BK[stated_BK], difference_BK[stated_BK]
    better_X = torch.where(difference_X > 0, chosen_X, rejected_X)
    worse_X = torch.where(difference_X > 0, rejected_X, chosen_X)
    margin_X = difference_X.abs() * margin_scale if margin_scale else None
    return bradley_terry(better_X, worse_X, margin_X, centring)


def count_agreements(chosen_BK: Tensor, rejected_BK: Tensor, difference_BK: Tensor) -> tuple[Tensor, Tensor]:
    """Count for each objective the pairs that are scored as they state, [K], and the pairs that state it, [K].

    Args:
        chosen_BK: rewards of the preferred responses on K objectives.
        rejected_BK: rewards of the others.
        difference_BK: by how much the preferred response is better; 0 where the pair has no opinion.

    Raises:
        ValueError: the shapes differ.
    """
    check_shapes(chosen_BK=chosen_BK, rejected_BK=rejected_BK, difference_BK=difference_BK)
    agrees_BK = (chosen_BK - rejected_BK) * difference_BK.sign() > 0
    return agrees_BK.sum(dim=0), (difference_BK != 0).sum(dim=0)
