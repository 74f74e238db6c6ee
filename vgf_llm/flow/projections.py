"""Projections onto a domain's constraint, applied after every step: a box for actions, a ball per token for text.

Both sets are convex and contain the start, so a projection never lengthens a step. Padding is the mask's business.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from vgf_llm.flow.shapes import check_same_shape

Projection = Callable[[Tensor], Tensor]  # particles [B, N, *E] -> particles of the same shape


def clip_to_box(low: float, high: float) -> Projection:
    """Clips every coordinate to [low, high]: `x <- min(max(x, low), high)` (unit-scale actions: -1, 1).

    Args:
        low: Lower bound.
        high: Upper bound, >= low.

    Returns:
        The projection.

    Raises:
        ValueError: low > high.
    """
    if not low <= high:
        raise ValueError(f"clip_to_box needs low <= high, got low={low!r}, high={high!r}")
    return lambda particles: particles.clamp(low, high)


def clip_to_ball(centre: Tensor, radius: float) -> Projection:
    """Keeps each last-dimension vector within `radius` of its start: `c + (x - c) min(1, radius / |x - c|)`.

    Args:
        centre: Starts [B, N, *E], as given to `transport`.
        radius: Largest distance >= 0, in the unit of the particles (for text a trust region a token).

    Returns:
        The projection.

    Raises:
        ValueError: radius is negative; or, at a call, the particles have another shape than the centre.
    """
    if not radius >= 0:
        raise ValueError(f"clip_to_ball needs radius >= 0, got {radius!r}")

    def project(particles: Tensor) -> Tensor:
        check_same_shape(centre=centre, particles=particles)
        offset = particles - centre
        norm: Tensor = offset.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(offset.dtype).tiny)
        return centre + offset * (radius / norm).clamp(max=1)

    return project
