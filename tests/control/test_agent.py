"""Networks and the agent against slow, obvious references."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from vgf_llm.control.agent import Batch, ControlAgent, Noise
from vgf_llm.control.networks import Critics, FlowClone, GaussianClone, Perceptron
from vgf_llm.control.settings import AgentSettings, training_budget
from vgf_llm.flow.budget import TransportBudget

B, N, A, O = 3, 4, 2, 5  # noqa: E741


def small(**changes):
    """Settings other than the defaults wherever a test would not see the difference otherwise."""
    sizes = {"clone_hidden": [16, 16], "critic_hidden": [16, 16], "num_particles": N, "euler_steps": 3}
    return AgentSettings(**{**sizes, "discount": 0.9, "average_rate": 0.1, **changes})


def agent(**changes):
    """An agent whose averaged critics lie apart from the trained ones, as they do once training has begun."""
    torch.manual_seed(0)
    made = ControlAgent(small(**changes), O, A).prepare("cpu")
    with torch.no_grad():
        for parameter in made.averaged.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return made


def batch():
    torch.manual_seed(1)
    return Batch(
        torch.randn(B, O), torch.rand(B, A) * 2 - 1, torch.randn(B), torch.tensor([1.0, 0.0, 1.0]), torch.randn(B, O)
    )


def noise():
    torch.manual_seed(2)
    return Noise(torch.randn(B, N, A), torch.randn(B, A), torch.rand(B, 1))


def slow_perceptron(body, copy, row, normalised):
    """One row through one copy, layer by layer."""
    for index, (weight, bias) in enumerate(zip(body.weights, body.biases, strict=True)):
        row = row @ weight[copy] + bias[copy, 0]
        if index + 1 < len(body.weights):
            row = F.relu(row)
            if normalised:
                row = F.layer_norm(row, row.shape, body.scales[index][copy, 0], body.shifts[index][copy, 0], 1e-6)
    return row


def test_batched_critics_are_two_plain_networks():
    torch.manual_seed(0)
    critics = Critics(O, A, [16, 8])
    for parameter in critics.parameters():
        nn.init.normal_(parameter, std=0.5)
    observations, actions = torch.randn(B, O), torch.randn(B, N, A)
    values = critics(observations, actions)
    assert values.shape == (2, B, N)
    for c in range(2):
        for b in range(B):
            for n in range(N):
                row = torch.cat([observations[b], actions[b, n]])
                slow = slow_perceptron(critics.body, c, row, normalised=True)
                assert values[c, b, n].item() == pytest.approx(slow.item(), abs=1e-5)


def test_perceptron_without_further_inputs():
    torch.manual_seed(0)
    body = Perceptron(O, 0, [8], 3)
    observations = torch.randn(B, O)
    assert torch.allclose(body(observations)[0, 1, 0], slow_perceptron(body, 0, observations[1], False), atol=1e-6)


def test_normalised_observations_are_what_every_network_sees():
    settings = AgentSettings(clone_hidden=[8], critic_hidden=[8], amortised=True, budget=TransportBudget(steps=1))
    agent = ControlAgent(settings, 2, 1)
    observations_BO, actions_BNA = torch.tensor([[4.0, 30.0], [2.0, 10.0]]), torch.rand(2, 3, 1)
    mean_O, std_O = torch.tensor([2.0, 10.0]), torch.tensor([0.5, 20.0])
    scaled_BO = torch.tensor([[4.0, 1.0], [0.0, 0.0]])
    before = [agent.critics(scaled_BO, actions_BNA), agent.gradient(scaled_BO, actions_BNA)]
    proposed_BNA = agent.propose(scaled_BO, actions_BNA)
    agent.normalise_observations(mean_O, std_O)
    after = [agent.critics(observations_BO, actions_BNA), agent.gradient(observations_BO, actions_BNA)]
    torch.testing.assert_close(after, before)
    torch.testing.assert_close(agent.averaged(observations_BO, actions_BNA), before[0])
    torch.testing.assert_close(agent.propose(observations_BO, actions_BNA), proposed_BNA)


def test_euler_by_hand():
    """Velocity -x, two steps from 0.8: 0.8 (1 - 1/2)^2 = 0.2. A velocity of the time alone, v = t: 0 + 0 + 1/4."""
    clone = FlowClone(O, A, [4], euler_steps=2)
    clone.velocity = lambda observations, points, times: -points
    assert clone.sample(torch.zeros(1, O), torch.full((1, 1, A), 0.8)).tolist() == [[[pytest.approx(0.2)] * A]]
    clone.velocity = lambda observations, points, times: times.expand_as(points)
    assert clone.sample(torch.zeros(1, O), torch.zeros(1, 1, A)).tolist() == [[[0.25] * A]]
    clone.velocity = lambda observations, points, times: torch.full_like(points, 3.0)
    assert clone.sample(torch.zeros(1, O), torch.zeros(1, 1, A)).tolist() == [[[1.0] * A]]  # clipped


def test_flow_clone_learns_a_distribution_of_two_points():
    """Actions are -0.5 or 0.5; a clone that had one mean would put its samples around 0."""
    torch.manual_seed(0)
    settings = small(clone_hidden=[32, 32], euler_steps=10, learning_rate=3e-3)
    learner = ControlAgent(settings, 1, 1).prepare("cpu")
    for _ in range(400):
        actions = (torch.randint(2, (128, 1)) - 0.5).float()
        observations = torch.zeros(128, 1)
        learner.update_clone(
            Batch(observations, actions, actions[:, 0], actions[:, 0], observations),
            Noise(torch.zeros(128, 1, 1), torch.randn(128, 1), torch.rand(128, 1)),
        )
    samples = learner.propose(torch.zeros(1, 1), torch.randn(1, 500, 1)).flatten()
    assert (samples.abs() - 0.5).abs().mean() < 0.12
    assert 0.35 < (samples > 0).float().mean() < 0.65


def test_gaussian_clone_samples_mean_and_spread():
    clone = GaussianClone(O, A, [4])
    clone.raw_log_std_A.data = torch.tensor([-2.0, -20.0])
    observations = torch.randn(2, O)
    samples = (clone.sample(observations, torch.ones(2, 1, A)) - clone.mean(observations).unsqueeze(1)).detach()
    assert samples[:, 0, 1].abs().max().item() == pytest.approx(torch.tensor(-5.0).exp().item(), abs=1e-5)


JOIN = {"min": torch.amin, "mean": torch.mean, "max": torch.amax}


@pytest.mark.parametrize(
    ("pool", "target_q", "flow_q"), [("mean", "min", "mean"), ("max", "min", "min"), ("mean", "mean", "mean")]
)
def test_target_agrees_with_a_slow_reference(pool, target_q, flow_q):
    """Particles are moved one state at a time by written-out SVGD and adam, clipped, and pooled in the target."""
    subject, data, draws = agent(target_pool=pool, target_q=target_q, flow_q=flow_q), batch(), noise()
    samples = subject.propose(data.next_observations_BO, draws.particles_BNA)
    target, _ = subject.target(data, samples)
    for b in range(B):
        following = data.next_observations_BO[b]
        moved = slow_flow(subject, following, samples[b], JOIN[flow_q])
        q = torch.stack([JOIN[target_q](slow_value(subject.averaged, following, moved[n]), 0) for n in range(N)])
        expected = data.rewards_B[b] + 0.9 * data.masks_B[b] * JOIN[pool](q, 0)
        assert target[b].item() == pytest.approx(expected.item(), abs=1e-4)


def slow_value(critics, observation, action):
    row = torch.cat([observation, action])
    return torch.cat([slow_perceptron(critics.body, c, row, True) for c in range(2)])


def slow_flow(subject, observation, particles, join):
    """One adam step of 0.1 on phi_i = 1/N sum_j [k_ij grad_j + k_ij (x_i - x_j) / sigma^2], clipped to [-1, 1]."""
    leaf = particles.clone().requires_grad_(True)
    value = sum(join(slow_value(subject.critics, observation, leaf[n]), 0) for n in range(N))
    (gradient,) = torch.autograd.grad(value, leaf)
    distances = torch.cdist(particles, particles)
    pairs = distances[torch.triu_indices(N, N, 1)[0], torch.triu_indices(N, N, 1)[1]].square()
    pairs = pairs[pairs > 0]  # two particles clipped into one corner do not count
    variance = pairs.sort().values[(len(pairs) - 1) // 2] / (2 * torch.log(torch.tensor(N + 1.0)))
    kernel = torch.exp(-distances.square() / (2 * variance))
    moved = []
    for i in range(N):
        phi = sum(kernel[i, j] * (gradient[j] + (particles[i] - particles[j]) / variance) for j in range(N)) / N
        first = 0.1 * phi / (phi.abs() + 1e-8)  # adam's first step: the sign of phi, nearly
        moved.append((particles[i] + first).clamp(-1, 1))
    return torch.stack(moved).detach()


def test_flow_climbs_the_critics_and_stays_in_the_box():
    subject, data = agent(), batch()
    start = torch.rand(B, N, A) * 2 - 1
    climbed = TransportBudget(steps=20, step="adam", step_size=0.05)
    moved = subject.move(data.observations_BO, start, climbed)
    with torch.no_grad():
        before = subject.critics(data.observations_BO, start).mean(0)
        after = subject.critics(data.observations_BO, moved).mean(0)
    assert (after > before).float().mean() > 0.8
    assert moved.abs().max() <= 1
    assert subject.move(data.observations_BO, start, TransportBudget.none()) is start


def test_critic_update_changes_critics_only_and_averages_them():
    subject, data, draws = agent(), batch(), noise()
    clone = [p.clone() for p in subject.clone.parameters()]
    averaged = [p.clone() for p in subject.averaged.parameters()]
    subject.update_critics(data, subject.propose(data.next_observations_BO, draws.particles_BNA))
    assert all(torch.equal(old, new) for old, new in zip(clone, subject.clone.parameters(), strict=True))
    for old, new, trained in zip(averaged, subject.averaged.parameters(), subject.critics.parameters(), strict=True):
        assert torch.allclose(new, old + 0.1 * (trained - old), atol=1e-7)


CRITIC_LOSSES = {
    "td": lambda u: u**2,
    "expectile": lambda u: (0.3 if u < 0 else 0.7) * u**2,
    "sql": lambda u: 0.5 * max(1 + u, 0) ** 2 - u,
}


@pytest.mark.parametrize("loss", CRITIC_LOSSES)
def test_an_update_descends_the_critic_loss_of_the_settings(loss):
    subject, data = agent(critic_loss=loss, expectile=0.7, sql_alpha=0.5), batch()
    samples = subject.propose(data.next_observations_BO, noise().particles_BNA).detach()
    target, _ = subject.target(data, samples)
    with torch.no_grad():
        q = subject.critics(data.observations_BO, data.actions_BA.unsqueeze(1))[:, :, 0]
    terms = [CRITIC_LOSSES[loss](float(target[b] - q[c, b])) for c in range(2) for b in range(B)]
    assert subject.update_critics(data, samples)["critic_loss"].item() == pytest.approx(sum(terms) / B, rel=1e-4)


def test_the_gradient_network_is_fitted_to_the_mean_critic():
    subject = agent(amortised=True, budget=dataclasses.replace(training_budget(), kernel="none"))
    data, actions = batch(), batch().actions_BA.unsqueeze(1).requires_grad_(True)
    predicted = subject.gradient(data.observations_BO, actions).detach()
    loss = subject.update_critics(data, torch.zeros(B, N, A))["gradient_loss"]  # after the critics' own step
    (gradient,) = torch.autograd.grad(subject.critics(data.observations_BO, actions).mean(0).sum(), actions)
    assert loss.item() == pytest.approx((predicted - gradient).square().mean().item(), rel=1e-4)


@pytest.mark.parametrize("loss", ["td", "expectile", "sql"])
def test_every_critic_loss_brings_q_to_a_fixed_reward(loss):
    """Masks 0 make the target the reward, the same for all: each loss has its only minimum there."""
    subject = agent(critic_loss=loss, learning_rate=1e-2)
    data = dataclasses.replace(batch(), masks_B=torch.zeros(B), rewards_B=torch.full((B,), -0.7))
    for _ in range(200):
        metrics = subject.update_critics(data, torch.zeros(B, N, A))
    assert metrics["q_mean"].item() == pytest.approx(-0.7, abs=0.05)


def test_amortised_gradient_learns_the_critics_gradient_and_moves_particles():
    budget = dataclasses.replace(training_budget(), kernel="none")
    subject, data = agent(amortised=True, budget=budget, learning_rate=3e-3), batch()
    first = subject._update_gradient(data)["gradient_cosine"]
    for _ in range(150):
        last = subject._update_gradient(data)["gradient_cosine"]
    assert last > 0.9 and last > first
    moved = subject.move(data.observations_BO, data.actions_BA.unsqueeze(1), budget)
    with torch.no_grad():
        direction = subject.gradient(data.observations_BO, data.actions_BA.unsqueeze(1))
    inside = moved.abs() < 1
    assert torch.equal((moved - data.actions_BA.unsqueeze(1)).sign()[inside], direction.sign()[inside])


def states(count=32):
    """States and noise, enough of them that two rules of selection do not agree on all."""
    torch.manual_seed(3)
    return torch.randn(count, O), torch.randn(count, N, A), torch.rand(count)


@pytest.mark.parametrize("target_q", ["min", "mean"])
def test_budget_zero_with_max_is_best_of_n(target_q):
    """By the trained critics, joined as in the target."""
    subject, (observations, draws, uniform) = agent(target_q=target_q), states()
    actions, moved = subject.act(observations, draws, uniform, TransportBudget.none())
    samples = subject.propose(observations, draws)
    with torch.no_grad():
        best = JOIN[target_q](subject.critics(observations, samples), 0).argmax(1)
    assert torch.equal(actions, samples[torch.arange(len(best)), best])
    assert moved.tolist() == [0.0] * len(best)


def test_selection_is_that_of_the_settings_unless_the_call_names_another():
    """Selected at random a particle is the one whose N-th part of [0, 1) holds the uniform number."""
    observations, draws, uniform = states()
    rows, none = torch.arange(len(uniform)), TransportBudget.none()
    greedy, drawing = agent(), agent(select="random")
    samples = greedy.propose(observations, draws)
    drawn = samples[rows, (uniform * N).long()]
    assert torch.equal(drawing.act(observations, draws, uniform, none)[0], drawn)
    assert torch.equal(greedy.act(observations, draws, uniform, none, select="random")[0], drawn)
    best = greedy.act(observations, draws, uniform, none)[0]
    assert torch.equal(drawing.act(observations, draws, uniform, none, select="max")[0], best)
    cold = agent(select="softmax", select_temperature=1e-6)
    assert torch.equal(cold.act(observations, draws, uniform, none)[0], best)


def test_an_action_does_not_depend_on_the_other_states():
    subject, data = agent(), batch()
    draws, uniform, budget = torch.randn(B, N, A), torch.rand(B), training_budget()
    together, _ = subject.act(data.observations_BO, draws, uniform, budget)
    for b in range(B):
        alone, _ = subject.act(data.observations_BO[b : b + 1], draws[b : b + 1], uniform[b : b + 1], budget)
        assert torch.allclose(alone[0], together[b], atol=1e-5)


@pytest.mark.parametrize(
    "change", [{"num_particles": 0}, {"expectile": 1.0}, {"discount": 1.0}, {"clone_hidden": []}, {"amortised": True}]
)
def test_settings_out_of_range_name_their_key(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        small(**change)
