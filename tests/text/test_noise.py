"""Hashed Gumbel noise: its distribution, its independence, and its posterior."""

import math

import torch

from vgf_llm.text.noise import gumbel_noise, maximum_noise, posterior_gumbel_noise, row_seeds

EULER_GAMMA = 0.5772156649


def test_noise_is_standard_gumbel():
    """Mean gamma, variance pi^2/6; with 200,000 draws the standard errors are 0.003 and 0.01."""
    seeds = row_seeds(1, list(range(200)), 10).flatten()
    noise = gumbel_noise(seeds, 3, torch.arange(100).expand(len(seeds), 100))
    assert abs(noise.mean().item() - EULER_GAMMA) < 0.012
    assert abs(noise.var().item() - math.pi**2 / 6) < 0.04
    assert torch.isfinite(noise).all()


def test_noise_is_uncorrelated_across_rows_positions_and_tokens():
    """Correlations of 20,000 pairs have a standard error of 0.007."""
    seeds = row_seeds(0, list(range(2000)), 10).flatten()
    columns = [gumbel_noise(seeds, t, torch.full((len(seeds), 1), v))[:, 0] for t in (0, 1) for v in (5, 6)]
    columns.append(gumbel_noise(seeds.roll(1), 0, torch.full((len(seeds), 1), 5))[:, 0])
    correlation = torch.corrcoef(torch.stack(columns)) - torch.eye(len(columns))
    assert correlation.abs().max().item() < 0.03


def test_noise_depends_on_nothing_but_seed_position_and_token():
    seeds = row_seeds(0, [7, 8], 3).flatten()
    wide = gumbel_noise(seeds, 2, torch.arange(50).expand(6, 50))
    narrow = gumbel_noise(seeds[4:5], 2, torch.tensor([[30, 4]]))
    assert torch.equal(narrow[0], wide[4, [30, 4]])


def test_first_seeds_of_a_prompt_do_not_depend_on_the_group_size_or_the_batch():
    assert torch.equal(row_seeds(3, [11, 12], 8), row_seeds(3, [11, 12], 32)[:, :8])
    assert torch.equal(row_seeds(3, [12], 8)[0], row_seeds(3, [11, 12], 8)[1])
    assert row_seeds(3, list(range(50)), 32).unique().numel() == 50 * 32


def test_posterior_makes_the_winner_win_and_is_gumbel_on_average():
    """Averaged over winners drawn from p, posterior noise is plain Gumbel noise again (total probability)."""
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    logps = p.log().expand(40_000, 4)
    seeds = row_seeds(5, list(range(4000)), 10).flatten()
    ids = torch.arange(4).expand(len(seeds), 4)
    winner = (logps + gumbel_noise(seeds, 0, ids)).argmax(-1)
    assert torch.allclose(winner.bincount() / len(seeds), p, atol=0.01)
    noise = posterior_gumbel_noise(logps, winner, gumbel_noise(seeds, 1, ids), maximum_noise(seeds, 1))
    assert torch.equal((logps + noise).argmax(-1), winner)
    assert (noise.mean(0) - EULER_GAMMA).abs().max().item() < 0.03
    assert (noise.var(0) - math.pi**2 / 6).abs().max().item() < 0.08
    assert (torch.corrcoef(noise.T) - torch.eye(4)).abs().max().item() < 0.03


def test_posterior_gives_fresh_noise_outside_the_truncation():
    logps = torch.tensor([[math.log(0.6), math.log(0.4), -torch.inf]])
    fresh = torch.tensor([[0.1, 0.2, 0.3]])
    noise = posterior_gumbel_noise(logps, torch.tensor([1]), fresh, torch.tensor([0.7]))
    assert noise[0, 2].item() == fresh[0, 2].item()
    assert (logps + noise).argmax(-1).item() == 1
