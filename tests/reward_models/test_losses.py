"""Bradley-Terry by hand, its limits, and what the module imports."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

from reward_models.losses import bradley_terry

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


def test_losses_import_torch_only():
    code = (
        "import sys; import reward_models.losses; "
        "print([m for m in ('transformers', 'peft', 'trl', 'datasets', 'rich', 'jsonargparse') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
