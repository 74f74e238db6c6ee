"""What the critic regresses on and how a particle is chosen: the implicit policy's formulas. Torch only.

    y = r + gamma * m * pool_i agg_c Qbar_c(s', x_i^L)

x_i^L are the particles of the next state after transport, Qbar the averaged critics, m 0 where the task has ended,
agg the least or the mean over critics, and pool the mean (the paper's target, an expectation under the implicit
policy) or the largest over particles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vgf_llm.flow.shapes import check_shapes


def aggregate(q_CBN: Tensor, kind: str) -> Tensor:
    """Join the critics: the least ("min") or the mean ("mean") over the first dimension.

    Raises:
        ValueError: Another kind, or another rank.
    """
    if kind not in ("min", "mean"):
        raise ValueError(f"an aggregation over critics is min or mean, got {kind!r}")
    check_shapes(q_CBN=q_CBN)
    return q_CBN.amin(0) if kind == "min" else q_CBN.mean(0)


def td_target(rewards_B: Tensor, masks_B: Tensor, next_q_BN: Tensor, discount: float, pool: str) -> Tensor:
    """Return y = r + gamma m pool_i Q(s', x_i).

    Args:
        rewards_B: r.
        masks_B: m in {0, 1}; 0 where no reward follows.
        next_q_BN: Values of the next state's particles, critics joined.
        discount: gamma in [0, 1].
        pool: "mean" or "max" over particles.

    Returns:
        target_B, detached.

    Raises:
        ValueError: Another pool, or shapes that do not fit.
    """
    if pool not in ("mean", "max"):
        raise ValueError(f"a target pools particles by mean or max, got {pool!r}")
    check_shapes(rewards_B=rewards_B, masks_B=masks_B, next_q_BN=next_q_BN)
    next_B = next_q_BN.mean(1) if pool == "mean" else next_q_BN.amax(1)
    return (rewards_B + discount * masks_B * next_B).detach()


def select(q_BN: Tensor, kind: str, uniform_B: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """Choose one particle a state.

    Args:
        q_BN: Values, critics joined.
        kind: "max" takes the largest (the first of equals), "softmax" draws with probability softmax(q / temperature),
            "random" draws uniformly.
        uniform_B: Uniform numbers in [0, 1), one a state; the draw is the first particle whose cumulated probability
            exceeds it. Not needed for "max".
        temperature: Above 0, in units of the value.

    Returns:
        Indices int64 [B].

    Raises:
        ValueError: Another kind, shapes that do not fit, or a draw without uniform numbers.
    """
    check_shapes(q_BN=q_BN, uniform_B=uniform_B)
    if kind == "max":
        return q_BN.argmax(1)
    if kind not in ("softmax", "random"):
        raise ValueError(f"a particle is selected by max, softmax or random, got {kind!r}")
    if uniform_B is None:
        raise ValueError(f"selection by {kind} needs uniform numbers, one a state")
    weights_BN = torch.softmax((q_BN if kind == "softmax" else torch.zeros_like(q_BN)) / temperature, 1)
    below_BN = weights_BN.cumsum(1) <= uniform_B.unsqueeze(1)
    return below_BN.sum(1).clamp(max=q_BN.shape[1] - 1)


@torch.no_grad()
def average_into(target: list[Tensor], source: list[Tensor], rate: float) -> None:
    """Move averaged parameters towards the trained ones, in place: p <- (1 - tau) p + tau q.

    Args:
        target: Averaged parameters.
        source: Trained parameters, same shapes.
        rate: tau in [0, 1].

    Raises:
        ValueError: The two are not alike.
    """
    if [one.shape for one in target] != [one.shape for one in source]:
        raise ValueError("average_into needs parameters of the same shapes in the same order")
    torch._foreach_lerp_(target, source, rate)
