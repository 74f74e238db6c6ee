"""The gold column of this recipe: the reward model of `reward_held_out.yaml` as a Python reward function.

It has seen other dialogues than the reward model that drives the flow, and differs from it in depth, pooling and seed.
It is still a small model of the same base: a held-out proxy that shows over-optimisation of the first one's own faults.

    gold(x, y) = (r(x, y) - mean) / std      mean and std of its scores on its validation pairs (from its card)
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

from recipes.held_out import score
from vgf_llm.errors import ModelError

FOLDER = Path("outputs/smollm2_dialogue/held_out")
MAX_NEW_TOKENS = 32  # of evaluate.yaml, and max_response_length of reward_held_out.yaml


def held_out(prompts: list[str], responses: list[str]) -> list[float]:
    """Score answers by the held-out model, in standard deviations of its scores on human answers.

    Args:
        prompts: whole dialogues as Human/Assistant text, one a response.
        responses: plain text.

    Returns:
        One score a response; 0 is the mean over its validation pairs.

    Raises:
        ModelError: outputs/smollm2_dialogue/held_out does not hold the model and its card.
    """
    rewards = score(FOLDER, prompts, responses, MAX_NEW_TOKENS)
    mean, std = _scale(str(FOLDER.resolve()))
    return [(reward - mean) / std for reward in rewards]


@functools.cache
def _scale(folder: str) -> tuple[float, float]:
    path = Path(folder) / "reward_card.json"
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
        mean, std = float(card["score_mean"]), float(card["score_std"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"'{path}' states no score_mean and score_std ({error!r}); train the model again with reward_held_out.yaml"
        ) from error
    if not std > 0:
        raise ModelError(f"'{path}': score_std is {std}: the held-out model gives every response the same score")
    return mean, std
