"""Paired bootstrap over prompts: the unit that is resampled is the prompt, with all of its seeds and particles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

_RESAMPLES = 10_000


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts and its 95% percentile interval."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero."""
        return self.low > 0 or self.high < 0


def bootstrap_mean(values: Sequence[float], seed: int = 0) -> Estimate:
    """Return the mean of one number per prompt with its 95% interval (10,000 resamples).

    Pairing is the caller's: hand in the differences between two arms prompt by prompt.

    Raises:
        ValueError: If there is no value.
    """
    if not values:
        raise ValueError("bootstrap_mean needs at least one value, got none")
    sample_P = torch.tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    draws_SP = torch.randint(len(sample_P), (_RESAMPLES, len(sample_P)), generator=generator)
    means_S = sample_P[draws_SP].mean(1)
    low, high = torch.quantile(means_S, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Estimate(float(sample_P.mean()), low, high)
