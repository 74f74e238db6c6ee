"""Every loss and target refuses shapes that would broadcast, naming the argument, the shape wanted and the one seen."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import zeros

from reward_models.losses import bradley_terry
from reward_models.value_losses import secant_loss, td_lambda_targets, value_loss
from vgf_llm.control import losses, targets
from vgf_llm.flow.budget import TransportBudget
from vgf_llm.flow.distances import displacement_in_token_units, mmd2, nearest_token_distances, wasserstein2
from vgf_llm.flow.kernels import median_bandwidth, stein_direction
from vgf_llm.flow.projections import clip_to_ball
from vgf_llm.flow.shapes import check_same_shape, check_shapes, dimensions
from vgf_llm.flow.steps import adam_step
from vgf_llm.flow.trajectory import transport
from vgf_llm.training.distillation.losses import dpo, group_weights, kl_anchor, weighted_nll

MASK = torch.ones(3, 5, dtype=torch.bool)

FAULTS: dict[str, tuple[Callable[[], Any], str]] = {
    "dpo: a column": (
        lambda: dpo(zeros(4), zeros(4, 1), zeros(4), zeros(4), 0.1),
        "rejected_policy_logps_B must have shape [B=4], got [4, 1]",
    ),
    "dpo: one weight": (
        lambda: dpo(zeros(4), zeros(4), zeros(4), zeros(4), 0.1, weights_B=zeros(1)),
        "weights_B must have shape [B=4], got [1]",
    ),
    "weighted_nll: one weight for three rows": (
        lambda: weighted_nll(zeros(3, 5), MASK, zeros(1)),
        "weights_R must have shape [R=3], got [1]",
    ),
    "weighted_nll: a count that is no scalar": (
        lambda: weighted_nll(zeros(3, 5), MASK, zeros(3), zeros(1)),
        "num_items must have shape [], got [1]",
    ),
    "kl_anchor": (
        lambda: kl_anchor(zeros(3, 5), zeros(3, 1), MASK),
        "reference_logps_RT must have shape [R=3, T=5], got [3, 1]",
    ),
    "group_weights": (lambda: group_weights(zeros(3), 1.0), "rewards_BM must have shape [B, M], got [3]"),
    "flow_matching": (
        lambda: losses.flow_matching(zeros(4, 3), zeros(4, 3), zeros(4, 1)),
        "actions_BA must have shape [B=4, A=3], got [4, 1]",
    ),
    "interpolate": (
        lambda: losses.interpolate(zeros(4, 3), zeros(4, 3), zeros(4)),
        "times_B1 must have shape [4, 1], got [4]",
    ),
    "gaussian_nll": (
        lambda: losses.gaussian_nll(zeros(4, 3), zeros(1), zeros(4, 3)),
        "log_std_A must have shape [A=3], got [1]",
    ),
    "td": (lambda: losses.td(zeros(2, 4), zeros(1)), "target_B must have shape [B=4], got [1]"),
    "expectile": (
        lambda: losses.expectile(zeros(2, 4), zeros(4, 1), 0.9),
        "target_B must have shape [B=4], got [4, 1]",
    ),
    "sql": (lambda: losses.sql(zeros(4), zeros(4), 1.0), "q_CB must have shape [C, B], got [4]"),
    "gradient_matching": (
        lambda: losses.gradient_matching(zeros(4, 3), zeros(4, 1, 3)),
        "gradient_BA must have shape [B=4, A=3], got [4, 1, 3]",
    ),
    "aggregate": (lambda: targets.aggregate(zeros(2, 4), "min"), "q_CBN must have shape [C, B, N], got [2, 4]"),
    "td_target": (
        lambda: targets.td_target(zeros(4), zeros(1), zeros(4, 8), 0.9, "mean"),
        "masks_B must have shape [B=4], got [1]",
    ),
    "select": (
        lambda: targets.select(zeros(4, 8), "random", zeros(1)),
        "uniform_B must have shape [B=4], got [1]",
    ),
    "average_into": (
        lambda: targets.average_into([zeros(3)], [zeros(1)], 0.5),
        "parameters of the same shapes in the same order",
    ),
    "bradley_terry": (
        lambda: bradley_terry(zeros(4), zeros(4), margin_B=zeros(1)),
        "margin_B must have shape [B=4], got [1]",
    ),
    "td_lambda_targets": (
        lambda: td_lambda_targets(zeros(3, 6), zeros(3), MASK, 0.5, zeros(1)),
        "prompt_targets_R must have shape [R=3], got [1]",
    ),
    "value_loss": (
        lambda: value_loss(zeros(3, 5), zeros(3, 5), MASK, num_items=zeros(1)),
        "num_items must have shape [], got [1]",
    ),
    "secant_loss": (
        lambda: secant_loss(zeros(3, 5, 2), zeros(3, 5, 2), zeros(3, 1), zeros(3, 5), MASK),
        "targets_RS must have shape [R=3, S=5], got [3, 1]",
    ),
    "mmd2": (lambda: mmd2(zeros(2, 4, 3), zeros(4, 3), 1.0), "got [2, 4, 3] and [4, 3]"),
    "wasserstein2": (lambda: wasserstein2(zeros(4, 3), zeros(4, 1)), "y_MF must have shape [M=4, F=3], got [4, 1]"),
    "displacement_in_token_units": (
        lambda: displacement_in_token_units(zeros(2, 4, 3), zeros(4)),
        "one per token [2, 4], got [4]",
    ),
    "nearest_token_distances": (
        lambda: nearest_token_distances(zeros(2, 4, 3)),
        "table_VD must have shape [V, D], got [2, 4, 3]",
    ),
    "median_bandwidth": (
        lambda: median_bandwidth(zeros(2, 4, 4), torch.ones(1, 4, dtype=torch.bool)),
        "present_BN must have shape [B=2, N=4], got [1, 4]",
    ),
    "stein_direction": (
        lambda: stein_direction(zeros(2, 4, 3), zeros(2, 4, 1), 1.0),
        "gradients must have the shape of particles, [2, 4, 3], got [2, 4, 1]",
    ),
    "stein_direction: mask": (
        lambda: stein_direction(zeros(2, 4, 3), zeros(2, 4, 3), 1.0, mask=torch.ones(4, dtype=torch.bool)),
        "mask must have shape [2, 4], got [4]",
    ),
    "clip_to_ball": (
        lambda: clip_to_ball(zeros(1, 4, 3), 1.0)(zeros(2, 4, 3)),
        "particles must have the shape of centre, [1, 4, 3], got [2, 4, 3]",
    ),
    "transport: values": (
        lambda: transport(zeros(2, 4, 3), lambda x: (zeros(2, 1), zeros(2, 4, 3)), TransportBudget()),
        "values_BN must have shape [2, 4], got [2, 1]",
    ),
    "transport: gradients": (
        lambda: transport(zeros(2, 4, 3), lambda x: (zeros(2, 4), zeros(2, 4, 1)), TransportBudget()),
        "gradients must have the shape of the particles, [2, 4, 3], got [2, 4, 1]",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_shape_that_would_broadcast_is_refused_by_name(name: str) -> None:
    call, message = FAULTS[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_adam_refuses_another_shape_than_the_first() -> None:
    step = adam_step(0.1)
    step(zeros(2, 4, 3))
    with pytest.raises(ValueError, match=re.escape("phi must have the shape of first_phi, [2, 4, 3], got [2, 1, 3]")):
        step(zeros(2, 1, 3))


def test_letters_are_read_off_a_name_and_stand_for_one_size() -> None:
    assert dimensions("logps_RT1") == ("R", "T1")
    assert dimensions("q_CBN") == ("C", "B", "N")
    assert dimensions("num_items") == dimensions("loss") == ()
    check_shapes(logps_RT=zeros(3, 5), weights_R=zeros(3), num_items=7.0, margin_R=None)
    check_same_shape(x=zeros(2, 3), y=zeros(2, 3))
