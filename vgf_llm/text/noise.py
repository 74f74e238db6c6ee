"""Gumbel noise that is a function of (row seed, position, token), and its posterior given the token that won.

Sampling y ~ p is argmax_v(log p(v) + g_v) with independent standard Gumbel g_v (Gumbel-max). Here g_v is not drawn
from a stream but hashed (the finaliser of SplitMix64, Steele et al. 2014) from the row's seed, the position and the
token id: a row's result depends on neither the batch it sits in nor the width of the shortlist, and it can be
reproduced elsewhere from the seed alone.

The posterior of the noise given that y won is the top-down construction of Maddison, Tarlow and Minka (2014): the
maximum M ~ Gumbel(logsumexp phi) belongs to y, every other perturbed value is Gumbel(phi_v) truncated at M,

    G_v = -log( exp(-M) + exp(-phi_v - g_v) ),        noise_v = G_v - phi_v.

It is needed for responses whose own noise is unknown or was already conditioned on (foreign texts, later rounds).
"""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB
_MAXIMUM_STREAM = 0x5EED


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def combine_seeds(seed: Tensor, value: Tensor | int) -> Tensor:
    """Hash a seed with a value into a new seed; int64 tensors that broadcast."""
    value = torch.as_tensor(value, dtype=torch.int64, device=seed.device)  # a tensor, because its product wraps around
    return _mix(_mix(seed + _GOLDEN) + value * _GOLDEN)


def row_seeds(seed: int, prompt_keys: list[int], num_particles: int) -> Tensor:
    """Return one seed a response, [B, N] int64, from the run's seed, the prompt's key and the index in the group.

    The first n seeds of a prompt do not depend on ``num_particles``, so best-of-8 is a prefix of best-of-32.
    """
    keys_B = torch.tensor(prompt_keys, dtype=torch.int64)
    group_B = combine_seeds(torch.tensor(seed, dtype=torch.int64), keys_B)
    return combine_seeds(group_B.unsqueeze(1), torch.arange(num_particles, dtype=torch.int64))


def gumbel_noise(seeds_R: Tensor, position: int | Tensor, ids_RK: Tensor) -> Tensor:
    """Return standard Gumbel noise, float64 [R, K], for tokens ``ids_RK`` at ``position`` of rows ``seeds_R``.

    Args:
        seeds_R: int64, one seed per row.
        position: Place in the response: one for all rows, or int64 [R].
        ids_RK: int64, token ids.
    """
    bits_RK = combine_seeds(combine_seeds(seeds_R, position).unsqueeze(-1), ids_RK)
    uniform_RK = (_shift_right(bits_RK, 11).double() + 0.5) * 2.0**-53
    return -torch.log(-torch.log(uniform_RK))


def posterior_gumbel_noise(logps_RK: Tensor, winner_R: Tensor, noise_RK: Tensor, maximum_noise_R: Tensor) -> Tensor:
    """Condition Gumbel noise on the event that column ``winner_R`` won the argmax of ``logps_RK`` + noise.

    Args:
        logps_RK: Log-probabilities, normalised over K; ``-inf`` outside the truncation.
        winner_R: int64, column that won.
        noise_RK: Fresh standard Gumbel noise for the columns.
        maximum_noise_R: Fresh standard Gumbel noise for the maximum.

    Returns:
        Float [R, K]; adding it to ``logps_RK`` makes ``winner_R`` the argmax. Columns at ``-inf`` keep
        fresh noise; a row that is ``-inf`` everywhere has no winner and keeps all of it.
    """
    logps_RK, noise_RK = logps_RK.double(), noise_RK.double()
    maximum_R1 = (torch.logsumexp(logps_RK, -1) + maximum_noise_R.double()).unsqueeze(-1)
    perturbed_RK = -torch.logaddexp(-maximum_R1, -(logps_RK + noise_RK))
    posterior_RK = torch.where(torch.isinf(logps_RK), noise_RK, perturbed_RK - logps_RK)
    winner_R1 = winner_R.unsqueeze(-1)
    of_winner_R1 = maximum_R1 - logps_RK.gather(-1, winner_R1)
    of_winner_R1 = torch.where(torch.isinf(maximum_R1), noise_RK.gather(-1, winner_R1), of_winner_R1)
    return posterior_RK.scatter(-1, winner_R1, of_winner_R1)


def maximum_noise(seeds_R: Tensor, position: int | Tensor) -> Tensor:
    """Return the standard Gumbel noise of the maximum, float64 [R], from a stream of its own."""
    return gumbel_noise(combine_seeds(seeds_R, _MAXIMUM_STREAM), position, torch.zeros_like(seeds_R).unsqueeze(-1))[
        :, 0
    ]
