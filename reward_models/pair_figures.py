"""Figures of scores on preference pairs: accuracy that length cannot buy, and the calibration of pair probabilities.

    length-controlled accuracy = (accuracy where chosen is longer + accuracy where chosen is shorter) / 2
    p = sigmoid(|c - r|),   calibration error = sum_b n_b / n |mean_b p - mean_b [c > r]|   (Guo et al., 1706.04599)

A score that only counts tokens has a length-controlled accuracy of one half, however often the longer response is the
better one. The probability is the one of Bradley and Terry that the response with the higher score is preferred. Bins
hold equal numbers of pairs. All inputs are plain numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from vgf_llm.statistics.intervals import wilson_interval

_BINS = 5
_TEMPERATURES = [0.02 * 1.08**power for power in range(120)]  # 0.02 to 190


@dataclass(frozen=True)
class LengthControl:
    """Accuracy with the length of the chosen response held fixed.

    Attributes:
        accuracy: Mean of the two shares below; None where one side has no pair.
        longer: Share of pairs won in which the chosen response is the longer one; None where there are none.
        longer_pairs: Their number.
        shorter: Share of pairs won in which it is the shorter one; None where there are none.
        shorter_pairs: Their number.
    """

    accuracy: float | None
    longer: float | None
    longer_pairs: int
    shorter: float | None
    shorter_pairs: int

    def follows_length(self) -> bool:
        """Return whether one side is decided against the labels, beyond Wilson's 95% interval."""
        sides = ((self.longer, self.longer_pairs), (self.shorter, self.shorter_pairs))
        return any(n and wilson_interval(round((share or 0.0) * n), n)[1] < 0.5 for share, n in sides)


@dataclass(frozen=True)
class Calibration:
    """Pair probabilities compared with the share of pairs that are won.

    Attributes:
        confidence: Mean probability that the response with the higher score is preferred, in [0.5, 1].
        error: Expected calibration error, in [0, 1].
        temperature: Divisor of scores under which the labels are likeliest; None where every pair is won or none is.
    """

    confidence: float
    error: float
    temperature: float | None

    def to_dict(self) -> dict[str, float | None]:
        """Return the fields as a dict."""
        return asdict(self)


def length_control(
    chosen: Sequence[float],
    rejected: Sequence[float],
    chosen_lengths: Sequence[int],
    rejected_lengths: Sequence[int],
) -> LengthControl:
    """Return the accuracy among pairs whose chosen response is longer, and among those where it is shorter.

    Args:
        chosen: Scores of the preferred responses.
        rejected: Scores of the others.
        chosen_lengths: Lengths of the preferred responses, in tokens or words.
        rejected_lengths: Lengths of the others. Pairs of equal length count on neither side.
    """
    sides: dict[bool, list[bool]] = {True: [], False: []}
    for c, r, c_length, r_length in zip(chosen, rejected, chosen_lengths, rejected_lengths, strict=True):
        if c_length != r_length:
            sides[c_length > r_length].append(c > r)
    longer, shorter = (sum(won) / len(won) if won else None for won in (sides[True], sides[False]))
    both = None if longer is None or shorter is None else (longer + shorter) / 2
    return LengthControl(both, longer, len(sides[True]), shorter, len(sides[False]))


def calibration(chosen: Sequence[float], rejected: Sequence[float]) -> Calibration:
    """Compare the probabilities that scores state with the pairs that they win.

    Args:
        chosen: Scores of the preferred responses, at least one, all finite.
        rejected: Scores of the others.

    Raises:
        ValueError: There is no pair.
    """
    differences = [c - r for c, r in zip(chosen, rejected, strict=True)]
    if not differences:
        raise ValueError("calibration needs at least one pair")
    rows = sorted((_sigmoid(abs(one)), one > 0) for one in differences)
    bins = min(_BINS, max(1, len(rows) // 5))
    error = 0.0
    for part in range(bins):
        members = rows[part * len(rows) // bins : (part + 1) * len(rows) // bins]
        gap = sum(p for p, _ in members) - sum(won for _, won in members)
        error += abs(gap) / len(rows)
    return Calibration(sum(p for p, _ in rows) / len(rows), error, _temperature(differences))


def _temperature(differences: Sequence[float]) -> float | None:
    """Return the divisor T that minimises the mean of -log sigmoid((c - r) / T), from a grid."""
    won = sum(one > 0 for one in differences)
    if won in (0, len(differences)):
        return None
    return min(_TEMPERATURES, key=lambda t: sum(_softplus(-one / t) for one in differences))


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def _softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def is_better(right: Sequence[bool], other: Sequence[bool], level: float = 0.005) -> bool:
    """Return whether ``right`` wins more of the same pairs than ``other`` by a one-sided sign test.

    Args:
        right: Whether each pair is won.
        other: The same under another reading.
        level: Largest probability of such a difference by chance, in (0, 1).
    """
    more = sum(a and not b for a, b in zip(right, other, strict=True))
    apart = sum(a != b for a, b in zip(right, other, strict=True))
    if apart == 0:
        return False
    tail: float = sum(math.comb(apart, k) for k in range(more, apart + 1)) / 2**apart
    return tail < level
