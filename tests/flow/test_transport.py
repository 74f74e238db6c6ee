"""What transport promises: budgets, masks, groups, order of particles, units, failures."""

import math

import pytest
import torch

from vgf_llm.errors import NonFiniteError
from vgf_llm.flow.budget import TransportBudget
from vgf_llm.flow.distances import mmd2
from vgf_llm.flow.projections import clip_to_box
from vgf_llm.flow.trajectory import autograd_value, transport

torch.set_num_threads(1)

KINDS = [
    TransportBudget(steps=4, step_size=0.2, step=s, kernel=k)
    for s in ("sgd", "adam", "normalised")
    for k in ("none", "rbf")
]


def quadratic(x):
    """-|x - 1|^2 / 2, summed over everything but the particle."""
    return -(x - 1).square().flatten(2).sum(2) / 2


def linear(slope):
    return lambda x: (x * slope).flatten(2).sum(2)


def kind(budget):
    return f"{budget.step}-{budget.kernel}"


def test_no_steps_return_the_input_itself():
    particles = torch.randn(2, 3, 4)
    trajectory = transport(particles, autograd_value(quadratic), TransportBudget.none(), record=True)
    assert trajectory.final is particles and trajectory.initial is particles and trajectory.particles == (particles,)
    assert trajectory.values_LBN.shape == trajectory.displacement_LBN.shape == (0, 2, 3)
    assert not trajectory.delta.any()


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_linear_reward_moves_by_a_closed_form(steps):
    """R(x) = <g, x>, g = (3, 4), eps 0.1, alpha 2: each step moves 0.1 * 5 / 2 = 0.25, so after L steps L / 4.

    The value grows by |g| a unit of path: R(x^l) = 5 * 0.25 l. With one particle a group,
    MMD^2 = 2 - 2 exp(-(L/4)^2 / 2) for sigma = 1. Displacements count in length units of 0.5.
    """
    budget = TransportBudget(steps=steps, step_size=0.1, temperature=2.0)
    start = torch.zeros(1, 1, 2, dtype=torch.float64)
    trajectory = transport(start, autograd_value(linear(torch.tensor([3.0, 4.0]))), budget, length_unit=0.5)
    expected = [0.25 * (i + 1) / 0.5 for i in range(steps)]
    assert trajectory.displacement_LBN.flatten().tolist() == pytest.approx(expected)
    assert trajectory.values_LBN.flatten().tolist() == pytest.approx([1.25 * i for i in range(steps)])
    assert trajectory.gradient_norm_LBN.flatten().tolist() == pytest.approx([5.0] * steps)
    measured = mmd2(trajectory.initial[0], trajectory.final[0], 1.0).item()
    assert measured == pytest.approx(2 - 2 * math.exp(-((steps / 4) ** 2) / 2))


def test_distance_grows_with_the_budget():
    torch.manual_seed(0)
    start = torch.randn(1, 16, 2)
    distances = []
    for steps in (0, 1, 2, 4, 8):
        budget = TransportBudget(steps=steps, step_size=0.1, kernel="rbf")
        distances.append(mmd2(start[0], transport(start, autograd_value(linear(1.0)), budget).final[0], 1.0).item())
    assert distances[0] < 1e-6 and distances == sorted(distances) and len(set(distances)) == 5


def test_temperature_divides_the_gradient():
    start = torch.zeros(1, 2, 3)
    warm, cold = (
        transport(start, autograd_value(linear(1.0)), TransportBudget(temperature=t)).final for t in (2.0, 0.5)
    )
    assert torch.equal(warm, torch.full_like(start, 0.5)) and torch.equal(cold, torch.full_like(start, 2.0))


@pytest.mark.parametrize("budget", KINDS, ids=kind)
def test_order_of_particles_does_not_matter(budget):
    torch.manual_seed(1)
    start = torch.randn(2, 5, 3, 2, dtype=torch.float64)
    mask = torch.rand(2, 5, 3) > 0.3
    order = torch.tensor([4, 2, 0, 1, 3])
    moved = transport(start, autograd_value(quadratic), budget, mask=mask)
    permuted = transport(start[:, order], autograd_value(quadratic), budget, mask=mask[:, order])
    assert torch.allclose(moved.final[:, order], permuted.final, atol=1e-10)
    assert torch.allclose(moved.values_LBN[:, :, order], permuted.values_LBN, atol=1e-10)


@pytest.mark.parametrize("budget", KINDS, ids=kind)
def test_groups_do_not_interact(budget):
    torch.manual_seed(2)
    start = torch.randn(3, 4, 2)
    together = transport(start, autograd_value(quadratic), budget).final
    alone = torch.cat([transport(start[b : b + 1], autograd_value(quadratic), budget).final for b in range(3)])
    assert torch.allclose(together, alone, atol=1e-6)


@pytest.mark.parametrize("budget", KINDS, ids=kind)
def test_padding_never_moves(budget):
    """Row 0 is ragged, row 1 is all padding; a project that shifts everything cannot move padding either."""
    torch.manual_seed(3)
    start = torch.randn(1, 3, 4, 2)
    mask = torch.tensor([[[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]])
    moved = transport(start, autograd_value(quadratic), budget, mask=mask, project=lambda x: x + 0.01)
    padding = mask == 0
    assert torch.equal(moved.final[padding], start[padding])
    assert (moved.final[~padding] != start[~padding]).all()
    assert moved.displacement_LBN[-1, 0, 1] == 0


@pytest.mark.parametrize("budget", KINDS, ids=kind)
def test_an_absent_particle_changes_nothing(budget):
    """A fully masked particle, even with NaN in its gradient and value, leaves the others as if it were not there."""
    torch.manual_seed(4)
    start = torch.randn(1, 4, 3, 2)
    mask = torch.ones(1, 4, 3)
    mask[0, 2] = 0

    def value_gradient(x):
        values, gradients = autograd_value(quadratic)(x)
        if x.shape[1] == 4:
            values[0, 2], gradients[0, 2] = math.nan, math.nan
        return values, gradients

    moved = transport(start, value_gradient, budget, mask=mask).final
    without = transport(start[:, [0, 1, 3]], value_gradient, budget).final
    assert torch.allclose(moved[:, [0, 1, 3]], without, atol=1e-6) and torch.equal(moved[:, 2], start[:, 2])


@pytest.mark.parametrize("budget", KINDS, ids=kind)
def test_a_group_of_padding_only_stays(budget):
    start = torch.randn(2, 2, 3, 2)
    mask = torch.ones(2, 2, 3)
    mask[1] = 0
    moved = transport(start, autograd_value(quadratic), budget, mask=mask).final
    assert torch.equal(moved[1], start[1]) and torch.isfinite(moved).all()


def test_one_particle_with_a_kernel_is_plain_ascent():
    start = torch.randn(3, 1, 2)
    stein, plain = (
        transport(start, autograd_value(quadratic), TransportBudget(steps=3, step_size=0.1, kernel=k)).final
        for k in ("rbf", "none")
    )
    assert torch.allclose(stein, plain)


def test_equal_rewards_move_nothing_without_and_spread_with_a_kernel():
    """A flat value has no gradient: plain ascent stays (all three steps), SVGD only repels and keeps the mean."""
    torch.manual_seed(5)
    start = torch.randn(1, 6, 2)
    flat = autograd_value(lambda x: 0 * x.sum(-1) + 2)
    for step in ("sgd", "adam", "normalised"):
        assert torch.equal(transport(start, flat, TransportBudget(steps=3, step=step)).final, start)
    spread = transport(start, flat, TransportBudget(steps=3, step_size=0.5, kernel="rbf")).final
    assert torch.allclose(spread.mean(1), start.mean(1), atol=1e-6)
    assert spread.var(1).sum() > start.var(1).sum()


def test_normalised_steps_cover_their_length():
    """Three steps of 0.5 units of 2.0 along one direction: 3.0 a token, whatever the gradient's size."""
    start = torch.zeros(1, 2, 3, 2)
    budget = TransportBudget(steps=3, step_size=0.5, step="normalised")
    moved = transport(start, autograd_value(linear(1e-6)), budget, length_unit=2.0)
    assert torch.allclose(moved.delta.norm(dim=-1), torch.full((1, 2, 3), 3.0))
    assert moved.displacement_LBN[-1].flatten().tolist() == pytest.approx([1.5 * math.sqrt(3)] * 2)


def test_the_box_holds_the_particles():
    budget = TransportBudget(steps=5, step_size=0.1, step="adam")
    moved = transport(torch.full((1, 2, 3), 0.8), autograd_value(linear(1.0)), budget, project=clip_to_box(-1, 1))
    assert torch.equal(moved.final, torch.ones(1, 2, 3))


def test_record_keeps_the_path():
    start = torch.randn(1, 2, 3)
    trajectory = transport(start, autograd_value(quadratic), TransportBudget(steps=3, step_size=0.1), record=True)
    assert len(trajectory.particles) == 4
    assert trajectory.particles[0] is start and torch.equal(trajectory.particles[3], trajectory.final)
    norms = torch.stack([(x - start).norm(dim=-1) for x in trajectory.particles[1:]])
    assert torch.allclose(norms, trajectory.displacement_LBN)
    assert transport(start, autograd_value(quadratic), TransportBudget()).particles is None


def test_nothing_keeps_a_graph_and_no_parameter_gets_a_gradient():
    layer = torch.nn.Linear(3, 1)
    start = torch.randn(1, 2, 3, requires_grad=True)
    trajectory = transport(start, autograd_value(lambda x: layer(x)[..., 0]), TransportBudget(steps=2), record=True)
    kept = (trajectory.final, trajectory.values_LBN, trajectory.displacement_LBN, *trajectory.particles[1:])
    assert not any(tensor.requires_grad for tensor in kept)
    assert layer.weight.grad is None and start.grad is None and start.requires_grad


def test_autograd_value_against_finite_differences():
    """Central differences in float64, h = 1e-6, through a small network; values of the group do not mix."""
    torch.manual_seed(6)
    net = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1)).double()
    start = torch.randn(2, 3, 3, dtype=torch.float64)
    values, gradients = autograd_value(lambda x: net(x)[..., 0])(start)
    assert torch.allclose(values, net(start)[..., 0])
    for index in [(0, 0, 0), (1, 2, 1), (0, 1, 2)]:
        shift = torch.zeros_like(start)
        shift[index] = 1e-6
        with torch.no_grad():
            difference = (net(start + shift) - net(start - shift)).sum() / 2e-6
        assert gradients[index].item() == pytest.approx(difference.item(), abs=1e-8)


def test_bfloat16_particles_move_by_steps_they_could_not_hold():
    """256 steps of 0.001 from 1.0: bfloat16 next to 1 has a spacing of 1/128, so each step alone would be lost."""
    start = torch.ones(1, 1, 2, dtype=torch.bfloat16)
    seen = []

    def value_gradient(x):
        seen.append(x.dtype)
        return x.sum(-1), torch.ones_like(x)

    moved = transport(start, value_gradient, TransportBudget(steps=256, step_size=0.001))
    assert set(seen) == {torch.bfloat16} and moved.final.dtype == torch.float32
    assert torch.allclose(moved.delta, torch.full((1, 1, 2), 0.256), atol=1e-4)


@pytest.mark.parametrize("broken", ["value", "gradient"])
def test_a_non_finite_number_names_group_and_step(broken):
    calls = 0

    def value_gradient(x):
        nonlocal calls
        values, gradients = autograd_value(quadratic)(x)
        if calls == 2:
            (values if broken == "value" else gradients)[1, 0] = math.nan
        calls += 1
        return values, gradients

    with pytest.raises(NonFiniteError, match="prompt 1, particle 0 .* step 2") as error:
        transport(torch.randn(3, 2, 4), value_gradient, TransportBudget(steps=5, step_size=0.1))
    assert (error.value.group, error.value.step) == (1, 2)


def test_a_step_that_overflows_is_found_at_its_own_step():
    budget = TransportBudget(steps=1, step_size=1e30)
    with pytest.raises(NonFiniteError, match="moved particle of prompt 0") as error:
        transport(torch.zeros(1, 1, 2), autograd_value(linear(1e15)), budget)
    assert error.value.step == 0


def test_nan_at_padding_is_not_an_error():
    start, mask = torch.zeros(1, 1, 2, 2), torch.tensor([[[1, 0]]])

    def value_gradient(x):
        gradients = torch.ones_like(x)
        gradients[:, :, 1] = math.nan
        return x.new_zeros(1, 1), gradients

    moved = transport(start, value_gradient, TransportBudget(step_size=0.5), mask=mask).final
    assert moved.tolist() == [[[[0.5, 0.5], [0.0, 0.0]]]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"particles": torch.zeros(2, 3)}, r"particles must be .* \(2, 3\)"),
        ({"particles": torch.zeros(2, 3, 4, dtype=torch.int64)}, "particles must be .* torch.int64"),
        ({"mask": torch.ones(2, 3, 4)}, r"mask must have shape \(2, 3\), got \(2, 3, 4\)"),
        ({"length_unit": 0.0}, "length_unit must be > 0, got 0.0"),
        ({"value_gradient": autograd_value(lambda x: x)}, r"value must have shape \(2, 3\), got \(2, 3, 4\)"),
        ({"value_gradient": autograd_value(lambda x: torch.ones(2, 3))}, "learn a value model"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    call = {"particles": torch.zeros(2, 3, 4), "value_gradient": autograd_value(quadratic), "budget": TransportBudget()}
    with pytest.raises(ValueError, match=message):
        transport(**{**call, **arguments})
