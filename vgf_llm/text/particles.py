"""Responses as particles: token embeddings in the value's own table, moved by the flow.

A response y_1..y_T becomes u in R^{T x D}. Its text may move; EOS and padding stay where they are. A kernel, where
one is asked for, compares the masked mean over tokens: on T*D raw dimensions all distances are alike and an RBF
degenerates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vgf_llm.flow.budget import TransportBudget
from vgf_llm.flow.distances import nearest_token_distances
from vgf_llm.flow.trajectory import Trajectory, ValueGradient, autograd_value, transport
from vgf_llm.text.protocols import Value
from vgf_llm.text.responses import Responses

_SAMPLED_ROWS = 1024


@dataclass(frozen=True)
class GradientSource:
    """Where the flow takes values and directions from.

    Attributes:
        make: (value, its prefix, responses) -> the values and gradients that move the responses' particles.
        passes: What a flow step costs, in forward passes of the value over the response; a backward to the inputs
            counts as one.
    """

    make: Callable[[Value, Any, Responses], ValueGradient]
    passes: float

    def __call__(self, value: Value, prefix: Any, responses: Responses) -> ValueGradient:
        """Return the value gradient for these responses."""
        return self.make(value, prefix, responses)


def _exact(value: Value, prefix: Any, responses: Responses) -> ValueGradient:
    return autograd_value(lambda u_BNTD: value.score(prefix, u_BNTD, responses.mask_BNT))


exact_gradient = GradientSource(_exact, passes=2)
"""The value's own gradient in the embeddings, by one backward pass to the inputs."""


def move_particles(
    value: Value,
    prefix: Any,
    responses: Responses,
    budget: TransportBudget,
    *,
    length_unit: float = 1.0,
    gradient: GradientSource = exact_gradient,
) -> Trajectory:
    """Embed responses and move them by one round of the budget.

    Args:
        value: Differentiable value; its table is the space of the particles.
        prefix: ``value.prefix`` of the prompts.
        responses: B x N responses.
        budget: Steps, step size, kernel and temperature.
        length_unit: Typical distance from a token to the nearest other one, the unit of displacement.
        gradient: Where the direction comes from.

    Returns:
        The trajectory of u [B, N, T, D].

    Raises:
        NonFiniteError: If a value or gradient is not finite; ``group`` is the prompt's index in the batch.
    """
    mask_BNT = responses.movable_BNT

    def pooled(u_BNTD: Tensor) -> Tensor:
        weight_BNT1 = mask_BNT.unsqueeze(-1).to(u_BNTD.dtype)
        return (u_BNTD * weight_BNT1).sum(2) / weight_BNT1.sum(2).clamp(min=1)

    return transport(
        value.embed(responses.tokens_BNT).detach(),
        gradient(value, prefix, responses),
        budget,
        mask=mask_BNT,
        features=pooled,
        length_unit=length_unit,
    )


def token_spacing(table_VD: Tensor) -> float:
    """Return the median distance from a token to its nearest neighbour, over evenly spaced rows of the table."""
    rows = torch.linspace(0, len(table_VD) - 1, min(_SAMPLED_ROWS, len(table_VD)), device=table_VD.device).long()
    return float(nearest_token_distances(table_VD, rows=rows).median())
