"""The three kinds of step by hand."""

import pytest
import torch

from vgf_llm.flow.budget import TransportBudget
from vgf_llm.flow.projections import clip_to_ball, clip_to_box
from vgf_llm.flow.steps import adam_step, make_step, normalised_step


def test_sgd_is_step_size_times_direction():
    step = make_step(TransportBudget(step="sgd", step_size=0.5), length_unit=7.0)
    assert step(torch.tensor([2.0, -4.0])).tolist() == [1.0, -2.0]


def test_adam_by_hand():
    """lr 0.1, directions 3 then -1.

    First step: m_hat = 3, v_hat = 9, so 0.1 * 3 / 3 = 0.1.
    Second: m = .9 * .3 - .1 = .17, m_hat = .17 / .19 = .8947368; v = .999 * .009 + .001 = .009991,
    v_hat = .009991 / .001999 = 4.997999; 0.1 * .8947368 / 2.235621 = 0.0400219.
    """
    step = adam_step(0.1)
    first = step(torch.tensor([3.0], dtype=torch.float64))
    second = step(torch.tensor([-1.0], dtype=torch.float64))
    assert first.item() == pytest.approx(0.1, abs=1e-8)
    assert second.item() == pytest.approx(0.0400219, abs=1e-7)


def test_adam_agrees_with_torch_and_leaves_zero_alone():
    torch.manual_seed(0)
    directions = torch.randn(6, 4, dtype=torch.float64)
    directions[:, 2] = 0
    parameter = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.Adam([parameter], lr=0.3, maximize=True)
    step, moved = adam_step(0.3), torch.zeros(4, dtype=torch.float64)
    for direction in directions:
        parameter.grad = direction.clone()
        optimiser.step()
        moved = moved + step(direction)
    assert torch.allclose(parameter.detach(), moved, atol=1e-12)
    assert moved[2] == 0


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_normalised_step_has_the_asked_length_at_any_scale(scale):
    """(3, 4) / 5 * 2 = (1.2, 1.6); squares of 1e-30 or 1e30 would leave float32's range."""
    moved = normalised_step(scale * torch.tensor([[3.0, 4.0], [0.0, 0.0]]), 2.0)
    assert torch.allclose(moved, torch.tensor([[1.2, 1.6], [0.0, 0.0]]))


def test_normalised_step_counts_in_length_units():
    step = make_step(TransportBudget(step="normalised", step_size=0.5), length_unit=3.0)
    assert step(torch.tensor([[0.0, -2.0]])).tolist() == [[0.0, -1.5]]


def test_box_clips_every_coordinate():
    assert clip_to_box(-1, 1)(torch.tensor([-3.0, 0.2, 1.5])).tolist() == pytest.approx([-1.0, 0.2, 1.0])
    with pytest.raises(ValueError, match="low=2, high=1"):
        clip_to_box(2, 1)


def test_ball_shortens_what_leaves_it():
    """Offset (3, 4) has length 5: radius 2.5 halves it; radius 10 and a start itself are untouched."""
    centre = torch.tensor([[1.0, 1.0], [2.0, 2.0]])
    moved = centre + torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    assert torch.allclose(clip_to_ball(centre, 2.5)(moved), torch.tensor([[2.5, 3.0], [2.0, 2.0]]))
    assert torch.equal(clip_to_ball(centre, 10.0)(moved), moved)
    assert torch.equal(clip_to_ball(centre, 0.0)(moved), centre)
    with pytest.raises(ValueError, match="-1"):
        clip_to_ball(centre, -1)
