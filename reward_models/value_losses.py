"""Targets and losses of a token-level value, and of a secant head beside it: tensors in, tensors out.

TD(lambda) targets (Sutton, 1988) for an undiscounted reward at the end of the response, where the target at the prompt
may be the mean of the target value over transported particles (Value Gradient Flow, arXiv 2604.14265), and expectile
regression on them (Newey and Powell, 1987; as in IQL, arXiv 2110.06169, eq. 5, times 2, so that tau = 0.5 is the plain
squared error).

Column t of a T1 = T + 1 wide tensor stands for the first t tokens of the response, column 0 for the prompt alone.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import smooth_l1_loss

from vgf_llm.flow.shapes import check_shapes


def td_lambda_targets(
    target_values_RT1: Tensor,
    rewards_R: Tensor,
    mask_RT: Tensor,
    lam: float,
    prompt_targets_R: Tensor | None = None,
) -> Tensor:
    """Compute lambda-returns of every prefix, backwards from the reward.

        G_L = r,        G_t = (1 - lam) V_{t+1} + lam G_{t+1}   for t < L,        V_L := r (it is known)

    with L the row's length and V the target value. lam 0 is one-step bootstrapping, lam 1 the reward at every prefix.

    Args:
        target_values_RT1: values of all prefixes by the target network; what stands at padding is not read.
        rewards_R: reward of each whole response.
        mask_RT: bool or 0/1, right padded, True where a response token stands.
        lam: lambda, in [0, 1].
        prompt_targets_R: target at column 0; None: its lambda-return.

    Returns:
        targets_RT1, float32 without a graph; 0 at padding, and all of it in a row without tokens.

    Raises:
        ValueError: lam is outside [0, 1], or the shapes do not fit.
    """
    if not 0 <= lam <= 1:
        raise ValueError(f"td_lambda_targets needs lam in [0, 1], got {lam}")
    R, T = mask_RT.shape
    if target_values_RT1.shape != (R, T + 1) or rewards_R.shape != (R,):
        raise ValueError(
            f"td_lambda_targets needs values [R, T + 1], rewards [R] and a mask [R, T], got "
            f"{tuple(target_values_RT1.shape)}, {tuple(rewards_R.shape)} and {tuple(mask_RT.shape)}"
        )
    check_shapes(rewards_R=rewards_R, prompt_targets_R=prompt_targets_R)
    mask_RT, lengths_R = mask_RT.bool(), mask_RT.bool().sum(dim=-1)
    values_RT1, reward_R = target_values_RT1.detach().float(), rewards_R.detach().float()
    return_R, columns = torch.zeros_like(reward_R), []
    for t in range(T, -1, -1):
        if t < T:
            next_R = torch.where(lengths_R == t + 1, reward_R, values_RT1[:, t + 1])
            return_R = torch.where(lengths_R > t, (1 - lam) * next_R + lam * return_R, 0.0)
        return_R = torch.where(lengths_R == t, reward_R, return_R)
        columns.append(return_R)
    targets_RT1 = torch.stack(columns[::-1], dim=1)
    if prompt_targets_R is not None:
        targets_RT1[:, 0] = prompt_targets_R.detach().float()
    return targets_RT1.masked_fill((lengths_R == 0)[:, None], 0.0)


def value_loss(
    values_RT1: Tensor,
    targets_RT1: Tensor,
    mask_RT1: Tensor,
    expectile: float = 0.5,
    num_items: Tensor | int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the expectile regression of values on targets.

        L = (1/n) sum 2 |tau - 1[target <= value]| (target - value)^2        over the entries that the mask picks

    Args:
        values_RT1: predicted values of all prefixes, with a graph.
        targets_RT1: their targets.
        mask_RT1: bool or 0/1, the entries that count.
        expectile: tau in (0, 1): 0.5 is the mean squared error, above it the value leans to the better outcomes.
        num_items: n, the count of entries in the whole batch of all devices and accumulation steps; None: those here.

    Returns:
        The scalar loss (0 where nothing counts), and detached scalars: `value_error` (root mean squared error at each
        row's last entry), `explained_variance` there (1 - var(target - value) / var(target); NaN where targets do not
        vary) and `value_mean` (over the entries; the first and last NaN where there is none).

    Raises:
        ValueError: expectile is outside (0, 1), or the shapes do not fit.
    """
    if not 0 < expectile < 1:
        raise ValueError(f"value_loss needs an expectile in (0, 1), got {expectile}")
    if not values_RT1.shape == targets_RT1.shape == mask_RT1.shape:
        raise ValueError(
            f"value_loss needs three tensors of one shape, got {tuple(values_RT1.shape)}, {tuple(targets_RT1.shape)} "
            f"and {tuple(mask_RT1.shape)}"
        )
    check_shapes(values_RT1=values_RT1, num_items=num_items)
    mask_RT1 = mask_RT1.bool()
    error_RT1 = (targets_RT1.detach().float() - values_RT1.float()).masked_fill(~mask_RT1, 0.0)
    weight_RT1 = torch.where(error_RT1 > 0, 2 * expectile, 2 * (1 - expectile))
    count = mask_RT1.sum().clamp(min=1) if num_items is None else num_items
    loss = (weight_RT1 * error_RT1.square()).sum() / count
    return loss, _metrics(values_RT1.detach().float(), targets_RT1.detach().float(), mask_RT1)


def secant_loss(
    directions_RSD: Tensor,
    steps_RSD: Tensor,
    targets_RS: Tensor,
    known_RS: Tensor,
    mask_RS: Tensor,
    num_items: Tensor | int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the regression of directions on exact changes: what a step along them should have done to the value.

        L = (1/n) sum smooth_l1( <o, e_v - e_y>, exact - known )

    Args:
        directions_RSD: o, a head's directions at the substituted tokens, with a graph.
        steps_RSD: e_v - e_y, in the units that the directions are in.
        targets_RS: what is known beforehand leaves of the exact changes.
        known_RS: what is known beforehand; for the metric only.
        mask_RS: bool, substitutions that count.
        num_items: n, the count of substitutions in the whole batch of all devices and accumulation steps; None: here.

    Returns:
        The scalar loss (0 where nothing counts), and `secant_correlation`, detached: Pearson's correlation of predicted
        and exact changes (NaN where either does not vary).

    Raises:
        ValueError: the shapes do not fit.
    """
    check_shapes(
        directions_RSD=directions_RSD,
        steps_RSD=steps_RSD,
        targets_RS=targets_RS,
        known_RS=known_RS,
        mask_RS=mask_RS,
        num_items=num_items,
    )
    predicted_RS = (directions_RSD.float() * steps_RSD).sum(-1)
    errors_RS = smooth_l1_loss(predicted_RS, targets_RS, reduction="none").masked_fill(~mask_RS, 0.0)
    loss = errors_RS.sum() / (mask_RS.sum().clamp(min=1) if num_items is None else num_items)
    predicted_X, exact_X = (predicted_RS.detach() + known_RS)[mask_RS], (targets_RS + known_RS)[mask_RS]
    predicted_X, exact_X = predicted_X - predicted_X.mean(), exact_X - exact_X.mean()
    return loss, {"secant_correlation": (predicted_X * exact_X).sum() / (predicted_X.norm() * exact_X.norm())}


def _metrics(values_RT1: Tensor, targets_RT1: Tensor, mask_RT1: Tensor) -> dict[str, Tensor]:
    """Compare values and targets at each row's last entry."""
    order_T1 = torch.arange(1, mask_RT1.shape[1] + 1, device=mask_RT1.device)
    last_RT1 = (mask_RT1 * order_T1 == (mask_RT1 * order_T1).amax(dim=-1, keepdim=True)) & mask_RT1
    value_X, target_X = values_RT1[last_RT1], targets_RT1[last_RT1]
    spread = (target_X - target_X.mean()).square().mean()
    missed = (target_X - value_X - (target_X - value_X).mean()).square().mean()
    return {
        "value_error": (target_X - value_X).square().mean().sqrt(),
        "explained_variance": torch.where(spread > 0, 1 - missed / spread, torch.nan),
        "value_mean": values_RT1[mask_RT1].mean(),
    }
