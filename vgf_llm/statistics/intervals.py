"""95% intervals: bootstrap over prompts, over episodes within seeds, Wilson's of a share, normal of a mean.

A bootstrap interval is the 2.5% and 97.5% quantile of the means of resamples. Random numbers come from a seed, so that
an interval is the same on every call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

RESAMPLES = 10_000
_Z = 1.96  # of a normal distribution's 95%


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95% percentile interval."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero."""
        return self.low > 0 or self.high < 0


def bootstrap_mean(values: Sequence[float], seed: int = 0) -> Estimate:
    """Return the mean of one number per prompt with its 95% interval (10,000 resamples).

    The unit that is resampled is the prompt, with all of its seeds and particles. Pairing is the caller's: hand in the
    differences between two arms prompt by prompt.

    Args:
        values: One number per prompt.
        seed: Of the resamples (torch's generator).

    Raises:
        ValueError: If there is no value.
    """
    import torch

    if not values:
        raise ValueError("bootstrap_mean needs at least one value, got none")
    sample_P = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    draws_SP = torch.randint(len(sample_P), (RESAMPLES, len(sample_P)), generator=generator)
    means_S = sample_P[draws_SP].mean(1)
    low, high = torch.quantile(means_S, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Estimate(float(sample_P.mean()), low, high)


def bootstrap_of_sums(parts_PF: Tensor, statistic: Callable[[Tensor], Tensor], seed: int = 0) -> Estimate:
    """Return a statistic of sums over prompts, a ratio say, with its 95% interval (10,000 resamples of the prompts).

    Args:
        parts_PF: What each of P prompts adds to F sums; at least one prompt.
        statistic: Maps sums [..., F] to [...].
        seed: Of the resamples (torch's generator).

    Raises:
        ValueError: If there is no prompt.
    """
    import torch

    if not len(parts_PF):
        raise ValueError("bootstrap_of_sums needs at least one prompt, got none")
    parts_PF = parts_PF.double().cpu()
    generator = torch.Generator().manual_seed(seed)
    draws_SP = torch.randint(len(parts_PF), (RESAMPLES, len(parts_PF)), generator=generator)
    found_S = statistic(parts_PF[draws_SP].sum(1))
    low, high = torch.quantile(found_S, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Estimate(float(statistic(parts_PF.sum(0))), low, high)


def bootstrap_within_seeds(values_SE: np.ndarray, seed: int = 0) -> Estimate:
    """Return the mean over seeds and episodes with its 95% interval: episodes are resampled within each seed.

    Args:
        values_SE: [seeds, episodes].
        seed: Of the resamples (numpy's generator).
    """
    import numpy as np

    generator = np.random.default_rng(seed)
    seeds, episodes = values_SE.shape
    means = np.zeros(RESAMPLES)
    for row in range(seeds):
        means += values_SE[row][generator.integers(episodes, size=(RESAMPLES, episodes))].mean(1) / seeds
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(float(values_SE.mean()), float(low), float(high))


def wilson_interval(successes: int, n: int, z: float = _Z) -> tuple[float, float]:
    """Return Wilson's score interval of a share (1927).

        (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n),   p = successes / n

    Args:
        successes: 0 to n.
        n: At least 1.
        z: Quantile of the normal distribution.
    """
    share = successes / n
    centre = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return (centre - half) / scale, (centre + half) / scale


def normal_half_width(deviation: float, n: int) -> float:
    """Return half the width of a mean's normal interval, 1.96 deviation / sqrt(n); NaN of a single value.

    Args:
        deviation: Sample standard deviation.
        n: Values, at least 1.
    """
    return _Z * deviation / n**0.5 if n > 1 else float("nan")
