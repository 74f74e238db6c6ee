"""One direction from prompts and a reward: sample, score, fit. `ground` loads, `measuring` measures."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from reward_models.directions.causal import CausalDirection, fit_causal
from reward_models.directions.constant import ConstantFit, fit_constant
from reward_models.directions.ground import Ground, check_usable, read_guided
from reward_models.directions.positions import Positions, sample_positions
from reward_models.directions.regrown import regrown_changes
from reward_models.directions.reward import ModelReward
from reward_models.directions.saving import Direction, Kind
from reward_models.directions.settings import DirectionScript, DirectionTraining
from reward_models.directions.table import candidate_tokens, fit_table, observations_of, observe_tokens
from reward_models.directions.targets import BonusTargets, check_split, from_changes, from_source
from reward_models.fidelity import ExactChanges, exact_changes
from reward_models.lookahead import Lookahead
from reward_models.modelling import RewardModel
from vgf_llm.data.dialogue import PromptText, prompt_key
from vgf_llm.errors import ConfigError, DataError
from vgf_llm.text.bonus import TableBonus
from vgf_llm.text.noise import row_seeds

_TEACHER_CANDIDATES, _TEACHER_PROBABILITY = 16, 0.003


@dataclass(frozen=True)
class Fitted:
    """A direction with what it cost.

    Attributes:
        direction: The source of bonuses.
        kind: Its kind.
        constant: The constant that a causal head was started from; None for other kinds.
        calls: Responses that the reward scored.
        seconds: By stage.
        figures: Of the fit, for JSON.
    """

    direction: Direction
    kind: Kind
    constant: TableBonus | None
    calls: int
    seconds: dict[str, float]
    figures: dict[str, Any]


@dataclass
class _Clock:
    """Seconds by stage."""

    seconds: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    def lap(self, stage: str) -> None:
        """Book the time since the last lap under a name."""
        now = time.monotonic()
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + now - self.started, 1)
        self.started = now


def fit_direction(
    ground: Ground,
    script: DirectionScript,
    training: DirectionTraining,
    prompts: Sequence[PromptText],
    guided: Sequence[PromptText] = (),
) -> Fitted:
    """Sample responses, score substitutions in them, and fit the kind that is asked for.

    Args:
        ground: Models.
        script: Kind, responses, shortlist, seed.
        training: Of the fit.
        prompts: To sample responses to.
        guided: Prompts whose column ``response`` holds a response that is fitted to as well.

    Raises:
        VGFError: A prompt or response cannot be used, or the reward fails.
    """
    clock = _Clock()
    teacher = _teacher(ground, script) if training.target == "lookahead" else None
    encoded = ground.encode(prompts)
    sampled = sample_positions(ground.reference, encoded, script.responses, script.shortlist, script.seed)
    clock.lap("sample")
    given = read_guided(ground, guided, script.shortlist) if guided else None
    numbers_B = _numbers([*prompts, *guided])
    _check_prompts(script, numbers_B, [sampled] if given is None else [sampled, given])
    more = None if given is None else _swaps(ground, given, script, training)
    if script.kind == "table":
        return _fit_table(ground, script, training, sampled, more, clock)
    if teacher is None:
        targets = from_changes(sampled, _changes(ground, sampled, script, training))
    else:
        targets = from_source(teacher, sampled)
    targets = targets.numbered(numbers_B)
    targets = targets.and_more(from_changes(*more).numbered(numbers_B[len(prompts) :])) if more else targets
    clock.lap("score")
    line = fit_constant(targets, ground.table_VD)
    constant, figures = TableBonus(line.bonus_V), _constant_figures(line, targets)
    if script.kind == "constant":
        clock.lap("fit")
        return Fitted(constant, "constant", None, ground.reward.calls, clock.seconds, figures)
    head, of_head = fit_causal(targets, ground.table_VD, training, line.direction_D)
    clock.lap("fit")
    direction = CausalDirection.of(head, ground.table_VD)
    return Fitted(direction, "causal", constant, ground.reward.calls, clock.seconds, figures | of_head)


def _numbers(prompts: Sequence[PromptText]) -> Tensor:
    """Number prompts, int64; one that comes again, also from another file, has the number that it had."""
    known: dict[str, int] = {}
    return torch.tensor([known.setdefault(prompt_key(text.prompt), len(known)) for text in prompts])


def _check_prompts(script: DirectionScript, numbers_B: Tensor, parts: Sequence[Positions]) -> None:
    """Refuse responses that nothing can be fitted to; a table needs no prompt that is held back.

    Raises:
        DataError: No response has a token that could be replaced, or those to one prompt alone do.
    """
    sources = [script.prompts, str(script.guided)]
    usable = [check_usable(part, source).cpu() for part, source in zip(parts, sources, strict=False)]
    if script.kind != "table":
        check_split(numbers_B[torch.cat(usable)])


def _fit_table(
    ground: Ground,
    script: DirectionScript,
    training: DirectionTraining,
    sampled: Positions,
    more: tuple[Positions, list[ExactChanges]] | None,
    clock: _Clock,
) -> Fitted:
    """Spend a table's calls and fit it, to guided substitutions too where there are any."""
    most = training.table_calls // training.contexts
    vocabulary = ground.reference.vocabulary or len(ground.table_VD)
    tokens_V = candidate_tokens(sampled, ground.tokenizer, vocabulary, most)
    seen = observe_tokens(ground.reward, sampled, tokens_V, training.contexts, script.seed)
    seen = seen.and_more(observations_of(*more)) if more else seen
    clock.lap("score")
    table = fit_table(seen, ground.table_VD)
    clock.lap("fit")
    figures = {
        "tokens": int((table.count_V > 0).sum()),
        "observations": len(seen.token_O),
        "shrink": table.shrink,
        "held_back_error": table.held_back_error,
    }
    return Fitted(TableBonus(table.bonus_V), "table", None, ground.reward.calls, clock.seconds, figures)


def _teacher(ground: Ground, script: DirectionScript) -> Lookahead:
    """Return the lookahead of the reward, over the whole shortlist.

    Raises:
        ConfigError: The reward is not a reward model that reads the base's tokens.
    """
    value = ground.reward.value if isinstance(ground.reward, ModelReward) else None
    if not isinstance(value, RewardModel):
        raise ConfigError(
            f"target is 'lookahead', which reads a reward model token by token; {script.reward!r} can only be called: "
            "set target to swap or regrow"
        )
    return Lookahead(value, max(2, min(script.shortlist, _TEACHER_CANDIDATES)), _TEACHER_PROBABILITY)


def _changes(
    ground: Ground, positions: Positions, script: DirectionScript, training: DirectionTraining
) -> list[ExactChanges]:
    """Score substitutions in base samples: the token alone, or with its suffix."""
    if training.target == "swap":
        return _swaps(ground, positions, script, training)[1]
    B, N = positions.responses.tokens_BNT.shape[:2]
    return regrown_changes(
        ground.reference,
        ground.reward,
        positions,
        row_seeds(script.seed, list(range(B)), N),
        substitutions=training.substitutions,
        seed=script.seed,
    )


def _swaps(
    ground: Ground, positions: Positions, script: DirectionScript, training: DirectionTraining
) -> tuple[Positions, list[ExactChanges]]:
    """Score substitutions of the token alone.

    Raises:
        DataError: No response has a token that could be replaced.
    """
    responses = positions.responses
    found = exact_changes(
        ground.reward,
        responses.prompts,
        responses.tokens_BNT,
        responses.mask_BNT,
        positions.candidates_BNTK,
        substitutions=training.substitutions,
        seed=script.seed,
        eos_ids=responses.eos_ids,
        description="scoring substitutions",
    )
    if not found:
        raise DataError("no response has a token that could be replaced; sample longer or more responses")
    return positions, found


def _constant_figures(line: ConstantFit, targets: BonusTargets) -> dict[str, Any]:
    figures = {name: value for name, value in asdict(line).items() if isinstance(value, float)}
    return figures | {"positions": len(targets), "pairs": int((targets.weights_XK > 0).sum()) - len(targets)}
