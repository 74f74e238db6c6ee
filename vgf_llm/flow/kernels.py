"""Directions of the flow: plain ascent, and Stein variational gradient descent with an RBF kernel.

Formula (SVGD, Liu and Wang 2016, arXiv 1608.04471, with value / temperature as the log density):

    phi(x_i) = (1/N) sum_j [ k(x_j, x_i) grad R(x_j) / alpha  +  grad_{x_j} k(x_j, x_i) ]
    k(x_j, x_i) = exp(-|z_j - z_i|^2 / (2 sigma^2)),   z = features(x)

Departures: the kernel may look at features z of a particle (for text a pooled embedding, since on 1e5 raw dimensions
all distances are alike), and the median heuristic takes the median over pairs at a positive distance, so that the zeros
of the diagonal and of duplicates do not shrink the bandwidth. A particle that is absent (all padding) takes no part.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from vgf_llm.flow.shapes import check_same_shape, check_shapes

Features = Callable[[Tensor], Tensor]  # particles [B, N, *E] -> features [B, N, F], each particle on its own


def rbf_kernel(squared_distances: Tensor, sigma: Tensor | float) -> Tensor:
    """The Gaussian kernel exp(-d^2 / (2 sigma^2)) of squared distances.

    Args:
        squared_distances: Squared distances d^2 >= 0, any shape.
        sigma: Bandwidth > 0 in the unit of the distances; a number, or a tensor that broadcasts.

    Returns:
        Kernel values in (0, 1], the shape of `squared_distances`.
    """
    return torch.exp(-squared_distances / (2 * sigma**2))


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """All squared Euclidean distances |x_i - y_j|^2, by differences (exactly 0 between equal points).

    Args:
        x: Points [..., N, F], float32 or float64.
        y: Points [..., M, F].

    Returns:
        Squared distances [..., N, M].
    """
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()


def median_bandwidth(squared_distances_BNN: Tensor, present_BN: Tensor | None = None) -> Tensor:
    """The median heuristic of SVGD: sigma^2 = median(d)^2 / (2 log(N + 1)), so that sum_j k(x_j, x_i) is about 1.

    The median runs over pairs i < j at a positive distance (the lower one of an even number). Where there is none (one
    particle, or all equal) sigma is 1: every kernel value is 1 and every repulsion 0 whatever it is.

    Args:
        squared_distances_BNN: Squared distances within each group.
        present_BN: Bool, which particles count; None: all.

    Returns:
        sigma_B > 0.

    Raises:
        ValueError: The shapes do not fit.
    """
    check_shapes(squared_distances_BNN=squared_distances_BNN, present_BN=present_BN)
    B, N, _ = squared_distances_BNN.shape
    i, j = torch.triu_indices(N, N, offset=1, device=squared_distances_BNN.device)
    pairs_BM = squared_distances_BNN[:, i, j]
    counted_BM = pairs_BM > 0
    count_B = squared_distances_BNN.new_full((B,), float(N))
    if present_BN is not None:
        counted_BM &= present_BN[:, i] & present_BN[:, j]
        count_B = present_BN.sum(1).to(count_B)
    if pairs_BM.shape[1] == 0:
        return torch.ones_like(count_B)
    median_B = pairs_BM.masked_fill(~counted_BM, math.nan).nanmedian(dim=1).values
    sigma_B = (median_B / (2 * torch.log(count_B + 1))).sqrt()
    return torch.where(counted_BM.any(1), sigma_B, torch.ones_like(sigma_B))


def stein_direction(
    particles: Tensor,
    gradients: Tensor,
    temperature: float,
    *,
    mask: Tensor | None = None,
    features: Features | None = None,
    bandwidth: float | None = None,
) -> Tensor:
    """The SVGD direction phi of every particle within its group (formula: head of this module).

    One particle alone gets grad R / alpha. The repulsion through a feature map is the literal grad_{x_j} k, one
    vector-Jacobian product of the map for each particle i; without a map it has a closed form.

    Args:
        particles: Particles [B, N, *E], float32 or float64.
        gradients: Gradients of the value at the particles, same shape; 0 where `mask` is False.
        temperature: alpha > 0.
        mask: Bool, shape of `particles` without its last dimension; False is padding. Particles without any True are
            absent: they neither act nor count in N.
        features: Map [B, N, *E] -> [B, N, F] that treats each particle on its own; None flattens the unmasked entries.
        bandwidth: Fixed sigma > 0; None takes the median heuristic.

    Returns:
        phi, shape of `particles`. Entries of padding are not cleared here.

    Raises:
        ValueError: The shapes do not fit.
    """
    check_same_shape(particles=particles, gradients=gradients)
    if mask is not None and mask.shape != particles.shape[:-1]:
        raise ValueError(f"mask must have shape {list(particles.shape[:-1])}, got {list(mask.shape)}")
    B, N = particles.shape[:2]
    present_BN = None if mask is None else mask.reshape(B, N, -1).any(2)
    with torch.enable_grad():
        leaf = particles.detach().requires_grad_(features is not None)
        features_BNF = _flatten(leaf, mask) if features is None else features(leaf)
    if features_BNF.shape[:2] != (B, N) or features_BNF.dim() != 3:
        raise ValueError(f"features must map to [{B}, {N}, F], got {tuple(features_BNF.shape)}")
    z_BNF = features_BNF.detach()
    d2_BNN = squared_distances(z_BNF, z_BNF)
    sigma_B = median_bandwidth(d2_BNN, present_BN) if bandwidth is None else d2_BNN.new_full((B,), bandwidth)
    kernel_BNN = rbf_kernel(d2_BNN, sigma_B[:, None, None])  # [b, i, j]
    count_B11 = kernel_BNN.new_full((B, 1, 1), float(N))
    if present_BN is not None:
        kernel_BNN = kernel_BNN * present_BN[:, None, :]
        count_B11 = present_BN.sum(1).clamp(min=1).to(kernel_BNN)[:, None, None]
    drive_BNX = kernel_BNN @ gradients.flatten(2) / temperature
    weight_BNN = kernel_BNN / sigma_B[:, None, None] ** 2  # grad_{z_j} k(z_j, z_i) = weight_ij (z_i - z_j)
    if features is None:
        repulsion_BNX = _flat_repulsion(z_BNF, weight_BNN, mask, particles)
    else:
        repulsion_BNX = _mapped_repulsion(z_BNF, weight_BNN, features_BNF, leaf)
    return ((drive_BNX + repulsion_BNX) / count_B11).reshape(particles.shape)


def _flatten(particles: Tensor, mask: Tensor | None) -> Tensor:
    return (particles if mask is None else particles.masked_fill(~mask[..., None], 0)).flatten(2)


def _flat_repulsion(z_BNX: Tensor, weight_BNN: Tensor, mask: Tensor | None, particles: Tensor) -> Tensor:
    """sum_j w_ij m_j (z_i - z_j), as two matrix products on centred z (no N x N x X tensor, no cancellation)."""
    z_BNX = z_BNX - z_BNX.mean(1, keepdim=True)
    if mask is None:
        return z_BNX * weight_BNN.sum(2, keepdim=True) - weight_BNN @ z_BNX
    mask_BNX = mask[..., None].expand(particles.shape).flatten(2).to(z_BNX)
    return z_BNX * (weight_BNN @ mask_BNX) - weight_BNN @ (z_BNX * mask_BNX)


def _mapped_repulsion(z_BNF: Tensor, weight_BNN: Tensor, features_BNF: Tensor, leaf: Tensor) -> Tensor:
    """sum_j J(x_j)^T w_ij (z_i - z_j): for each i one vector-Jacobian product over all j."""
    N = z_BNF.shape[1]
    rows = []
    for i in range(N):
        cotangent_BNF = weight_BNN[:, i, :, None] * (z_BNF[:, i, None] - z_BNF)
        (pulled,) = torch.autograd.grad(features_BNF, leaf, cotangent_BNF, retain_graph=i + 1 < N)
        rows.append(pulled.flatten(2).sum(1))
    return torch.stack(rows, dim=1)
