"""One direction from prompts and a reward to its fidelity: sample, score, fit, measure."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from reward_models.directions.agreement import Agreement, measure_direction, whole_position_changes
from reward_models.directions.causal import CausalDirection, fit_causal
from reward_models.directions.constant import ConstantFit, fit_constant
from reward_models.directions.positions import (
    Positions,
    join_positions,
    read_positions,
    sample_positions,
)
from reward_models.directions.regrown import regrown_changes
from reward_models.directions.reward import CountedReward, ModelReward, TextPrompt, read_reward
from reward_models.directions.saving import Direction, Kind
from reward_models.directions.settings import DirectionScript, DirectionTraining
from reward_models.directions.swaps import bonus_variances
from reward_models.directions.table import candidate_tokens, fit_table, observations_of, observe_tokens
from reward_models.directions.targets import BonusTargets, from_changes, from_source
from reward_models.fidelity import ExactChanges, exact_changes
from reward_models.lookahead import Lookahead
from reward_models.modelling import RewardModel
from vgf_llm.console.progress import working
from vgf_llm.data.dialogue import PromptText
from vgf_llm.data.encoding import encode_prompts, encode_response
from vgf_llm.errors import ConfigError, DataError
from vgf_llm.machine.device import resolve_device
from vgf_llm.models.architecture import input_table
from vgf_llm.models.base import LoadedBase, load_base, tokenizer_of
from vgf_llm.settings import SamplingSettings
from vgf_llm.text.bonus import BonusSource, TableBonus
from vgf_llm.text.noise import row_seeds
from vgf_llm.text.reference import TorchReference
from vgf_llm.text.responses import Responses
from vgf_llm.text.stream import expected_left

_PROMPTS_A_BATCH = 16
_TEACHER_CANDIDATES, _TEACHER_PROBABILITY = 16, 0.003


@dataclass(frozen=True)
class Ground:
    """The models of a fit.

    Attributes:
        base: The base model.
        reference: Its distribution.
        reward: What is fitted.
        gold: A second reward that fidelity is stated to; None for none.
    """

    base: LoadedBase
    reference: TorchReference
    reward: CountedReward
    gold: CountedReward | None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base model's."""
        return self.base.tokenizer

    @property
    def table_VD(self) -> Tensor:
        """The base model's input embeddings."""
        return input_table(self.reference.model)

    def encode(self, prompts: Sequence[PromptText], source: str = "") -> list[TextPrompt]:
        """Encode prompts and keep their texts, which functions read.

        Raises:
            DataError: Naming a prompt that is empty or too long.
        """
        new_tokens = self.reference.sampling.max_new_tokens
        encoded = encode_prompts(
            self.tokenizer, prompts, self.base.rows, self.base.max_positions, new_tokens, source=source
        )
        return [TextPrompt(ids, text) for ids, text in zip(encoded, prompts, strict=True)]


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


def load_ground(script: DirectionScript, sampling: SamplingSettings) -> Ground:
    """Load base model and rewards.

    Raises:
        VGFError: One of them cannot be loaded.
    """
    tokenizer, device = tokenizer_of(script), resolve_device(script.device)
    with working(f"loading the reward {script.reward}"):
        reward = read_reward(script.reward, tokenizer, device, script.reward_outputs or None)
        gold = None if script.gold is None else read_reward(script.gold, tokenizer, device)
    with working(f"loading the base model {script.model_name_or_path}"):
        base = load_base(script, tokenizer, device)
    tables = [len(one.value.embedding_table_VD) for one in (reward, gold) if isinstance(one, ModelReward)]
    base = base.within(min(tables)) if tables else base
    reference = TorchReference(base.lm, sampling, base.eos_ids, base.pad_id, base.vocabulary)
    return Ground(base, reference, reward, gold)


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
    encoded = ground.encode(prompts)
    sampled = sample_positions(ground.reference, encoded, script.responses, script.shortlist, script.seed)
    clock.lap("sample")
    more = _swaps(ground, read_guided(ground, guided, script.shortlist), script, training) if guided else None
    if script.kind == "table":
        return _fit_table(ground, script, training, sampled, more, clock)
    if training.target == "lookahead":
        targets = from_source(_teacher(ground, script), sampled)
    else:
        targets = from_changes(sampled, _changes(ground, sampled, script, training))
    targets = targets.and_more(from_changes(*more)) if more else targets
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


def measure_fitted(
    ground: Ground, script: DirectionScript, fitted: Fitted, prompts: Sequence[PromptText]
) -> tuple[dict[str, dict[str, Agreement]], int]:
    """Measure the direction, and a causal head's constant, on responses to unseen prompts.

    Returns:
        Agreement by reward ("reward", "gold") and direction; and the calls that it took.
    """
    unseen = sample_positions(
        ground.reference, ground.encode(prompts), script.responses, script.shortlist, script.seed + 1
    )
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


def read_guided(ground: Ground, guided: Sequence[PromptText], shortlist: int) -> Positions:
    """Look up what stands before the tokens of given responses, one to each prompt.

    Args:
        ground: Models.
        guided: Prompts with a column ``response``; longer ones are cut to ``max_new_tokens``.
        shortlist: As for `sample_positions`.

    Raises:
        DataError: A row has no response, or one without tokens.
    """
    reference, parts = ground.reference, []
    encoded = ground.encode(guided, source=" of the guided responses")
    longest = reference.sampling.max_new_tokens
    rows = [encode_response(ground.tokenizer, text.columns["response"], eos=False)[:longest] for text in guided]
    for number, ids in enumerate(rows):
        if not ids or max(ids) >= ground.base.rows:
            raise DataError(
                f"guided: response {number} has no tokens, or one without a row in the base's table; drop it"
            )
    for start in range(0, len(rows), _PROMPTS_A_BATCH):
        batch = rows[start : start + _PROMPTS_A_BATCH]
        width = max(map(len, batch))
        tokens_B1T = torch.tensor([[ids + [reference.pad_id] * (width - len(ids))] for ids in batch])
        mask_B1T = torch.tensor([[[True] * len(ids) + [False] * (width - len(ids))] for ids in batch])
        device, group = reference.device, encoded[start : start + _PROMPTS_A_BATCH]
        responses = Responses(
            list(group), tokens_B1T.to(device), mask_B1T.to(device), reference.eos_ids, reference.pad_id
        )
        parts.append(read_positions(reference, responses, shortlist))
    return join_positions(parts)


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
