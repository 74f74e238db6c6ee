"""The directions that `benchmarks.one_pass` compares, by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reward_models.lookahead import Lookahead
from vgf_llm.answering.pipeline import Pipeline
from vgf_llm.text.bonus import BonusSource


def directions(
    pipeline: Pipeline[Any], fitted: list[list[int]], folder: Path, names: Sequence[str]
) -> dict[str, BonusSource]:
    """Return the bonus of each named direction.

    Args:
        pipeline: Base and reward model.
        fitted: Prompts to fit on.
        folder: Of the reward model.
        names: What is asked for; ``prior`` and unknown names are left out.
    """
    found: dict[str, BonusSource] = {}
    if "lookahead" in names:
        found["lookahead"] = Lookahead(pipeline.value)
    return found
