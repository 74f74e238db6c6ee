"""The directions that `benchmarks.one_pass` compares, by name."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reward_models.directions.saving import WEIGHTS_NAME, load_direction, reward_digest
from reward_models.directions.settings import FOLDER_NAME
from reward_models.lookahead import Lookahead
from vgf_llm.answering.pipeline import Pipeline
from vgf_llm.text.bonus import BonusSource


def directions(pipeline: Pipeline[Any], folder: Path, names: Sequence[str]) -> dict[str, BonusSource]:
    """Return the bonus of each named direction; what was not fitted is left out with a word.

    Args:
        pipeline: Base and reward model.
        folder: Of the reward model; fitted directions lie in its folder ``directions``, by name.
        names: What is asked for; ``prior`` is not a direction and is passed over.
    """
    found: dict[str, BonusSource] = {}
    for name in names:
        own = folder / FOLDER_NAME / name
        if name == "lookahead":
            found[name] = Lookahead(pipeline.value)
        elif own.is_dir():
            found[name] = load_direction(own, pipeline.reference.model, pipeline.tokenizer, str(folder))
        elif name != "prior":
            print(f"{name}: left out, '{own}' is not there; fit it with `vgf-llm direction`", file=sys.stderr)
    return found


def written_by(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """Return the mark of what writes each arm's texts: digests of the reward model, its secant head and the direction.

    Args:
        folder: Of the reward model.
        names: Directions; plain samples are scored by the reward model alone, and have its mark.
    """
    reward = str(reward_digest(str(folder)))[:12]
    found = {"plain": reward}
    for name in names:
        own = folder / ("secant.safetensors" if name == "prior" else f"{FOLDER_NAME}/{name}/{WEIGHTS_NAME}")
        fitted = own.is_file() and name != "lookahead"
        found[name] = f"{reward} {hashlib.sha256(own.read_bytes()).hexdigest()[:12]}" if fitted else reward
    return found
