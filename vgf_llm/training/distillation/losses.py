"""Losses that distil transported responses into a policy: tensors in, ``(loss, metrics)`` out. Torch only.

Every loss is a sum over rows divided by ``num_items``, which the caller counts over all micro-batches and processes of
an optimiser step: the gradient then does not depend on how the step was cut into pieces. Without it the rows given are
all there are.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vgf_llm.flow.shapes import check_shapes

Metrics = dict[str, Tensor]


def group_weights(rewards_BM: Tensor, temperature: float, kept: int | None = None) -> Tensor:
    """Return w = softmax(r / alpha) within each prompt's responses, the smallest set to 0, summing to 1.

    These are the weights that turn samples of a distribution q into the KL-regularised optimum q exp(r / alpha) (Peters
    and Schaal 2007; Korbak et al. 2022), self-normalised within the group.

    Args:
        rewards_BM: Rewards of M responses per prompt.
        temperature: alpha > 0, in units of the reward.
        kept: Responses per prompt that keep their weight, at least 1; None keeps all.

    Returns:
        weights_BM, at least 0.

    Raises:
        ValueError: The rewards have another rank.
    """
    check_shapes(rewards_BM=rewards_BM)
    if kept is not None and kept < rewards_BM.shape[1]:
        lowest_BM = rewards_BM.argsort(dim=1, descending=True, stable=True)[:, kept:]
        rewards_BM = rewards_BM.scatter(1, lowest_BM, -torch.inf)
    return torch.softmax(rewards_BM / temperature, dim=1)


def weighted_nll(
    policy_logps_RT: Tensor, mask_RT: Tensor, weights_R: Tensor, num_items: Tensor | float | None = None
) -> tuple[Tensor, Metrics]:
    """Compute the weighted negative log-likelihood per token.

    L = - sum_r w_r sum_t log pi(y_rt) / num_items,        num_items = sum_r w_r T_r of the whole step

    Args:
        policy_logps_RT: Log-probabilities of the tokens under the policy.
        mask_RT: bool, True on tokens that count.
        weights_R: At least 0.
        num_items: See the module's first lines; None: of these rows.

    Returns:
        The scalar loss, and ``policy_nll``: the mean over these rows.

    Raises:
        ValueError: The shapes do not fit.
    """
    check_shapes(policy_logps_RT=policy_logps_RT, mask_RT=mask_RT, weights_R=weights_R, num_items=num_items)
    local = (weights_R.unsqueeze(1) * mask_RT).sum()
    total = -(weights_R.unsqueeze(1) * policy_logps_RT.masked_fill(~mask_RT, 0)).sum()
    loss = total / _at_least_something(local if num_items is None else num_items)
    return loss, {"policy_nll": (total / _at_least_something(local)).detach()}


def dpo(
    chosen_policy_logps_B: Tensor,
    rejected_policy_logps_B: Tensor,
    chosen_reference_logps_B: Tensor,
    rejected_reference_logps_B: Tensor,
    beta: float,
    weights_B: Tensor | None = None,
    num_items: Tensor | float | None = None,
) -> tuple[Tensor, Metrics]:
    """Compute direct preference optimisation (Rafailov et al. 2023, eq. 7).

    L = - sum_b w_b log sigmoid(beta [(log pi - log p)(chosen_b) - (log pi - log p)(rejected_b)]) / num_items

    Args:
        chosen_policy_logps_B: Log-probability of the chosen responses, summed over their tokens.
        rejected_policy_logps_B: Of the rejected ones.
        chosen_reference_logps_B: The same under the reference.
        rejected_reference_logps_B: The same under the reference.
        beta: Above 0.
        weights_B: 1 where the pair counts, 0 where it is a tie; None counts all.
        num_items: Pairs of the whole step; None: of these rows.

    Returns:
        The scalar loss, and ``dpo_accuracy``, ``dpo_margin`` (in nats times beta) over the pairs that count.

    Raises:
        ValueError: The shapes do not fit.
    """
    check_shapes(
        chosen_policy_logps_B=chosen_policy_logps_B,
        rejected_policy_logps_B=rejected_policy_logps_B,
        chosen_reference_logps_B=chosen_reference_logps_B,
        rejected_reference_logps_B=rejected_reference_logps_B,
        weights_B=weights_B,
        num_items=num_items,
    )
    weights_B = torch.ones_like(chosen_policy_logps_B) if weights_B is None else weights_B
    margin_B = beta * (
        (chosen_policy_logps_B - chosen_reference_logps_B) - (rejected_policy_logps_B - rejected_reference_logps_B)
    )
    local = weights_B.sum()
    loss = -(weights_B * F.logsigmoid(margin_B)).sum() / _at_least_something(local if num_items is None else num_items)
    share_B = weights_B / _at_least_something(local)
    metrics = {
        "dpo_accuracy": (share_B * (margin_B > 0)).sum().detach(),
        "dpo_margin": (share_B * margin_B).sum().detach(),
    }
    return loss, metrics


def kl_anchor(
    policy_logps_RT: Tensor, reference_logps_RT: Tensor, mask_RT: Tensor, num_items: Tensor | float | None = None
) -> tuple[Tensor, Metrics]:
    """Estimate the KL per token from the policy to the reference, as a penalty.

    L = sum_rt [exp(d_rt) - d_rt - 1] / num_items,        d = log p(y_rt) - log pi(y_rt)

    It is at least 0, and 0 where the two agree (Schulman 2020, the estimator k3). Its mean is the KL for responses
    sampled from the policy; on others it still draws the policy to the reference at their tokens.

    Args:
        policy_logps_RT: Log-probabilities of the tokens under the policy.
        reference_logps_RT: The same under the reference.
        mask_RT: bool, True on tokens that count.
        num_items: Tokens of the whole step; None: of these rows.

    Returns:
        The scalar loss, and ``kl_a_token``: the mean over these rows.

    Raises:
        ValueError: The shapes do not fit.
    """
    check_shapes(
        policy_logps_RT=policy_logps_RT, reference_logps_RT=reference_logps_RT, mask_RT=mask_RT, num_items=num_items
    )
    difference_RT = (reference_logps_RT - policy_logps_RT).masked_fill(~mask_RT, 0)
    total = (torch.expm1(difference_RT) - difference_RT).sum()
    local = mask_RT.sum()
    loss = total / _at_least_something(local if num_items is None else num_items)
    return loss, {"kl_a_token": (total / _at_least_something(local)).detach()}


def _at_least_something(count: Tensor | float) -> Tensor | float:
    """A count to divide by: where nothing counts, the sum above it is 0 too."""
    return count.clamp(min=1e-12) if isinstance(count, Tensor) else max(count, 1e-12)
