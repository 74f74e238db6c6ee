"""How far the particles went: MMD, Wasserstein-2, displacement in nearest-token distances, and the paper's bound.

MMD is the biased (V-statistic) one of Gretton et al. 2012, since the paper's bound is a statement about the two clouds
themselves and not about a population behind them.
"""

import math

import torch
from torch import Tensor

from vgf_llm.flow.kernels import rbf_kernel, squared_distances
from vgf_llm.flow.shapes import check_shapes


def mmd2(x: Tensor, y: Tensor, sigma: float) -> Tensor:
    """Squared maximum mean discrepancy of two clouds: mean k(x, x') + mean k(y, y') - 2 mean k(x, y), RBF kernel.

    Args:
        x: Points [..., N, F].
        y: Points [..., M, F].
        sigma: Bandwidth > 0 of the kernel, in the unit of the points.

    Returns:
        MMD^2 [...] in [0, 2].

    Raises:
        ValueError: The clouds differ in their leading dimensions or in F.
    """
    _check_clouds(x, y)

    def mean_kernel(a: Tensor, b: Tensor) -> Tensor:
        return rbf_kernel(squared_distances(a, b), sigma).mean(dim=(-2, -1))

    return (mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y)).clamp(min=0)


def mmd2_bound(eps: float, steps: int, sigma: float, grad_bound: float, alpha: float) -> float:
    """The paper's bound on MMD^2(x^0, x^L), L sgd steps: (2 eps L / (sigma sqrt e)) (c / alpha + 1 / (sigma sqrt e)).

    1 / (sigma sqrt e) is the largest slope of the RBF kernel: the second factor bounds |phi|, and MMD^2 changes by at
    most twice that slope a unit of path. Flow and MMD must share one fixed bandwidth (arXiv 2604.14265).

    Args:
        eps: Step size > 0.
        steps: Flow steps L >= 0.
        sigma: Bandwidth > 0.
        grad_bound: c >= 0 with |grad R| <= c everywhere on the path.
        alpha: Temperature > 0.

    Returns:
        The bound, >= 0.
    """
    slope = 1 / (sigma * math.sqrt(math.e))
    return 2 * eps * steps * slope * (grad_bound / alpha + slope)


def wasserstein2(x_NF: Tensor, y_MF: Tensor) -> float:
    """Exact Wasserstein-2 distance of two uniform clouds: sqrt(min over couplings of E |x - y|^2), by POT's simplex.

    Args:
        x_NF: Points, uniform weight.
        y_MF: Points, uniform weight.

    Returns:
        The distance >= 0, in the unit of the points.

    Raises:
        ValueError: The clouds are not two-dimensional, or differ in F.
    """
    import ot

    check_shapes(x_NF=x_NF, y_MF=y_MF)
    cost_NM = squared_distances(x_NF.detach().double(), y_MF.detach().double()).cpu().numpy()
    return math.sqrt(max(float(ot.emd2([], [], cost_NM)), 0.0))


def displacement_in_token_units(delta: Tensor, nearest_token_distance: Tensor | float) -> Tensor:
    """How far each token moved, in distances to its nearest neighbour in the embedding table: |delta_t| / distance_t.

    Args:
        delta: Displacements [..., D].
        nearest_token_distance: Distance > 0: one number for all tokens, or a tensor [...], one per token.

    Returns:
        Displacements [...] >= 0; from 0.5 on the nearest token can be another one.

    Raises:
        ValueError: There are distances, but not one per token.
    """
    length: Tensor = delta.norm(dim=-1)
    if isinstance(nearest_token_distance, Tensor) and nearest_token_distance.shape not in (length.shape, ()):
        raise ValueError(
            f"nearest_token_distance must be one number, or one per token {list(length.shape)}, "
            f"got {list(nearest_token_distance.shape)}"
        )
    return length / nearest_token_distance


def nearest_token_distances(table_VD: Tensor, chunk: int = 1024, rows: Tensor | None = None) -> Tensor:
    """Distance of tokens to the nearest *other* row of the embedding table: min_{w != v} |e_v - e_w|.

    Args:
        table_VD: Embedding table, any float dtype; V >= 2. Distances are computed in float32 (float64 stays).
        chunk: Rows a block, >= 1; the memory of a block is chunk x V numbers.
        rows: Token ids to do it for, int [M]; None does all V, at 2 V^2 D floating-point operations.

    Returns:
        Distances [M] (or [V]) >= 0; 0 for a duplicated row.

    Raises:
        ValueError: The table has fewer than two rows, or another rank.
    """
    check_shapes(table_VD=table_VD)
    V = table_VD.shape[0]
    if V < 2:
        raise ValueError(f"an embedding table needs at least 2 rows to have neighbours, got {V}")
    table_VD = table_VD.detach()
    table_VD = table_VD.to(torch.promote_types(table_VD.dtype, torch.float32))
    square_V = table_VD.square().sum(1)
    rows = torch.arange(V, device=table_VD.device) if rows is None else rows.to(table_VD.device)
    distances = []
    for ids in rows.split(chunk):
        queries = table_VD[ids]
        scores = square_V - 2 * queries @ table_VD.T  # |e_v - e_w|^2 less the constant |e_v|^2
        scores[torch.arange(len(ids), device=ids.device), ids] = math.inf
        neighbours = scores.argmin(1)
        distances.append((queries - table_VD[neighbours]).norm(dim=1))
    return torch.cat(distances)


def _check_clouds(x: Tensor, y: Tensor) -> None:
    if x.dim() < 2 or x.shape[:-2] != y.shape[:-2] or x.shape[-1] != y.shape[-1]:
        raise ValueError(f"mmd2 needs clouds [..., N, F] and [..., M, F], got {list(x.shape)} and {list(y.shape)}")
