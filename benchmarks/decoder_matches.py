"""What best-of-N gives at exactly an arm's cost, from the samples of the largest best-of-N arm.

The best of n out of M base samples has the i-th highest value of the M with probability

    P(i) = C(M - i, n - 1) / C(M, n),        i = 1 .. M - n + 1,

(n drawn without replacement), so the gold and likelihood that best-of-n is expected to return need no further draws,
and vary less than those of the first n samples.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from vgf_llm.statistics.intervals import bootstrap_mean

Row = dict[str, Any]
Count = Callable[[Row, Row], tuple[int, bool]]


def best_of_n(values: list[float], of: list[float], n: int) -> float:
    """Return the expectation of ``of`` at the highest of n ``values`` drawn without replacement.

    Args:
        values: What is selected by, one a sample.
        of: What is wanted of the selected sample.
        n: From 1 to the number of samples.

    Raises:
        ValueError: If n is out of range.
    """
    m = len(values)
    if not 1 <= n <= m:
        raise ValueError(f"n must be from 1 to {m}, got {n}")
    order = sorted(range(m), key=lambda index: -values[index])
    weights = [math.comb(m - rank, n - 1) / math.comb(m, n) for rank in range(1, m - n + 2)]
    return sum(weight * of[index] for weight, index in zip(weights, order, strict=False))


def matched_count(cost: float, base: Row, key: str) -> int:
    """Return how many base samples the cost buys, rounded up, at most as many as there are."""
    m = len(base["proxy"])
    return min(m, max(1, math.ceil(cost / (base[key] / m) - 1e-6)))


def flops_count(row: Row, base: Row) -> tuple[int, bool]:
    """Return how many base samples the FLOPs of a row buy, and whether they would buy more than there are."""
    return matched_count(row["tflops"], base, "tflops"), row["tflops"] > 1.01 * base["tflops"]


def seconds_count(seconds: dict[str, float]) -> Count:
    """Return a count by time: best-of-N's seconds, measured at several N, are interpolated linearly from 0.

    Args:
        seconds: Of every arm, a prompt; those of best-of-N are named ``best-of-<N>``.
    """
    points = sorted((int(name[8:]), sec) for name, sec in seconds.items() if name.startswith("best-of-"))

    def count(row: Row, base: Row) -> tuple[int, bool]:
        wanted, below, n_below = seconds[row["arm"]], 0.0, 0
        for n, sec in points:
            if wanted <= sec:
                found = n_below + (wanted - below) / (sec - below) * (n - n_below)
                return max(1, math.ceil(found - 1e-6)), False
            n_below, below = n, sec
        return n_below, wanted > 1.01 * below

    return count


def matched(rows: list[Row], base_arm: str, count: Count = flops_count) -> dict[str, Any]:
    """Return, for every arm, the paired differences from best-of-N at its own cost.

    Args:
        rows: Of all arms.
        base_arm: The best-of-N arm whose samples are drawn from.
        count: Maps a row and the base arm's row of the same prompt to the n that costs the same, and whether there
            are too few samples for it.

    Returns:
        ``{arm: {n, over, prompts, selected_gold: {mean, low, high}, selected_proxy: ..., selected_nll: ...}}``, arm
        minus best-of-n; ``n`` is the mean over prompts, ``over`` the share of prompts where the arm cost more than all
        base samples together, so that the comparison favours it there.
    """
    base = {(row["seed"], row["prompt_index"]): row for row in rows if row["arm"] == base_arm}
    found: dict[str, Any] = {}
    for name in dict.fromkeys(row["arm"] for row in rows):
        differences: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        counts, over = [], []
        for row in rows:
            other = base.get((row["seed"], row["prompt_index"]))
            if row["arm"] != name or other is None:
                continue
            n, too_few = count(row, other)
            counts.append(n)
            over.append(too_few)
            for key, of in (("gold", "gold"), ("proxy", "proxy"), ("nll", "nll")):
                expected = best_of_n(other["proxy"], other[of], n)
                differences[key][row["prompt_index"]].append(row[f"selected_{key}"] - expected)
        if counts:
            entry = {"n": sum(counts) / len(counts), "over": sum(over) / len(over), "prompts": len(differences["gold"])}
            for key, by_prompt in differences.items():
                entry[f"selected_{key}"] = asdict(bootstrap_mean([sum(d) / len(d) for d in by_prompt.values()]))
            found[name] = entry
    return found


def matched_markdown(found: dict[str, Any]) -> str:
    """Return the differences as a Markdown table; intervals that exclude zero are bold."""
    keys = ("selected_gold", "selected_proxy", "selected_nll")
    lines = [
        "| arm | prompts | N at equal cost | gold - best-of-N's | proxy - | NLL - |",
        "|---|---|---|---|---|---|",
    ]
    for name, entry in found.items():
        cells = []
        for key in keys:
            one = entry[key]
            text = f"{one['mean']:+.3f} [{one['low']:+.3f}, {one['high']:+.3f}]"
            cells.append(f"**{text}**" if one["low"] > 0 or one["high"] < 0 else text)
        note = f" ({entry['over']:.0%} above the largest)" if entry["over"] else ""
        lines.append(f"| {name} | {entry['prompts']} | {entry['n']:.0f}{note} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
