"""From rows to a summary: one entry an arm, with intervals, and the paired differences that claims rest on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from vgf_llm.statistics.intervals import bootstrap_mean

Row = dict[str, Any]
Measure = Callable[[Row], float]


def _mean(key: str) -> Measure:
    def mean(row: Row) -> float:
        values: list[float] = row[key]
        return sum(values) / len(values)

    return mean


def _cloud_nll(row: Row) -> float:
    """Pooled over the cloud: nats of all responses over their tokens."""
    nlls: list[float] = row["nll"]
    tokens: list[int] = row["tokens"]
    return sum(nll * count for nll, count in zip(nlls, tokens, strict=True)) / sum(tokens)


MEASURES: dict[str, Measure] = {
    "proxy": _mean("proxy"),
    "gold": _mean("gold"),
    "nll": _cloud_nll,
    "selected_proxy": lambda row: row["selected_proxy"],
    "selected_gold": lambda row: row["selected_gold"],
    "selected_nll": lambda row: row["selected_nll"],
    "nats": _mean("nats"),
    "changed_tokens": _mean("changed"),
    "displacement": _mean("displacement"),
    "tokens": _mean("tokens"),
    "eos_rate": _mean("ended"),
    "repetition": _mean("repetition"),
    "non_ascii": _mean("non_ascii"),
    "tflops": lambda row: row["tflops"],
    "seconds": lambda row: row["seconds"],
}
COMPARED = ("proxy", "gold", "nll", "selected_proxy", "selected_gold", "selected_nll")


def summarise(rows: list[Row], arm_names: list[str]) -> dict[str, Any]:
    """Return ``{arm: {prompts, seeds, <measure>: {mean, low, high}}}`` in the given order.

    A prompt's number is the mean over its seeds; intervals are 95% bootstrap intervals over prompts. Arms without rows
    are left out; a measure that an arm does not have is None. Of a composed gold, ``gold.<part>`` is the mean over the
    responses of the cloud that the part was scored on, and ``scored`` their share.
    """
    summary: dict[str, Any] = {}
    for name in arm_names:
        arm_rows = [row for row in rows if row["arm"] == name]
        if not arm_rows:
            continue
        entry: dict[str, Any] = {
            "prompts": len({row["prompt_index"] for row in arm_rows}),
            "seeds": len({row["seed"] for row in arm_rows}),
        }
        for measure, function in MEASURES.items():
            key = "changed" if measure == "changed_tokens" else measure
            lacking = any(
                row.get(key, 0) is None for row in arm_rows
            )  # no distribution, no nats; no original, no change
            entry[measure] = None if lacking else asdict(bootstrap_mean(list(_by_prompt(arm_rows, function).values())))
        parts = {part for row in arm_rows for part in row.get("gold_parts", {})}
        entry |= {f"gold.{part}": _part(arm_rows, part) for part in sorted(parts)}
        summary[name] = entry
    return summary


def _part(rows: list[Row], part: str) -> dict[str, float] | None:
    """Return the mean of a component of the gold over prompts, None where it was never scored."""
    scored, by_prompt = [], defaultdict[int, list[float]](list)
    for row in rows:
        cloud = row["gold_parts"][part][:-1]
        values = [value for value in cloud if value is not None]
        scored.append(len(values) / len(cloud))
        if values:
            by_prompt[row["prompt_index"]].append(sum(values) / len(values))
    if not by_prompt:
        return None
    means = [sum(values) / len(values) for values in by_prompt.values()]
    return asdict(bootstrap_mean(means)) | {"scored": sum(scored) / len(scored)}


def differences(rows: list[Row], arm_names: list[str], baseline: str) -> dict[str, Any]:
    """Return ``{arm: {<measure>: {mean, low, high}}}``, arm minus baseline, paired on the prompts and seeds of both."""
    result: dict[str, Any] = {}
    for name in arm_names:
        pairs = _paired(rows, name, baseline)
        if name == baseline or not pairs:
            continue
        result[name] = {}
        for measure in COMPARED:
            function = MEASURES[measure]
            by_prompt: dict[int, list[float]] = defaultdict(list)
            for one, other in pairs:
                by_prompt[one["prompt_index"]].append(function(one) - function(other))
            result[name][measure] = asdict(bootstrap_mean([sum(d) / len(d) for d in by_prompt.values()]))
    return result


def at_equal_cost(rows: list[Row], best_of_arms: list[str], others: list[str]) -> dict[str, Any]:
    """Compare each arm with the best-of-N of equal cost: ``{arm: {than, tflops, <measure>: {mean, low, high}}}``.

    The cheapest best-of-N that costs at least as many FLOPs stands for equal cost, which is never to the arm's
    advantage; where none does, the dearest stands, and ``tflops`` below 1 says by how much it is cheaper.

    Args:
        rows: Of all arms.
        best_of_arms: Names of the arms that move nothing and return the best of N.
        others: Names of the arms to compare.

    Returns:
        ``than`` is the best-of-N's name, ``tflops`` its cost over the arm's, and the measures are arm minus best-of-N,
        paired by prompt and seed.
    """
    result: dict[str, Any] = {}
    for name in others:
        costs = {}
        for best_of in best_of_arms:
            pairs = _paired(rows, name, best_of)
            if pairs:
                costs[best_of] = sum(other["tflops"] for _, other in pairs) / sum(one["tflops"] for one, _ in pairs)
        if not costs:
            continue
        enough = {best_of: ratio for best_of, ratio in costs.items() if ratio >= 1}
        than = min(enough, key=lambda key: enough[key]) if enough else max(costs, key=lambda key: costs[key])
        measured = differences(rows, [name], than)[name]
        result[name] = {"than": than, "tflops": costs[than], **measured}
    return result


def _by_prompt(rows: list[Row], function: Measure) -> dict[int, float]:
    values: dict[int, list[float]] = defaultdict(list)
    for row in rows:
        values[row["prompt_index"]].append(function(row))
    return {prompt: sum(found) / len(found) for prompt, found in values.items()}


def _paired(rows: list[Row], name: str, baseline: str) -> list[tuple[Row, Row]]:
    others = {(row["seed"], row["prompt_index"]): row for row in rows if row["arm"] == baseline}
    mine = [row for row in rows if row["arm"] == name]
    return [(row, others[key]) for row in mine if (key := (row["seed"], row["prompt_index"])) in others]
