"""Bradley-Terry by hand, of one score and of several objectives, its limits, and what the module imports."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

from reward_models.losses import bradley_terry, count_agreements, objectives_loss

CHOSEN, REJECTED = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])


def test_loss_and_metrics_by_hand():
    """Differences 1 and -2: L = [log(1 + e^-1) + log(1 + e^2)] / 2 = (0.313262 + 2.126928) / 2 = 1.220095."""
    loss, metrics = bradley_terry(CHOSEN, REJECTED)
    assert loss.item() == pytest.approx(1.220095, abs=1e-6)
    assert metrics["accuracy"] == 0.5
    assert metrics["reward_margin"] == -0.5
    assert metrics["reward_mean"] == 0.75
    assert metrics["reward_std"].item() == pytest.approx(math.sqrt(5 / 4 - 0.75**2))


def test_margin_and_centring_by_hand():
    """Margins 1, 0 make the differences 0, -2; sums 1, 2: L = (0.693147 + 2.126928) / 2 + 0.1 * (1 + 4) / 2."""
    loss, _ = bradley_terry(CHOSEN, REJECTED, torch.tensor([1.0, 0.0]), centring=0.1)
    assert loss.item() == pytest.approx(1.4100375 + 0.25, abs=1e-6)


def test_equal_rewards_cost_log_two_and_win_nothing():
    loss, metrics = bradley_terry(torch.zeros(3), torch.zeros(3))
    assert loss.item() == pytest.approx(math.log(2)) and metrics["accuracy"] == 0


def test_gradient_is_minus_the_probability_of_losing():
    """dL/dc = -sigmoid(-(c - r)): at difference 1 it is -0.268941."""
    chosen = torch.tensor([1.0], requires_grad=True)
    bradley_terry(chosen, torch.tensor([0.0]))[0].backward()
    assert chosen.grad.item() == pytest.approx(-0.268941, abs=1e-6)


def test_huge_differences_stay_finite():
    loss, _ = bradley_terry(torch.tensor([-1e4]), torch.tensor([1e4]))
    assert loss.item() == pytest.approx(2e4)


@pytest.mark.parametrize("rejected", [torch.zeros(3), torch.zeros(2, 1)])
def test_shapes_that_do_not_fit_are_refused(rejected):
    with pytest.raises(ValueError, match="two vectors of one size"):
        bradley_terry(torch.zeros(2), rejected)
    with pytest.raises(ValueError, match="two vectors"):
        bradley_terry(torch.zeros(0), torch.zeros(0))


def test_objectives_by_hand():
    """c - r = 1 and -2 on objective 0, 2 and 1 on 1. Stated: d = 2 of (0, 0), -1 of (1, 0), -0.5 of (0, 1).

    Signed differences 1, 2, -2: L = [log(1 + e^-1) + log(1 + e^-2) + log(1 + e^2)] / 3 = (0.313262 + 0.126928 +
    2.126928) / 3. With margins of 0.5 |d|, 1, 0.5 and 0.25, they are 0, 1.5, -2.25: (0.693147 + 0.201413 + 2.350207)
    / 3. The sums c + r are 1, 2 and 4: the penalty's mean square is 7.
    """
    chosen, rejected = torch.tensor([[1.0, 3.0], [0.0, 1.0]]), torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    difference = torch.tensor([[2.0, -0.5], [-1.0, 0.0]])
    loss, metrics = objectives_loss(chosen, rejected, difference)
    assert loss.item() == pytest.approx(2.567118 / 3, abs=1e-6) and metrics["accuracy"].item() == pytest.approx(2 / 3)
    loss, _ = objectives_loss(chosen, rejected, difference, margin_scale=0.5, centring=0.1)
    assert loss.item() == pytest.approx(3.244767 / 3 + 0.7, abs=1e-6)
    agree_K, stated_K = count_agreements(chosen, rejected, difference)
    assert agree_K.tolist() == [2, 0] and stated_K.tolist() == [2, 1]


def test_one_objective_is_bradley_terry_and_equal_scores_agree_with_nothing():
    one = objectives_loss(CHOSEN[:, None], REJECTED[:, None], torch.tensor([[1.0], [0.5]]), 2.0, 0.1)
    plain = bradley_terry(CHOSEN, REJECTED, torch.tensor([2.0, 1.0]), 0.1)
    assert torch.equal(one[0], plain[0]) and all(torch.equal(one[1][name], plain[1][name]) for name in plain[1])
    swapped = objectives_loss(REJECTED[:, None], CHOSEN[:, None], torch.tensor([[-1.0], [-0.5]]), 2.0, 0.1)
    assert torch.equal(swapped[0], plain[0])
    assert count_agreements(torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, 1))[0].tolist() == [0]


def test_what_is_not_stated_has_no_gradient():
    chosen = torch.tensor([[1.0, 3.0]], requires_grad=True)
    objectives_loss(chosen, torch.zeros(1, 2), torch.tensor([[-1.0, 0.0]]), centring=0.1)[0].backward()
    assert chosen.grad[0, 0] > 0 and chosen.grad[0, 1] == 0


def test_objectives_of_other_shapes_or_without_an_opinion_are_refused():
    with pytest.raises(ValueError, match=r"difference_BK must have shape \[B=2, K=3\], got \[2, 1\]"):
        objectives_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2, 1))
    with pytest.raises(ValueError, match=r"rejected_BK must have shape \[B=2, K=3\], got \[2\]"):
        count_agreements(torch.zeros(2, 3), torch.zeros(2), torch.ones(2, 3))
    with pytest.raises(ValueError, match="a difference that is not 0, got none"):
        objectives_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3))


def test_losses_import_torch_only():
    code = (
        "import sys; import reward_models.losses; "
        "print([m for m in ('transformers', 'peft', 'trl', 'datasets', 'rich', 'jsonargparse') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
