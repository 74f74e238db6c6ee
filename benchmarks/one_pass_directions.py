"""The directions that `benchmarks.one_pass` compares, by name."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

from reward_models.directions.ground import Ground
from reward_models.directions.reward import ModelReward
from reward_models.directions.saving import WEIGHTS_NAME, load_direction, reward_digest
from reward_models.directions.settings import FOLDER_NAME
from reward_models.lookahead import Lookahead
from vgf_llm.errors import VGFError
from vgf_llm.text.bonus import BonusSource


def directions(ground: Ground, reward: str, folder: Path, names: Sequence[str]) -> dict[str, BonusSource]:
    """Return the bonus of each named direction; what was not fitted is left out with a word.

    Args:
        ground: Base and reward.
        reward: Its name.
        folder: Fitted directions lie in its folder ``directions``, by name.
        names: What is asked for; ``prior`` is not a direction and is passed over.
    """
    found: dict[str, BonusSource] = {}
    for name in names:
        own = folder / FOLDER_NAME / name
        if name == "lookahead" and isinstance(ground.reward, ModelReward):
            try:
                found[name] = Lookahead(ground.reward.value)
            except VGFError as error:
                print(f"{name}: left out: {error}", file=sys.stderr)
        elif own.is_dir():
            found[name] = load_direction(own, ground.reference.model, ground.tokenizer, reward)
        elif name not in ("prior", "lookahead"):
            print(f"{name}: left out, '{own}' is not there; fit it with `vgf-llm direction`", file=sys.stderr)
    return found


def written_by(reward: str, folder: Path, names: Sequence[str]) -> dict[str, str]:
    """Return the mark of what writes each arm's texts: digests of the reward, a secant head and the direction.

    Args:
        reward: A reward model's folder, or a function.
        folder: Of the directions.
        names: Directions; plain samples are scored by the reward alone, and have its mark.
    """
    mark = str(reward_digest(reward))[:12]
    found = {"plain": mark}
    for name in names:
        own = folder / ("secant.safetensors" if name == "prior" else f"{FOLDER_NAME}/{name}/{WEIGHTS_NAME}")
        fitted = own.is_file() and name != "lookahead"
        found[name] = f"{mark} {hashlib.sha256(own.read_bytes()).hexdigest()[:12]}" if fitted else mark
    return found
