"""TD(lambda) targets and expectile regression by hand, at their limits, and against slow definitions."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

from reward_models.value_losses import td_lambda_targets, value_loss

VALUES = torch.tensor([[0.5, 1.0, 2.0, 9.0], [0.5, 9.0, 7.0, 7.0]])
REWARDS = torch.tensor([4.0, -1.0])
MASK = torch.tensor([[True, True, True], [True, False, False]])


def test_targets_by_hand():
    """lam 0.5, r = 4, V = (., 1, 2, .): G_3 = 4, G_2 = (4 + 4) / 2 = 4, G_1 = (2 + 4) / 2 = 3, G_0 = (1 + 3) / 2 = 2.

    One token, r = -1: G_1 = -1 and G_0 = -1, for the next value is the reward; then padding.
    """
    targets = td_lambda_targets(VALUES, REWARDS, MASK, 0.5)
    assert targets.tolist() == [[2.0, 3.0, 4.0, 4.0], [-1.0, -1.0, 0.0, 0.0]]


def test_limits_of_lambda():
    """lam 0: the next value, and the reward before the last token; lam 1: the reward at every prefix."""
    assert td_lambda_targets(VALUES, REWARDS, MASK, 0.0).tolist() == [[1.0, 2.0, 4.0, 4.0], [-1.0, -1.0, 0.0, 0.0]]
    assert td_lambda_targets(VALUES, REWARDS, MASK, 1.0).tolist() == [[4.0, 4.0, 4.0, 4.0], [-1.0, -1.0, 0.0, 0.0]]


def test_the_prompts_target_can_be_given_and_reaches_no_other_column():
    targets = td_lambda_targets(VALUES, REWARDS, MASK, 0.5, torch.tensor([7.0, 8.0]))
    assert targets.tolist() == [[7.0, 3.0, 4.0, 4.0], [8.0, -1.0, 0.0, 0.0]]


def slow_return(values, reward, length, t, lam):
    """The forward view: (1 - lam) sum_n lam^(n-1) V_{t+n} while t + n < L, and the reward with what weight is left."""
    steps = range(1, length - t)
    bootstrapped = sum((1 - lam) * lam ** (n - 1) * values[t + n] for n in steps)
    return bootstrapped + lam ** max(length - t - 1, 0) * reward


def test_targets_agree_with_the_forward_view_on_random_rows():
    generator = torch.Generator().manual_seed(0)
    values, rewards = torch.randn(20, 8, generator=generator), torch.randn(20, generator=generator)
    lengths = torch.randint(0, 8, (20,), generator=generator)
    mask = torch.arange(7) < lengths[:, None]
    padded = torch.where(torch.arange(8) <= lengths[:, None], values, torch.nan)
    for lam in (0.0, 0.3, 0.95, 1.0):
        targets = td_lambda_targets(padded, rewards, mask, lam)
        for row, length in enumerate(lengths.tolist()):
            for t in range(8):
                inside = t <= length and length > 0
                expected = slow_return(values[row], rewards[row], length, t, lam) if inside else 0.0
                assert targets[row, t].item() == pytest.approx(float(expected), abs=1e-5), (lam, row, t)


def test_targets_have_no_graph_and_an_empty_row_has_no_target():
    values = VALUES.clone().requires_grad_(True)
    mask = MASK.clone()
    mask[1] = False
    targets = td_lambda_targets(values, REWARDS, mask, 0.5, torch.tensor([7.0, 8.0]))
    assert not targets.requires_grad and targets[1].tolist() == [0.0] * 4


def test_expectile_loss_by_hand():
    """Errors 1, -2, 0 (target - value), tau 0.75: 2 * (0.75 * 1 + 0.25 * 4 + 0) / 3 = 3.5 / 3."""
    values, targets = torch.tensor([[0.0, 2.0], [5.0, 9.0]]), torch.tensor([[1.0, 0.0], [5.0, -9.0]])
    mask = torch.tensor([[True, True], [True, False]])
    loss, metrics = value_loss(values, targets, mask, expectile=0.75)
    assert loss.item() == pytest.approx(3.5 / 3)
    assert metrics["value_error"].item() == pytest.approx(math.sqrt(4 / 2))  # last entries: errors -2 and 0
    assert metrics["explained_variance"].item() == pytest.approx(1 - 1 / 6.25)  # var of (-2, 0) and of (0, 5)
    assert metrics["value_mean"].item() == pytest.approx(7 / 3)


def test_half_is_the_mean_squared_error_and_a_global_count_divides():
    generator = torch.Generator().manual_seed(1)
    values, targets = torch.randn(3, 4, generator=generator), torch.randn(3, 4, generator=generator)
    mask = torch.ones(3, 4, dtype=torch.bool)
    loss, _ = value_loss(values, targets, mask)
    assert loss.item() == pytest.approx(torch.nn.functional.mse_loss(values, targets).item())
    parts = [value_loss(values[i : i + 1], targets[i : i + 1], mask[i : i + 1], num_items=12)[0] for i in range(3)]
    assert sum(parts).item() == pytest.approx(loss.item())


def test_its_minimum_over_a_constant_is_the_expectile():
    """Targets 0 and 1: the tau-expectile e solves tau (1 - e) = (1 - tau) e, so e = tau."""
    value = torch.tensor([[0.8, 0.8]], requires_grad=True)
    loss, _ = value_loss(value, torch.tensor([[0.0, 1.0]]), torch.ones(1, 2), expectile=0.8)
    loss.backward()
    assert value.grad.sum().item() == pytest.approx(0.0, abs=1e-6)


def test_nothing_to_learn_from_costs_nothing_and_padding_gets_no_gradient():
    values = torch.tensor([[1.0, torch.inf], [2.0, 3.0]], requires_grad=True)
    loss, metrics = value_loss(values, torch.zeros(2, 2), torch.zeros(2, 2))
    loss.backward()
    assert loss.item() == 0.0 and values.grad.abs().max() == 0
    assert all(metric.isnan() for metric in metrics.values())
    mask = torch.tensor([[True, False], [True, True]])
    loss, metrics = value_loss(values, torch.zeros(2, 2), mask)
    values.grad = None
    loss.backward()
    assert values.grad[0, 1] == 0 and (values.grad[mask] != 0).all()
    assert metrics["explained_variance"].isnan() and not metrics["value_error"].requires_grad


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: td_lambda_targets(VALUES, REWARDS, MASK, 1.5), r"lam in \[0, 1\], got 1.5"),
        (lambda: td_lambda_targets(VALUES[:, 1:], REWARDS, MASK, 0.5), r"got \(2, 3\), \(2,\) and \(2, 3\)"),
        (lambda: value_loss(VALUES, VALUES, VALUES, expectile=1.0), r"expectile in \(0, 1\), got 1.0"),
        (lambda: value_loss(VALUES, VALUES, MASK), r"got \(2, 4\), \(2, 4\) and \(2, 3\)"),
    ],
)
def test_faults_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_module_imports_torch_only():
    code = (
        "import sys, reward_models.value_losses\n"
        "assert not {'transformers', 'accelerate', 'peft'} & set(sys.modules), 'more than torch'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
