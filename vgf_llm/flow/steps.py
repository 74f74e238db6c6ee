"""The three kinds of step: from a direction phi to a displacement.

    sgd         eps * phi
    adam        eps * m_hat / (sqrt(v_hat) + 1e-8), betas 0.9 and 0.999 (Kingma and Ba 2015), as ascent
    normalised  eps * length_unit * phi_t / |phi_t| for each token t (last dimension), 0 where phi_t is 0

The step size of `normalised` is thereby a distance: how many length units (nearest-token distances) a token moves.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from vgf_llm.flow.budget import TransportBudget
from vgf_llm.flow.shapes import check_same_shape

Step = Callable[[Tensor], Tensor]  # direction phi -> displacement, same shape; called once a flow step


def make_step(budget: TransportBudget, length_unit: float = 1.0) -> Step:
    """The step of a budget; adam's carries its moments from call to call, so make a new one for every flow.

    Args:
        budget: Names the kind of step and its size.
        length_unit: Length > 0 that a normalised step of size 1 moves a token.

    Returns:
        A function from phi [..., D] to the displacement of the same shape.
    """
    if budget.step == "adam":
        return adam_step(budget.step_size)
    if budget.step == "normalised":
        return lambda phi: normalised_step(phi, budget.step_size * length_unit)
    return lambda phi: budget.step_size * phi


def normalised_step(phi: Tensor, length: float) -> Tensor:
    """A move of exactly `length` along phi / |phi| for each last-dimension vector, 0 where phi is 0.

    Args:
        phi: Directions [..., D].
        length: Length of the move >= 0, in the unit of the particles.

    Returns:
        Displacement [..., D].
    """
    scale = phi.abs().amax(-1, keepdim=True)  # first by the largest entry: squares of tiny gradients underflow
    unit = phi / torch.where(scale > 0, scale, 1)
    norm = torch.linalg.vector_norm(unit, dim=-1, keepdim=True)
    return length * unit / torch.where(norm > 0, norm, 1)


def adam_step(learning_rate: float, betas: tuple[float, float] = (0.9, 0.999), epsilon: float = 1e-8) -> Step:
    """Adam as ascent: `lr * m_hat / (sqrt(v_hat) + epsilon)`; an entry whose phi is always 0 never moves.

    Args:
        learning_rate: Size > 0 of the first step of every entry.
        betas: Decay of the first and second moment, in [0, 1).
        epsilon: Guard of the division, > 0.

    Returns:
        A function that keeps its moments and their count between calls. It raises ValueError for a phi of another shape
        than the first one's.
    """
    count = 0
    first: Tensor | None = None
    second: Tensor | None = None

    def step(phi: Tensor) -> Tensor:
        nonlocal count, first, second
        first = torch.zeros_like(phi) if first is None else first
        second = torch.zeros_like(phi) if second is None else second
        check_same_shape(first_phi=first, phi=phi)
        count += 1
        first = betas[0] * first + (1 - betas[0]) * phi
        second = betas[1] * second + (1 - betas[1]) * phi.square()
        unbiased_first = first / (1 - betas[0] ** count)
        unbiased_second = second / (1 - betas[1] ** count)
        return learning_rate * unbiased_first / (unbiased_second.sqrt() + epsilon)

    return step
