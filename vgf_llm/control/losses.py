"""Losses of the control half: tensors in, ``(loss, metrics)`` out. Torch only.

The critic losses take the residual target - Q of every critic and add the critics' means, so that each critic has the
gradient that it would have alone. The targets are the caller's and carry no gradient (targets.py). Tensors of other
shapes than their names say raise ValueError.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vgf_llm.flow.shapes import check_shapes

Metrics = dict[str, Tensor]


def flow_matching(velocity_BA: Tensor, noise_BA: Tensor, actions_BA: Tensor) -> tuple[Tensor, Metrics]:
    """Compute the conditional flow-matching loss of a clone (Lipman et al. 2023, linear path).

    L = mean |v(s, x_t, t) - (a - x_0)|^2 / A,        x_t = (1 - t) x_0 + t a

    Args:
        velocity_BA: v, the network's velocity at x_t (`interpolate`).
        noise_BA: x_0 ~ N(0, I), the start of the path.
        actions_BA: a, its end, in [-1, 1].

    Returns:
        The scalar loss, and ``clone_loss``.
    """
    check_shapes(velocity_BA=velocity_BA, noise_BA=noise_BA, actions_BA=actions_BA)
    loss = (velocity_BA - (actions_BA - noise_BA)).square().mean()
    return loss, {"clone_loss": loss.detach()}


def interpolate(noise_BA: Tensor, actions_BA: Tensor, times_B1: Tensor) -> Tensor:
    """Return x_t = (1 - t) x_0 + t a, the point of the linear path at time t in [0, 1]."""
    check_shapes(noise_BA=noise_BA, actions_BA=actions_BA)
    if times_B1.shape != (len(actions_BA), 1):
        raise ValueError(f"times_B1 must have shape [{len(actions_BA)}, 1], got {list(times_B1.shape)}")
    return (1 - times_B1) * noise_BA + times_B1 * actions_BA


def gaussian_nll(mean_BA: Tensor, log_std_A: Tensor, actions_BA: Tensor) -> tuple[Tensor, Metrics]:
    """Compute the negative log-likelihood of actions under a diagonal Gaussian, in nats an action.

    L = mean_b sum_a [ (a - mu)^2 / (2 sigma^2) + log sigma + log(2 pi) / 2 ]

    Args:
        mean_BA: mu(s).
        log_std_A: log sigma, one for all states.
        actions_BA: Actions of the data.

    Returns:
        The scalar loss, and ``clone_loss``.
    """
    check_shapes(mean_BA=mean_BA, log_std_A=log_std_A, actions_BA=actions_BA)
    standard_BA = (actions_BA - mean_BA) * torch.exp(-log_std_A)
    loss = (0.5 * standard_BA.square() + log_std_A + 0.5 * math.log(2 * math.pi)).sum(1).mean()
    return loss, {"clone_loss": loss.detach()}


def td(q_CB: Tensor, target_B: Tensor) -> tuple[Tensor, Metrics]:
    """Compute the squared temporal-difference error: sum_c mean_b (y_b - Q_c)^2.

    Args:
        q_CB: Values of C critics at the data's actions.
        target_B: y, without gradient.

    Returns:
        The scalar loss, and ``critic_loss``, ``q_mean`` and ``td_abs``: the mean |y - Q| over critics.
    """
    check_shapes(q_CB=q_CB, target_B=target_B)
    return _critic_loss((target_B - q_CB).square(), q_CB, target_B)


def expectile(q_CB: Tensor, target_B: Tensor, level: float) -> tuple[Tensor, Metrics]:
    """Compute the expectile loss of implicit Q-learning (Kostrikov et al. 2022), on Q itself.

    L = sum_c mean_b |level - 1(u < 0)| u^2,        u = y_b - Q_c

    Args:
        q_CB: Values of C critics at the data's actions.
        target_B: y, without gradient.
        level: In (0, 1); 0.5 is half of `td`, above it over-estimates weigh less.

    Returns:
        The scalar loss, and the metrics of `td`.
    """
    check_shapes(q_CB=q_CB, target_B=target_B)
    residual_CB = target_B - q_CB
    weight_CB = torch.where(residual_CB < 0, 1 - level, level)
    return _critic_loss(weight_CB * residual_CB.square(), q_CB, target_B)


def sql(q_CB: Tensor, target_B: Tensor, alpha: float) -> tuple[Tensor, Metrics]:
    """Compute the loss of sparse Q-learning (Xu et al. 2023), on Q itself.

    L = sum_c mean_b [ alpha max(1 + u / (2 alpha), 0)^2 - u ],        u = y_b - Q_c

    Its curvature is that of u^2 / (4 alpha) above u = -2 alpha, and it is linear below: targets far under Q pull with
    a constant force.

    Args:
        q_CB: Values of C critics at the data's actions.
        target_B: y, without gradient.
        alpha: Above 0, in units of the value.

    Returns:
        The scalar loss, and the metrics of `td`.
    """
    check_shapes(q_CB=q_CB, target_B=target_B)
    residual_CB = target_B - q_CB
    hinge_CB = (1 + residual_CB / (2 * alpha)).clamp(min=0)
    return _critic_loss(alpha * hinge_CB.square() - residual_CB, q_CB, target_B)


def gradient_matching(predicted_BA: Tensor, gradient_BA: Tensor) -> tuple[Tensor, Metrics]:
    """Compute the loss of the amortised variant: f(s, a) regressed on the critic's gradient.

    L = mean |f(s, a) - grad_a Q(s, a)|^2 / A,        at the data's states and actions

    Args:
        predicted_BA: f(s, a).
        gradient_BA: grad_a of the mean critic, without gradient.

    Returns:
        The scalar loss, and ``gradient_loss`` and ``gradient_cosine``, the mean cosine of the two directions.
    """
    check_shapes(predicted_BA=predicted_BA, gradient_BA=gradient_BA)
    loss = (predicted_BA - gradient_BA).square().mean()
    cosine = torch.cosine_similarity(predicted_BA.detach(), gradient_BA, dim=1).mean()
    return loss, {"gradient_loss": loss.detach(), "gradient_cosine": cosine}


def _critic_loss(terms_CB: Tensor, q_CB: Tensor, target_B: Tensor) -> tuple[Tensor, Metrics]:
    loss = terms_CB.mean(1).sum()
    with torch.no_grad():
        metrics = {"critic_loss": loss.detach(), "q_mean": q_CB.mean(), "td_abs": (target_B - q_CB).abs().mean()}
    return loss, metrics
