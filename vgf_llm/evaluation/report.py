"""A recorded run as Markdown: tables, paired differences, and texts that nobody chose."""

from __future__ import annotations

from typing import Any

from vgf_llm.evaluation.summary import Row
from vgf_llm.evaluation.table import LEGEND, difference_table, equal_cost_lines, markdown_table, part_lines

_SHOWN_PROMPTS = 10


def markdown_report(summary: dict[str, Any], rows: list[Row]) -> str:
    """Return the report of a run.

    Args:
        summary: What ``vgf_llm.evaluation.runner.finish`` returned.
        rows: The rows it was made from, for the texts; empty shows none.
    """
    hardware = ", ".join(f"{key} {value}" for key, value in summary["hardware"].items() if value is not None)
    parts = [
        f"{summary['prompts']} prompts; 95% bootstrap intervals over prompts in brackets. {LEGEND}",
        markdown_table(summary["arms"]),
    ]
    if lines := part_lines(summary["arms"]):
        parts.append("Components of the gold, mean of the cloud:")
        parts.append("\n".join(f"- {line}" for line in lines))
    if summary["equal_cost"]:
        parts.append("Against best-of-N of equal cost, selected responses, paired by prompt and seed:")
        parts.append("\n".join(f"- {line}" for line in equal_cost_lines(summary["equal_cost"])))
    for baseline, differences in summary["differences"].items():
        parts.append(f"Arm minus `{baseline}`, paired by prompt and seed; bold where the interval excludes zero:")
        parts.append(difference_table(differences))
    parts.append(f"Hardware: {hardware}.")
    if rows:
        parts += ["## Texts, unfiltered", _texts(rows, list(summary["arms"]))]
    return "\n\n".join(parts) + "\n"


def _texts(rows: list[Row], arms: list[str]) -> str:
    """Return the first particle of the first prompts at the first seed, for every arm that holds the same particles."""
    first_seed = min(row["seed"] for row in rows)
    lines = [f"The first particle of the first {_SHOWN_PROMPTS} prompts, seed {first_seed}, in every arm."]
    for index in range(_SHOWN_PROMPTS):
        found = {row["arm"]: row for row in rows if row["prompt_index"] == index and row["seed"] == first_seed}
        if not found:
            break
        lines.append(f"\n**{next(iter(found.values()))['prompt']}**\n")
        seen: set[str] = set()
        for arm in (arm for arm in arms if arm in found):
            text = " ".join(found[arm]["texts"][0].split())
            if text not in seen:  # arms that move nothing share their samples
                lines.append(f"- {arm} (gold {found[arm]['gold'][0]:+.2f}): {text}")
                seen.add(text)
    return "\n".join(lines)
