"""Losses by hand, their limits, and that a step does not depend on how it was cut into pieces."""

from __future__ import annotations

import math

import pytest
import torch

from vgf_llm.training.distillation.losses import dpo, group_weights, kl_anchor, weighted_nll

LOGPS = torch.tensor([[-1.0, -2.0, -9.0], [-3.0, -1.0, -2.0]])
MASK = torch.tensor([[True, True, False], [True, True, True]])


def test_weighted_nll_by_hand():
    """w = (3, 1): total 3 (1 + 2) + 1 (3 + 1 + 2) = 15; tokens 3 * 2 + 1 * 3 = 9."""
    loss, metrics = weighted_nll(LOGPS, MASK, torch.tensor([3.0, 1.0]))
    assert loss.item() == pytest.approx(15 / 9)
    assert metrics["policy_nll"].item() == pytest.approx(15 / 9)


def test_the_parts_of_a_step_add_up_to_the_step():
    weights = torch.tensor([0.3, 0.7])
    count = (weights.unsqueeze(1) * MASK).sum()
    parts = [weighted_nll(LOGPS[i : i + 1], MASK[i : i + 1], weights[i : i + 1], count)[0] for i in range(2)]
    assert sum(parts).item() == pytest.approx(weighted_nll(LOGPS, MASK, weights)[0].item())
    reference = LOGPS - 0.5
    whole = kl_anchor(LOGPS, reference, MASK)[0]
    parts = [kl_anchor(LOGPS[i : i + 1], reference[i : i + 1], MASK[i : i + 1], 5)[0] for i in range(2)]
    assert sum(parts).item() == pytest.approx(whole.item())


def test_rows_without_weight_or_tokens_give_nothing_and_no_nan():
    logps = LOGPS.clone().requires_grad_()
    loss, _ = weighted_nll(logps, torch.zeros_like(MASK), torch.tensor([0.0, 1.0]))
    loss.backward()
    assert loss.item() == 0
    assert logps.grad.abs().sum() == 0


def test_group_weights_are_a_softmax_of_those_that_are_kept():
    """exp(1 / 0.5) : exp(0) = 7.389 : 1; the third is not kept, the fourth counts as minus infinity."""
    weights = group_weights(torch.tensor([[1.0, 0.0, -1.0, -torch.inf]]), 0.5, kept=2)
    share = math.exp(2) / (math.exp(2) + 1)
    torch.testing.assert_close(weights, torch.tensor([[share, 1 - share, 0.0, 0.0]]))
    assert group_weights(torch.zeros(1, 4), 1.0).tolist() == [[0.25] * 4]


def test_dpo_by_hand():
    """beta 0.5, chosen -1 against -2 under the reference, rejected -3 against -3: margin 0.5."""
    one = [torch.tensor([value]) for value in (-1.0, -3.0, -2.0, -3.0)]
    loss, metrics = dpo(*one, beta=0.5)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-0.5)))
    assert metrics["dpo_margin"].item() == pytest.approx(0.5)
    assert metrics["dpo_accuracy"].item() == 1


def test_a_tie_does_not_count():
    values = [torch.tensor([a, b]) for a, b in ((-1.0, -5.0), (-3.0, -1.0), (-2.0, 0.0), (-3.0, 0.0))]
    loss, metrics = dpo(*values, beta=0.5, weights_B=torch.tensor([1.0, 0.0]))
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-0.5)))
    assert metrics["dpo_accuracy"].item() == 1
    assert dpo(*values, beta=0.5, weights_B=torch.zeros(2))[0].item() == 0


def test_the_anchor_is_zero_at_the_reference_and_k3_elsewhere():
    """d = log p - log pi = 0.5 at one token of two: (e^0.5 - 0.5 - 1) / 2."""
    policy = torch.tensor([[-1.0, -2.0]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    assert kl_anchor(policy, policy, mask)[0].item() == 0
    loss = kl_anchor(policy, torch.tensor([[-0.5, -2.0]]), mask)[0]
    assert loss.item() == pytest.approx((math.exp(0.5) - 1.5) / 2)
