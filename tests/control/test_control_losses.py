"""The control half's losses, targets and selection by hand."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vgf_llm.control import losses, targets

ROOT = Path(__file__).parents[2]


def test_td_by_hand():
    """Targets (1, 3); critics (0, 1) and (2, 3): errors (1, 2), (-1, 0); means of squares 2.5 and 0.5, sum 3."""
    q_CB = torch.tensor([[0.0, 1.0], [2.0, 3.0]], requires_grad=True)
    loss, metrics = losses.td(q_CB, torch.tensor([1.0, 3.0]))
    assert loss.item() == pytest.approx(3.0)
    assert metrics["td_abs"].item() == pytest.approx(1.0)
    assert metrics["q_mean"].item() == pytest.approx(1.5)
    loss.backward()
    assert q_CB.grad.tolist() == [[-1.0, -2.0], [1.0, 0.0]]  # -2 (y - Q) / B


def test_expectile_by_hand_and_at_one_half():
    """Level 0.9, errors (1, -2): 0.9 * 1 and 0.1 * 4, mean 0.65. At 0.5 it is half of td."""
    q_CB, target_B = torch.tensor([[0.0, 2.0]]), torch.tensor([1.0, 0.0])
    assert losses.expectile(q_CB, target_B, 0.9)[0].item() == pytest.approx(0.65)
    assert losses.expectile(q_CB, target_B, 0.5)[0].item() == pytest.approx(losses.td(q_CB, target_B)[0].item() / 2)


def test_sql_by_hand():
    """Alpha 0.5. u = 1: 0.5 (1 + 1)^2 - 1 = 1. u = 0: 0.5. u = -2: hinge max(1 - 2, 0) = 0, so 2. Mean 3.5 / 3.

    Slopes in u: 1 at u = 1 (u / (2 alpha)), 0 at u = 0, -1 below -2 alpha.
    """
    q_CB = torch.zeros(1, 3, requires_grad=True)
    loss, _ = losses.sql(q_CB, torch.tensor([1.0, 0.0, -2.0]), 0.5)
    assert loss.item() == pytest.approx(3.5 / 3)
    loss.backward()
    assert (-3 * q_CB.grad[0]).tolist() == pytest.approx([1.0, 0.0, -1.0])


def test_flow_matching_by_hand():
    """x_0 = (0, 1), a = (1, 1), t = 1/4: x_t = (1/4, 1); velocity (1, 0) is right, (0, 0) costs 1 / 2."""
    noise_BA, actions_BA = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 1.0]])
    assert losses.interpolate(noise_BA, actions_BA, torch.tensor([[0.25]])).tolist() == [[0.25, 1.0]]
    assert losses.flow_matching(torch.tensor([[1.0, 0.0]]), noise_BA, actions_BA)[0].item() == 0
    assert losses.flow_matching(torch.zeros(1, 2), noise_BA, actions_BA)[0].item() == pytest.approx(0.5)


def test_gaussian_likelihood_agrees_with_torch():
    torch.manual_seed(0)
    mean_BA, log_std_A, actions_BA = torch.randn(5, 3), torch.tensor([-1.0, 0.0, 0.5]), torch.randn(5, 3)
    expected = -torch.distributions.Normal(mean_BA, log_std_A.exp()).log_prob(actions_BA).sum(1).mean()
    assert losses.gaussian_nll(mean_BA, log_std_A, actions_BA)[0].item() == pytest.approx(expected.item(), rel=1e-6)


def test_gradient_matching_by_hand():
    """(1, 1) against (1, 0): (0 + 1) / 2; the cosine is 1 / sqrt 2."""
    loss, metrics = losses.gradient_matching(torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 0.0]]))
    assert loss.item() == pytest.approx(0.5)
    assert metrics["gradient_cosine"].item() == pytest.approx(1 / math.sqrt(2))


def test_target_over_particles_by_hand():
    """Two states, three particles, gamma 0.5. Critic 1: (1, 2, 3), (4, 4, 4); critic 2: (3, 0, 3), (6, 2, 4).

    min: (1, 0, 3), (4, 2, 4), means 4/3 and 10/3; mean: (2, 1, 3), (5, 3, 4), means 2 and 4. Rewards -1 and 2; the
    second state's task has ended.
    """
    q_CBN = torch.tensor([[[1.0, 2.0, 3.0], [4.0, 4.0, 4.0]], [[3.0, 0.0, 3.0], [6.0, 2.0, 4.0]]])
    rewards_B, masks_B = torch.tensor([-1.0, 2.0]), torch.tensor([1.0, 0.0])

    def target(join, pool):
        return targets.td_target(rewards_B, masks_B, targets.aggregate(q_CBN, join), 0.5, pool).tolist()

    assert target("min", "mean") == pytest.approx([-1 + 0.5 * 4 / 3, 2.0])
    assert target("mean", "mean") == pytest.approx([0.0, 2.0])
    assert target("min", "max") == pytest.approx([0.5, 2.0])
    assert target("mean", "max") == pytest.approx([0.5, 2.0])


def test_selection_by_hand():
    """Softmax of (0, log 2, 0) at temperature 1: (1/4, 1/2, 1/4); random: thirds."""
    q_BN = torch.tensor([[0.0, math.log(2), 0.0]]).repeat(4, 1)
    uniform_B = torch.tensor([0.2, 0.3, 0.74, 0.76])
    assert targets.select(q_BN, "max").tolist() == [1, 1, 1, 1]
    assert targets.select(q_BN, "softmax", uniform_B).tolist() == [0, 1, 1, 2]
    assert targets.select(q_BN, "random", torch.tensor([0.3, 0.34, 0.6, 0.999999])).tolist() == [0, 1, 1, 2]
    assert targets.select(q_BN, "softmax", uniform_B, temperature=1e-4).tolist() == [1, 1, 1, 1]


def test_average_by_hand():
    target, source = [torch.tensor([1.0])], [torch.tensor([3.0])]
    targets.average_into(target, source, 0.25)
    assert target[0].item() == pytest.approx(1.5)


def test_what_is_not_known_is_refused():
    q_BN = torch.zeros(1, 2)
    for call in (
        lambda: targets.aggregate(q_BN, "max"),
        lambda: targets.td_target(torch.zeros(1), torch.ones(1), q_BN, 0.9, "min"),
        lambda: targets.select(q_BN, "best"),
        lambda: targets.select(q_BN, "random"),
    ):
        with pytest.raises(ValueError):
            call()


def test_the_formulas_import_torch_only():
    code = (
        "import sys\n"
        "for name in ('numpy.lib.npyio', 'transformers', 'gymnasium', 'h5py', 'rich', 'jsonargparse', 'safetensors'):\n"
        "    sys.modules.pop(name, None)\n"
        "import vgf_llm.control.losses, vgf_llm.control.targets, vgf_llm.control.networks, vgf_llm.control.agent\n"
        "heavy = {'transformers', 'gymnasium', 'h5py', 'rich', 'jsonargparse', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
