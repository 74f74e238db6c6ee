"""Checks of scores: numbers, spread, accuracy, length, calibration. Plain numbers in, lines out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from reward_models.card import pearson_correlation
from reward_models.checking.line import Line, Verdict, judged, skipped
from reward_models.pair_figures import calibration, length_control
from vgf_llm.statistics.intervals import wilson_interval

_LEAST_PAIRS = 8  # for a verdict on accuracy, length and calibration
_USEFUL = 0.7  # accuracy that an interval around chance has to exclude before it is called a failure
_MOST_CORRELATION = 0.8
_MOST_GAP = 0.05  # of confidence, beyond the accuracy's interval


def check_numbers(scores: Sequence[float]) -> Line:
    """Fail where a score is NaN or infinite."""
    odd = sum(not math.isfinite(score) for score in scores)
    advice = "look for NaN in the weights and for a dtype that overflows (float16); load in float32"
    value = f"{odd} of {len(scores)} scores are NaN or infinite"
    return judged("numbers", value, "0", "fail" if odd else "pass", advice)


def check_spread(scores: Sequence[float]) -> Line:
    """Fail where all responses have one score."""
    mean = sum(scores) / len(scores)
    spread = math.sqrt(sum((score - mean) ** 2 for score in scores) / len(scores))
    is_constant = spread <= 1e-6 * max(1.0, abs(mean))
    advice = "every response has the same score: the head is zero, or it reads a position that all conversations share"
    value = f"mean {mean:.3g}, standard deviation {spread:.3g}"
    return judged("spread", value, "standard deviation above 0", "fail" if is_constant else "pass", advice)


def check_parts(parts: Mapping[str, Sequence[float]]) -> Line:
    """Show what the parts of a composed reward gave; warn where one was not asked for any response.

    Args:
        parts: Values by name, NaN where a constraint before it was not kept.
    """
    asked = {name: [value for value in values if not math.isnan(value)] for name, values in parts.items()}
    seen = [
        f"{name} {sum(values) / len(values):.3g} on {len(values)}" if values else f"{name} on 0"
        for name, values in asked.items()
    ]
    left_out = [name for name, values in asked.items() if not values]
    advice = f"no response keeps the constraints before {', '.join(left_out)}: look at their limits"
    value = "mean of " + ", ".join(seen) + " responses"
    return judged("parts", value, "each asked for a response", "warn" if left_out else "pass", advice)


def check_pairs(kept: int, dropped: dict[str, int]) -> Line:
    """Warn where pairs of the file could not be used."""
    out = {reason: count for reason, count in dropped.items() if count}
    total = kept + sum(out.values())
    value = f"{kept} of {total} pairs used" + "".join(f"; {count} {reason}" for reason, count in out.items())
    verdict: Verdict = "fail" if sum(out.values()) > 0.2 * total else "warn" if out else "pass"
    return judged("pairs", value, "all used; fails above 20% left out", verdict, "mend the rows of the file")


def check_accuracy(chosen: Sequence[float], rejected: Sequence[float], is_given: bool) -> Line:
    """Compare the share of pairs won with chance.

    Args:
        chosen: Scores of the preferred responses.
        rejected: Scores of the others.
        is_given: Whether the pairs are the user's. An interval that holds 0.5 and excludes 0.7 is a failure then, and a
            warning on built-in pairs.
    """
    won, n = sum(c > r for c, r in zip(chosen, rejected, strict=True)), len(chosen)
    low, high = wilson_interval(won, n)
    value = f"{won / n:.2f} (95% {low:.2f} to {high:.2f}, {n} pairs)"
    threshold = "interval above 0.5"
    if n < _LEAST_PAIRS:
        return skipped("accuracy", f"{value}: too few pairs for a verdict")
    if high < 0.5:
        return Line("accuracy", value, threshold, "fail", "the sign is reversed: negate the score, or swap the columns")
    advice = (
        "the score does not tell better from worse: is the head the trained one (saved with the adapter?), is the "
        "template the one of training, is this the task it was trained for"
    )
    if low <= 0.5 and high >= _USEFUL:
        advice = f"{n} pairs are too few to tell this accuracy from chance: give more with --limit or another dataset"
    verdict: Verdict = "pass" if low > 0.5 else "fail" if is_given and high < _USEFUL else "warn"
    return judged("accuracy", value, f"{threshold}; fails below {_USEFUL:g}", verdict, advice)


def check_length(
    chosen: Sequence[float],
    rejected: Sequence[float],
    chosen_lengths: Sequence[int],
    rejected_lengths: Sequence[int],
) -> Line:
    """Warn where the score follows the length of the response; lengths in tokens or words."""
    lengths = [float(length) for length in (*chosen_lengths, *rejected_lengths)]
    correlation = pearson_correlation([*chosen, *rejected], lengths)
    if correlation is None:
        return skipped("length", "all lengths or all scores are equal")
    found = length_control(chosen, rejected, chosen_lengths, rejected_lengths)
    controlled = "not known" if found.accuracy is None else f"{found.accuracy:.2f}"
    value = f"correlation {correlation:+.2f}, length-controlled accuracy {controlled}"
    follows = abs(correlation) > _MOST_CORRELATION or (len(chosen) >= _LEAST_PAIRS and found.follows_length())
    threshold = f"correlation within {_MOST_CORRELATION:g}, neither side decided by length"
    advice = (
        "best-of-N and transport will change the length in place of the content; subtract a penalty per token, or "
        "train on pairs of balanced length"
    )
    return judged("length", value, threshold, "warn" if follows else "pass", advice)


def check_calibration(chosen: Sequence[float], rejected: Sequence[float]) -> Line:
    """Warn where sigmoid(score difference) is not a probability of winning."""
    n = len(chosen)
    if n < _LEAST_PAIRS:
        return skipped("calibration", f"{n} pairs are too few")
    found, won = calibration(chosen, rejected), sum(c > r for c, r in zip(chosen, rejected, strict=True))
    low, high = wilson_interval(won, n)
    value = f"mean confidence {found.confidence:.2f}, accuracy {won / n:.2f}, error {found.error:.2f}"
    is_off = not low - _MOST_GAP <= found.confidence <= high + _MOST_GAP
    by = "" if found.temperature is None else f"; divide scores by {found.temperature:.2g} to calibrate them"
    return judged(
        "calibration",
        value,
        f"confidence within {_MOST_GAP:g} of the accuracy's interval",
        "warn" if is_off else "pass",
        f"differences of scores are not log-odds, so budget.temperature has another meaning{by}",
    )
