"""`constant`: one direction g in embedding space for all positions, in closed form from exact changes.

    b(v) = <g, e_v> / rms
    g = argmin  sum_x sum_k w_xk (<g, phi_xk> - a_xk)^2 + lambda |g|^2,    phi_xk = (e_k - sum_j w_xj e_j) / rms

phi and a are centred within positions by the weights w (`targets`), e are rows of the reference's input table and rms
its root mean square. Source: ridge regression (Hoerl and Kennard, 1970). lambda is the value of a grid that predicts
the held-back prompts best; g is then fitted to all prompts. One eigendecomposition serves the whole grid.

Cost in FLOPs: 2 X K D^2 for the products and about 10 D^3 for the eigenvectors; in use, one look-up per candidate. It
fails where the sign of a token's effect depends on the text, and for tokens whose embedding says nothing of the reward.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reward_models.directions.targets import BonusTargets, centred

PENALTIES = tuple(10.0 ** (power / 2) for power in range(-10, 5))  # in mean squares of a coordinate
_NUMBERS = 2**25  # of embeddings looked up at once


@dataclass(frozen=True)
class ConstantFit:
    """A direction and how it was chosen.

    Attributes:
        direction_D: g, float32, in units of the reward per root mean square of the table.
        bonus_V: <g, e_v> / rms of every row of the table, float32.
        penalty: lambda, in mean squares of a coordinate of phi.
        held_back_error: Weighted mean squared error on the held-back prompts, over that of predicting no difference.
    """

    direction_D: Tensor
    bonus_V: Tensor
    penalty: float
    held_back_error: float


@torch.no_grad()
def fit_constant(targets: BonusTargets, table_VD: Tensor) -> ConstantFit:
    """Fit one direction to bonus targets.

    Args:
        targets: Of at least two prompts.
        table_VD: The reference's input embeddings.

    Raises:
        DataError: The targets are of one prompt.
    """
    rms = table_scale(table_VD)
    fitted, held = targets.split()
    gram_DD, cross_D = _products(fitted, table_VD, rms)
    held_gram_DD, held_cross_D = _products(held, table_VD, rms)
    square = float((held.weights_XK * centred(held.targets_XK, held.weights_XK).square()).sum())
    errors = []
    for g_D in _solutions(gram_DD, cross_D):
        errors.append(float(g_D @ held_gram_DD @ g_D - 2 * (g_D @ held_cross_D)) + square)
    best = min(range(len(PENALTIES)), key=errors.__getitem__)
    direction_D = _solutions(gram_DD + held_gram_DD, cross_D + held_cross_D)[best].float()
    bonus_V = table_VD.float() @ (direction_D / rms)
    error = errors[best] / square if square > 0 else 0.0
    return ConstantFit(direction_D, bonus_V, PENALTIES[best], error)


@torch.no_grad()
def table_scale(table_VD: Tensor) -> float:
    """Return the root mean square of an embedding table."""
    return max(float(table_VD.float().square().mean().sqrt()), 1e-12)


def _products(targets: BonusTargets, table_VD: Tensor, rms: float) -> tuple[Tensor, Tensor]:
    """Return sum w phi phi^T [D, D] and sum w phi a [D], float64."""
    width = table_VD.shape[1]
    gram_DD = torch.zeros(width, width, dtype=torch.float64, device=table_VD.device)
    cross_D = torch.zeros(width, dtype=torch.float64, device=table_VD.device)
    at_once = max(1, _NUMBERS // (targets.ids_XK.shape[1] * width))
    for rows_X in torch.arange(len(targets), device=table_VD.device).split(at_once):
        part = targets.take(rows_X)
        row_O, column_O = (part.weights_XK > 0).nonzero(as_tuple=True)
        weight_O1 = part.weights_XK[row_O, column_O].unsqueeze(-1)
        embedded_OD = table_VD[part.ids_XK[row_O, column_O]].float() / rms
        mean_XD = embedded_OD.new_zeros(len(rows_X), width).index_add(0, row_O, weight_O1 * embedded_OD)
        phi_OD = (embedded_OD - mean_XD[row_O]) * weight_O1.sqrt()
        aims_O = centred(part.targets_XK, part.weights_XK)[row_O, column_O] * weight_O1.squeeze(-1).sqrt()
        gram_DD += (phi_OD.T @ phi_OD).double()
        cross_D += (phi_OD.T @ aims_O).double()
    return gram_DD, cross_D


def _solutions(gram_DD: Tensor, cross_D: Tensor) -> list[Tensor]:
    """Solve (G + lambda mean(diag G) I) g = c for every penalty."""
    values_D, vectors_DD = torch.linalg.eigh(gram_DD)
    turned_D, unit = vectors_DD.T @ cross_D, gram_DD.diagonal().mean().clamp(min=1e-12)
    return [vectors_DD @ (turned_D / (values_D.clamp(min=0) + penalty * unit)) for penalty in PENALTIES]
