"""The transport of particles along the gradient of a value, for a limited number of steps.

Formula (Value Gradient Flow, arXiv 2604.14265), for l = 1..L and each particle i of a group:

    phi(x_i) = grad R(x_i) / alpha                       kernel "none"
    phi(x_i) = the SVGD direction (vgf_llm.flow.kernels)  kernel "rbf"
    x_i <- project(x_i + step(phi(x_i)))                 then padding is put back

Departures: no graph is kept from one step to the next, so memory does not grow with L; half-precision particles are
moved in float32 (a bfloat16 embedding cannot hold a small step) and shown to the value in their own type.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vgf_llm.errors import NonFiniteError
from vgf_llm.flow.budget import TransportBudget
from vgf_llm.flow.kernels import Features, stein_direction
from vgf_llm.flow.projections import Projection
from vgf_llm.flow.steps import make_step

ValueGradient = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Particles [B, N, *E] -> values [B, N] and their gradients [B, N, *E], each particle's value its own alone."""


@dataclass(frozen=True)
class Trajectory:
    """Where the particles went, and what was seen on the way (all detached)."""

    initial: Tensor
    """Particles x^0 [B, N, *E], the tensor that was given."""
    final: Tensor
    """Particles x^L [B, N, *E], float32 or float64; with L = 0 `initial` itself."""
    values_LBN: Tensor
    """Value of each particle at the start of each step."""
    displacement_LBN: Tensor
    """Frobenius norm of x^l - x^0 after each step, in length units."""
    gradient_norm_LBN: Tensor
    """Frobenius norm of each particle's gradient at the start of each step (its maximum is the c of `mmd2_bound`)."""
    particles: tuple[Tensor, ...] | None = None
    """x^0 .. x^L if they were recorded."""

    @property
    def delta(self) -> Tensor:
        """The whole displacement x^L - x^0 [B, N, *E]."""
        return self.final - self.initial


def autograd_value(value_fn: Callable[[Tensor], Tensor]) -> ValueGradient:
    """Makes a value gradient of a differentiable value: grad_i = d value_i / d x_i.

    The graph lives only inside a call, and gradients go to the particles alone (no parameter's `.grad` is touched).

    Args:
        value_fn: Particles [B, N, *E] -> values [B, N]; a particle's value must not depend on the others.

    Returns:
        Function from particles to detached values and gradients. It raises ValueError where `value_fn` returns another
        shape than [B, N] or values without a gradient.
    """

    def value_gradient(particles: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = particles.detach().requires_grad_(True)
            values = value_fn(leaf)
            if values.shape != particles.shape[:2]:
                raise ValueError(f"the value must have shape {tuple(particles.shape[:2])}, got {tuple(values.shape)}")
            if not values.requires_grad:
                raise ValueError(
                    "the value does not depend differentiably on the particles; learn a value model for it "
                    "and take the gradient from that"
                )
            (gradients,) = torch.autograd.grad(values.sum(), leaf)
        return values.detach(), gradients

    return value_gradient


@torch.no_grad()
def transport(
    particles: Tensor,
    value_gradient: ValueGradient,
    budget: TransportBudget,
    *,
    mask: Tensor | None = None,
    project: Projection | None = None,
    features: Features | None = None,
    length_unit: float = 1.0,
    record: bool = False,
) -> Trajectory:
    """Moves every group of particles along the value's gradient for `budget.steps` steps (formula: head of the module).

    Args:
        particles: Particles x^0 [B, N, *E], floating point; E has at least one dimension.
        value_gradient: Values and gradients at given particles (see `autograd_value`).
        budget: Number, kind and size of the steps, temperature, kernel. Its rounds and nats are the decoder's business.
        mask: Bool or 0/1, shape of `particles` without the last dimension; padding (0) never moves. A fully masked
            particle is absent: its value is not looked at and it does not act on the others.
        project: The domain's constraint, applied after each step.
        features: What the rbf kernel compares, [B, N, *E] -> [B, N, F] (for text the masked mean over tokens); None
            takes all entries.
        length_unit: Unit > 0 of `displacement_LBN` and of the normalised step (for text the nearest-token distance).
        record: Keep x^0 .. x^L.

    Returns:
        The trajectory. L = 0 gives back the input tensor itself.

    Raises:
        NonFiniteError: A value, gradient or moved particle is infinite or NaN; `.step` counts from 0.
        ValueError: A shape, dtype or the length unit does not fit.
    """
    mask = _checked(particles, mask, length_unit)
    values, displacements, gradient_norms = [], [], []
    initial = particles.detach()
    start = initial.to(torch.promote_types(initial.dtype, torch.float32))
    x = start
    path = [particles]
    step = make_step(budget, length_unit)
    for index in range(budget.steps):
        values_BN, gradients = value_gradient(x.to(initial.dtype))
        _check_answer(values_BN, gradients, x)
        gradients = _without_padding(gradients.to(start.dtype), mask)
        gradient_norms.append(_particle_norm(gradients))
        finite_BN = torch.isfinite(gradient_norms[-1]) & torch.isfinite(_without_padding(values_BN, _present(mask)))
        _require_finite(finite_BN, index, "value or gradient")
        phi = gradients / budget.temperature
        if budget.kernel == "rbf":
            phi = stein_direction(
                x, gradients, budget.temperature, mask=mask, features=features, bandwidth=budget.bandwidth
            )
        x = x + step(_without_padding(phi, mask))
        x = x if project is None else project(x)
        x = x if mask is None else torch.where(mask[..., None], x, start)
        values.append(values_BN)
        displacements.append(_particle_norm(x - start) / length_unit)
        _require_finite(torch.isfinite(displacements[-1]), index, "moved particle")
        if record:
            path.append(x)
    nothing = start.new_zeros((0, *particles.shape[:2]))
    return Trajectory(
        initial=particles,
        final=x if budget.steps else particles,
        values_LBN=torch.stack(values) if values else nothing,
        displacement_LBN=torch.stack(displacements) if displacements else nothing,
        gradient_norm_LBN=torch.stack(gradient_norms) if gradient_norms else nothing,
        particles=tuple(path) if record else None,
    )


def _checked(particles: Tensor, mask: Tensor | None, length_unit: float) -> Tensor | None:
    """The mask as bool, after the shapes were checked."""
    if particles.dim() < 3 or not particles.is_floating_point():
        raise ValueError(
            f"particles must be a floating-point tensor [B, N, *E], got {particles.dtype} {tuple(particles.shape)}"
        )
    if not length_unit > 0:
        raise ValueError(f"length_unit must be > 0, got {length_unit!r}")
    if mask is None:
        return None
    if mask.shape != particles.shape[:-1]:
        raise ValueError(f"mask must have shape {tuple(particles.shape[:-1])}, got {tuple(mask.shape)}")
    return mask.bool()


def _check_answer(values_BN: Tensor, gradients: Tensor, x: Tensor) -> None:
    """Refuse values or gradients that would broadcast to the particles."""
    if values_BN.shape != x.shape[:2]:
        raise ValueError(f"values_BN must have shape {list(x.shape[:2])}, got {list(values_BN.shape)}")
    if gradients.shape != x.shape:
        raise ValueError(
            f"gradients must have the shape of the particles, {list(x.shape)}, got {list(gradients.shape)}"
        )


def _present(mask: Tensor | None) -> Tensor | None:
    """Particles [B, N] that have any entry that is not padding."""
    return None if mask is None else mask.flatten(2).any(2) if mask.dim() > 2 else mask


def _without_padding(values: Tensor, mask: Tensor | None) -> Tensor:
    """Zero where the mask is False; NaN at padding disappears too."""
    if mask is None:
        return values
    return values.masked_fill(~(mask if mask.dim() == values.dim() else mask[..., None]), 0)


def _particle_norm(x: Tensor) -> Tensor:
    norm_BN: Tensor = x.flatten(2).norm(dim=2)
    return norm_BN


def _require_finite(finite_BN: Tensor, step: int, what: str) -> None:
    """Raises for the first particle that is not finite; if all are, this is one synchronisation with the device."""
    if finite_BN.all():
        return
    group, particle = (int(i) for i in (~finite_BN).nonzero()[0])
    raise NonFiniteError(
        f"the {what} of prompt {group}, particle {particle} is not finite at flow step {step}: "
        "lower budget.step_size, raise budget.temperature or check the value model",
        group=group,
        step=step,
    )
