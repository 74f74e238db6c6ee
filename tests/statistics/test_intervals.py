"""Intervals by hand, against the normal one, and the same on every call."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from vgf_llm.statistics.intervals import (
    bootstrap_mean,
    bootstrap_of_sums,
    bootstrap_within_seeds,
    normal_half_width,
    wilson_interval,
)


def test_bootstrap_interval_matches_the_normal_one_for_many_prompts():
    """400 draws of N(1, 1): mean +- 1.96 / 20."""
    values = (torch.randn(400, dtype=torch.float64) + 1).tolist()
    estimate = bootstrap_mean(values)
    mean, error = sum(values) / 400, torch.tensor(values).std().item() / 20
    assert estimate.mean == pytest.approx(mean)
    assert estimate.low == pytest.approx(mean - 1.96 * error, abs=0.02)
    assert estimate.high == pytest.approx(mean + 1.96 * error, abs=0.02)
    assert estimate.excludes_zero
    with pytest.raises(ValueError, match="at least one"):
        bootstrap_mean([])


def test_wilson_interval_by_hand():
    """8 of 10, z = 1.96: centre (0.8 + 0.19208) / 1.38416 = 0.716738, half 1.96 sqrt(0.016 + 0.009604) / 1.38416."""
    low, high = wilson_interval(8, 10)
    assert (low, high) == pytest.approx((0.490162, 0.943314), abs=1e-4)
    assert wilson_interval(0, 5)[0] == pytest.approx(0) and wilson_interval(5, 5)[1] == pytest.approx(1)


def test_episodes_are_resampled_within_their_seed():
    """Two seeds whose episodes are all alike: no width, however far apart the seeds are."""
    alike = bootstrap_within_seeds(np.array([[0.0] * 20, [100.0] * 20]))
    assert (alike.mean, alike.low, alike.high) == (50.0, 50.0, 50.0)
    draws = np.random.default_rng(1).normal(size=(3, 200))
    found, error = bootstrap_within_seeds(draws), draws.std(1).mean() / math.sqrt(600)
    assert found.mean == pytest.approx(draws.mean())
    assert (found.low, found.high) == pytest.approx(
        (draws.mean() - 1.96 * error, draws.mean() + 1.96 * error), abs=0.01
    )
    assert found == bootstrap_within_seeds(draws) != bootstrap_within_seeds(draws, seed=1)


def test_the_normal_interval_by_hand():
    """Standard deviation 2 of 16 values: 1.96 * 2 / 4."""
    assert normal_half_width(2.0, 16) == pytest.approx(0.98)
    assert math.isnan(normal_half_width(0.0, 1))


def test_a_bootstrap_of_sums_with_one_part_each_is_that_of_the_mean():
    """Sums of (value, 1) over prompts, and their ratio, are the mean; the resamples are the same."""
    values = torch.randn(30, dtype=torch.float64)
    parts = torch.stack([values, torch.ones(30, dtype=torch.float64)], -1)
    found = bootstrap_of_sums(parts, lambda sums: sums[..., 0] / sums[..., 1], seed=3)
    expected = bootstrap_mean(values.tolist(), seed=3)
    assert (found.mean, found.low, found.high) == pytest.approx((expected.mean, expected.low, expected.high))
    with pytest.raises(ValueError, match="at least one prompt"):
        bootstrap_of_sums(parts[:0], lambda sums: sums[..., 0])
