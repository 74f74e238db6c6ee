"""Figures of a fitted direction on responses to unseen prompts: its fidelity, and what steering needs to know of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reward_models.directions.agreement import Agreement, measure_direction, whole_position_changes
from reward_models.directions.fitting import Fitted
from reward_models.directions.ground import Ground, check_usable
from reward_models.directions.positions import Positions, sample_positions
from reward_models.directions.settings import DirectionScript
from reward_models.directions.swaps import bonus_variances
from vgf_llm.data.dialogue import PromptText
from vgf_llm.text.bonus import BonusSource
from vgf_llm.text.stream import expected_left


def sample_unseen(ground: Ground, script: DirectionScript, prompts: Sequence[PromptText]) -> Positions:
    """Sample the base's responses to prompts that a direction is not fitted to.

    Raises:
        DataError: A prompt cannot be used, or no response has a token that could be replaced.
    """
    encoded = ground.encode(prompts)
    unseen = sample_positions(ground.reference, encoded, script.responses, script.shortlist, script.seed + 1)
    check_usable(unseen, script.validation_prompts)
    return unseen


def measure_fitted(
    ground: Ground, script: DirectionScript, fitted: Fitted, unseen: Positions
) -> tuple[dict[str, dict[str, Agreement]], int]:
    """Measure the direction, and a causal head's constant, on responses to unseen prompts.

    Args:
        ground: Models.
        script: Number of substitutions, seed.
        fitted: The direction; what steering needs is added to its figures.
        unseen: Of `sample_unseen`.

    Returns:
        Agreement by reward ("reward", "gold") and direction; and the calls that it took.
    """
    fitted.figures["steering"] = measured_steering(ground, fitted, unseen)
    sources: dict[str, BonusSource] = {fitted.kind: fitted.direction}
    if fitted.constant is not None:
        sources["constant"] = fitted.constant
    found, calls = {}, 0
    for name, reward in (("reward", ground.reward), ("gold", ground.gold)):
        if reward is not None:
            before = reward.calls
            changes = whole_position_changes(reward, unseen, script.validation_substitutions, script.seed + 1)
            calls += reward.calls - before
            found[name] = {kind: measure_direction(source, unseen, changes) for kind, source in sources.items()}
    return found, calls


def measured_steering(ground: Ground, fitted: Fitted, unseen: Positions) -> dict[str, Any]:
    """Return what steering needs to know of a direction: its variance under the base, and the tokens still to come.

    Args:
        ground: Models.
        fitted: The direction.
        unseen: Base samples to prompts that it was not fitted to.
    """
    variance_X = bonus_variances(fitted.direction, unseen)
    left_T = expected_left(unseen.responses.lengths_BN.flatten(), ground.reference.sampling.max_new_tokens)
    return {"variance": float(variance_X.mean()), "left": [round(left, 3) for left in left_T.tolist()]}
