"""Distances by hand, against slow references, and the paper's bound on a grid of budgets."""

import itertools
import math

import pytest
import torch

from vgf_llm.flow.budget import TransportBudget
from vgf_llm.flow.distances import (
    displacement_in_token_units,
    mmd2,
    mmd2_bound,
    nearest_token_distances,
    wasserstein2,
)
from vgf_llm.flow.trajectory import autograd_value, transport

torch.set_num_threads(1)


def test_mmd2_by_hand():
    """x = {0, 2}, y = {1}, sigma = 1: (2 + 2 e^-2)/4 + 1 - 2 e^-0.5 = 0.5 + 0.0676676 + 1 - 1.2130613 = 0.3546063."""
    x, y = torch.tensor([[0.0], [2.0]], dtype=torch.float64), torch.tensor([[1.0]], dtype=torch.float64)
    assert mmd2(x, y, 1.0).item() == pytest.approx(0.3546063, abs=1e-7)


def test_mmd2_is_zero_for_the_same_cloud_and_batches():
    torch.manual_seed(0)
    x, y = torch.randn(3, 5, 2), torch.randn(3, 4, 2)
    assert torch.allclose(mmd2(x, x[:, [2, 0, 1, 4, 3]], 0.7), torch.zeros(3), atol=1e-6)
    assert torch.allclose(mmd2(x, y, 0.7), torch.stack([mmd2(x[b], y[b], 0.7) for b in range(3)]))


def test_wasserstein2_by_hand():
    """x = {(0,0), (1,0)}, y = {(0,3), (1,4)}: straight costs 9 + 16 = 25, crossed 17 + 10 = 27; sqrt(25 / 2)."""
    x, y = torch.tensor([[0.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 3.0], [1.0, 4.0]])
    assert wasserstein2(x, y) == pytest.approx(math.sqrt(12.5))
    assert wasserstein2(torch.zeros(1, 1), torch.tensor([[1.0], [3.0]])) == pytest.approx(math.sqrt(5))
    assert wasserstein2(x, x.flip(0)) == 0.0


def test_wasserstein2_in_one_dimension_is_the_sorted_distance():
    torch.manual_seed(0)
    x, y = torch.randn(40, 1), 2 * torch.randn(40, 1) + 1
    expected = (x.sort(0).values - y.sort(0).values).double().square().mean().sqrt().item()
    assert wasserstein2(x, y) == pytest.approx(expected, rel=1e-6)


def test_displacement_in_token_units_by_hand():
    """|(3, 4)| = 5; over 2 it is 2.5; with a distance a token each row has its own."""
    delta = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    assert displacement_in_token_units(delta, 2.0).tolist() == [2.5, 0.5]
    assert displacement_in_token_units(delta, torch.tensor([10.0, 0.5])).tolist() == [0.5, 2.0]


@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nearest_token_distances_against_all_pairs(chunk, dtype):
    torch.manual_seed(0)
    table = torch.randn(11, 4).to(dtype)
    table[7] = table[3]
    distances = torch.cdist(table.double(), table.double()).fill_diagonal_(math.inf).amin(1)
    assert torch.allclose(nearest_token_distances(table, chunk).double(), distances, atol=1e-5)
    some = torch.tensor([9, 3, 9])
    assert torch.allclose(nearest_token_distances(table, chunk, rows=some).double(), distances[some], atol=1e-5)


def test_a_table_of_one_row_is_refused():
    with pytest.raises(ValueError, match="at least 2 rows .* got 1"):
        nearest_token_distances(torch.zeros(1, 4))


def test_mmd2_bound_by_hand():
    """eps 0.1, L 2, sigma 1, c 3, alpha 2: 0.4 e^-0.5 (1.5 + e^-0.5) = 0.2426123 * 2.1065307 = 0.5110702."""
    assert mmd2_bound(0.1, 2, 1.0, 3.0, 2.0) == pytest.approx(0.5110702, abs=1e-7)
    assert mmd2_bound(0.1, 0, 1.0, 3.0, 2.0) == 0


def test_the_papers_bound_holds_on_a_grid_of_budgets():
    """R(x) = -c sqrt(1 + |x - m|^2) has |grad R| < c everywhere; MMD^2 <= 2 on top, so only bounds below 2 say much."""
    torch.manual_seed(0)
    start = torch.randn(1, 24, 2, dtype=torch.float64)
    centre = torch.tensor([3.0, -1.0], dtype=torch.float64)
    said_something = 0
    grid = itertools.product([0.01, 0.1, 0.5], [1, 3, 10], [0.5, 1.0, 2.0], [0.3, 1.0, 5.0], [0.5, 2.0])
    for eps, steps, sigma, alpha, c in grid:

        def reward(x, c=c):
            return -c * (1 + (x - centre).square().sum(-1)).sqrt()

        budget = TransportBudget(steps=steps, step_size=eps, temperature=alpha, kernel="rbf", bandwidth=sigma)
        trajectory = transport(start, autograd_value(reward), budget)
        assert trajectory.gradient_norm_LBN.max() <= c
        measured = mmd2(start[0], trajectory.final[0], sigma).item()
        bound = mmd2_bound(eps, steps, sigma, c, alpha)
        assert 0 < measured <= bound, (eps, steps, sigma, alpha, c)
        said_something += bound < 2
    assert said_something > 50
