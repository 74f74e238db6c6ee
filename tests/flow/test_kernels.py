"""The Stein direction against hand-made numbers, a slow literal reference and finite differences."""

import math

import pytest
import torch

from vgf_llm.flow.kernels import median_bandwidth, rbf_kernel, squared_distances, stein_direction

torch.set_num_threads(1)


def literal_direction(particles, gradients, alpha, sigma_B, features, present_BN):
    """phi(x_i) = (1/N) sum_j [k(x_j, x_i) grad R(x_j) / alpha + grad_{x_j} k(x_j, x_i)], term by term with autograd."""
    phi = torch.zeros_like(particles)
    for b in range(particles.shape[0]):
        present = [j for j in range(particles.shape[1]) if present_BN[b, j]]
        for i in range(particles.shape[1]):
            for j in present:
                x_j = particles[b, j].clone().requires_grad_(True)
                distance2 = (features(x_j, b, j) - features(particles[b, i], b, i)).square().sum()
                k = torch.exp(-distance2 / (2 * sigma_B[b] ** 2))
                (grad_k,) = torch.autograd.grad(k, x_j)
                phi[b, i] += (k.detach() * gradients[b, j] / alpha + grad_k) / len(present)
    return phi


def test_two_particles_by_hand():
    """Particles 0 and 2 with R(x) = x and alpha = 2.

    median = 2, so sigma^2 = 4 / (2 log 3) and k(0, 2) = exp(-4 log 3 / 4) = 1/3 (for two particles always 1/(N+1)).
    Drive: (1 + 1/3) (1/2) = 2/3 for both. Repulsion on 0: k (0 - 2) / sigma^2 = -(1/3) 2 log 3 / 2 = -log(3)/3.
    phi(0) = (2/3 - 0.36620) / 2 = 0.15023, phi(2) = (2/3 + 0.36620) / 2 = 0.51644.
    """
    particles = torch.tensor([[[0.0], [2.0]]], dtype=torch.float64)
    phi = stein_direction(particles, torch.ones_like(particles), 2.0)
    assert phi.flatten().tolist() == pytest.approx([0.150231, 0.516436], abs=1e-6)


def test_median_bandwidth_by_hand():
    """Points 0, 1, 4: distances 1, 3, 4, median 3, sigma^2 = 9 / (2 log 4) = 3.24606."""
    z = torch.tensor([[[0.0], [1.0], [4.0]]], dtype=torch.float64)
    assert median_bandwidth(squared_distances(z, z)).item() ** 2 == pytest.approx(3.246064, abs=1e-6)


def test_median_bandwidth_ignores_duplicates_and_absent_particles():
    """Points 0, 0, 0, 1 and an absent 100: the only positive distance is 1 and four count, so 1 / (2 log 5)."""
    z = torch.tensor([[[0.0], [0.0], [0.0], [1.0], [100.0]]], dtype=torch.float64)
    present = torch.tensor([[True, True, True, True, False]])
    sigma = median_bandwidth(squared_distances(z, z), present)
    assert sigma.item() ** 2 == pytest.approx(1 / (2 * math.log(5)))


@pytest.mark.parametrize("count", [1, 4])
def test_equal_particles_follow_the_mean_gradient(count):
    """One particle, or all equal: k = 1 and no repulsion, so phi = grad R / alpha (here 3 / 0.5 = 6)."""
    particles = torch.full((2, count, 3), 0.7)
    assert torch.equal(stein_direction(particles, torch.full_like(particles, 3.0), 0.5), torch.full_like(particles, 6))


@pytest.mark.parametrize("bandwidth", [None, 0.8])
@pytest.mark.parametrize("masked", [False, True])
def test_flat_kernel_agrees_with_the_literal_sum(bandwidth, masked):
    torch.manual_seed(0)
    particles = torch.randn(2, 4, 3, 2, dtype=torch.float64)
    mask = torch.ones(2, 4, 3, dtype=torch.bool)
    if masked:
        mask[0, 1, 2:] = mask[0, 3, 1:] = mask[1, 2] = False
    gradients = torch.randn_like(particles) * mask[..., None]
    flat = (particles * mask[..., None]).flatten(2)
    distances = squared_distances(flat, flat)
    sigma_B = median_bandwidth(distances, mask.any(2)) if bandwidth is None else torch.full((2,), bandwidth).double()
    expected = literal_direction(
        particles, gradients, 0.3, sigma_B, lambda x, b, n: x * mask[b, n][:, None], mask.any(2)
    )
    phi = stein_direction(particles, gradients, 0.3, mask=mask if masked else None, bandwidth=bandwidth)
    assert torch.allclose(phi, expected, atol=1e-12)


def test_mapped_kernel_agrees_with_the_literal_sum():
    """Features: tanh of a linear map of the masked mean over tokens; the repulsion runs through its Jacobian."""
    torch.manual_seed(1)
    particles = torch.randn(2, 3, 4, 2, dtype=torch.float64)
    mask = torch.ones(2, 3, 4, dtype=torch.bool)
    mask[0, 0, 2:] = mask[1, 1, 1:] = False
    gradients = torch.randn_like(particles)
    weight = torch.randn(2, 5, dtype=torch.float64)

    def one(x, b, n):
        return torch.tanh((x * mask[b, n][:, None]).sum(0) / mask[b, n].sum() @ weight)

    def pooled(x):
        return torch.tanh((x * mask[..., None]).sum(2) / mask.sum(2, keepdim=True) @ weight)

    phi = stein_direction(particles, gradients, 1.5, mask=mask, features=pooled, bandwidth=0.6)
    expected = literal_direction(particles, gradients, 1.5, torch.full((2,), 0.6), one, mask.any(2))
    assert torch.allclose(phi, expected, atol=1e-12)


def test_repulsion_is_the_finite_difference_of_the_kernel():
    """N * phi(x_i) with zero gradients = sum_j dk(x_j, x_i)/dx_j, by central differences with h = 1e-5."""
    torch.manual_seed(2)
    x = torch.randn(1, 3, 2, dtype=torch.float64)
    sigma, h = 0.9, 1e-5
    phi = stein_direction(x, torch.zeros_like(x), 1.0, bandwidth=sigma)
    for i in range(3):
        for d in range(2):
            shift = torch.zeros(2, dtype=torch.float64)
            shift[d] = h
            up = rbf_kernel((x[0] + shift - x[0, i]).square().sum(1), sigma)
            down = rbf_kernel((x[0] - shift - x[0, i]).square().sum(1), sigma)
            assert 3 * phi[0, i, d].item() == pytest.approx(((up - down).sum() / (2 * h)).item(), abs=1e-9)


def test_direction_is_permutation_equivariant():
    torch.manual_seed(3)
    particles, gradients = torch.randn(2, 5, 4, 2), torch.randn(2, 5, 4, 2)
    mask = torch.rand(2, 5, 4) > 0.3
    order = torch.tensor([3, 0, 4, 1, 2])
    phi = stein_direction(particles, gradients, 0.7, mask=mask)
    permuted = stein_direction(particles[:, order], gradients[:, order], 0.7, mask=mask[:, order])
    assert torch.allclose(phi[:, order], permuted, atol=1e-6)


def test_far_from_the_origin_nothing_cancels():
    """Repulsion depends on differences only: a shift by 1000 changes it by float32 rounding of the inputs at most."""
    particles = torch.tensor([[[0.0, 0.25], [0.5, 0.0], [0.25, 0.75]]])
    zero = torch.zeros_like(particles)
    shifted = stein_direction(particles + 1000, zero, 1.0)
    assert torch.allclose(shifted, stein_direction(particles, zero, 1.0), atol=1e-6)


def test_features_of_a_wrong_shape_are_refused():
    with pytest.raises(ValueError, match=r"features must map to \[1, 2, F\], got \(1, 2\)"):
        stein_direction(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), 1.0, features=lambda x: x.sum(-1))
