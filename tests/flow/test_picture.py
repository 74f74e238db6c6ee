"""The numbers behind the two-dimensional picture: what best-of-N cannot reach and transport can."""

import pytest
import torch

from benchmarks.picture import MODE, SPREAD, draw, outcomes, reward

torch.set_num_threads(1)


@pytest.mark.parametrize("seed", [0, 1])
def test_best_of_n_stays_in_the_reference_and_transport_reaches_the_mode(seed):
    """The mode lies 7.1 reference deviations out; a sample beyond 4.5 has probability 64 exp(-4.5^2 / 2) = 0.003."""
    assert torch.tensor(MODE).norm() / SPREAD > 7
    none, small, large = (outcome.figures() for outcome in outcomes(seed))
    assert none["selected_reference_deviations"] < 4.5 and none["selected_distance_to_mode"] > 2
    assert none["mmd2_to_reference"] == none["wasserstein2_to_reference"] == 0
    assert large["selected_distance_to_mode"] < 0.25 and large["selected_reward"] > -0.05
    for smaller, larger in ((none, small), (small, large)):
        for key in ("mean_reward", "selected_reward", "mmd2_to_reference", "wasserstein2_to_reference"):
            assert larger[key] > smaller[key], key
        assert larger["selected_distance_to_mode"] < smaller["selected_distance_to_mode"]


def test_the_reward_is_highest_at_its_mode():
    grid = torch.cartesian_prod(torch.linspace(-6, 6, 121), torch.linspace(-6, 6, 121))
    assert reward(torch.tensor(MODE)) == 0
    assert (grid[reward(grid).argmax()] - torch.tensor(MODE)).norm() < 1e-5


def test_the_figure_is_written(tmp_path):
    pytest.importorskip("matplotlib")
    draw(outcomes(), tmp_path / "figures" / "picture.png")
    assert (tmp_path / "figures" / "picture.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
