"""The decoder ``stream`` from its options: which bonus, and how its nats are steered.

direction        "lookahead" (default): the reward model itself reads the likely candidates; "table", "constant" or
                 "causal": fitted by ``vgf-llm direction`` and kept in the reward model's folder; or the folder of a
                 direction anywhere
candidates       lookahead: candidates read per token, at least 2 (default 8)
min_probability  lookahead: candidates below it are not read, in [0, 1) (default 0.01)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from reward_models.directions.saving import load_direction, load_steering
from reward_models.directions.settings import FOLDER_NAME
from reward_models.lookahead import Lookahead
from reward_models.modelling import RewardModel
from reward_models.sources import local_folder
from vgf_llm.answering.implicit_policy import ImplicitPolicy
from vgf_llm.console.progress import working
from vgf_llm.errors import ConfigError
from vgf_llm.flow.budget import TransportBudget
from vgf_llm.settings import check_decoder_options
from vgf_llm.settings.shared import check_one_pass_budget
from vgf_llm.text.bonus import BonusSource
from vgf_llm.text.noise import row_seeds
from vgf_llm.text.protocols import Reference, Value
from vgf_llm.text.reference import TorchReference
from vgf_llm.text.stream import Steering, StreamSampler

_FITTED = ("table", "constant", "causal")
_CALIBRATION_PROMPTS, _CALIBRATION_TEXTS, _CALIBRATION_SEED = 8, 2, 0x57EE7


@dataclass(frozen=True)
class Directions:
    """Where fitted directions are looked for.

    Attributes:
        tokenizer: The base model's.
        reward_model: The reward model, a folder or a name on the hub, whose directions are looked for by kind; None
            for none.
    """

    tokenizer: PreTrainedTokenizerBase
    reward_model: str | None = None


def stream_sampler(
    reference: Reference,
    value: Value,
    budget: TransportBudget,
    options: Mapping[str, Any] | None = None,
    directions: Directions | None = None,
) -> StreamSampler:
    """Return the one-pass sampler that options and budget imply.

    Raises:
        ConfigError: An option is unknown or out of range, the budget asks for what one pass has not, or the reference
            does not run in this process.
        ModelError: A fitted direction is absent, or belongs to another reward, base or tokenizer.
    """
    options = dict(options or {})
    check_decoder_options("stream", options)
    if not isinstance(reference, TorchReference):
        raise ConfigError("the decoder 'stream' reads the base model in this process: set backend to transformers")
    check_one_pass_budget(budget, "the decoder 'stream'")
    name = options.get("direction", "lookahead")
    steering = Steering(budget.nats, budget.max_token_nats)
    if name == "lookahead":
        return StreamSampler(reference, _lookahead(value, options), steering)
    for key in ("candidates", "min_probability"):
        if key in options:
            raise ConfigError(f"decoder_options: {key} belongs to the direction lookahead, got direction {name!r}")
    outputs = value.reward_outputs if isinstance(value, RewardModel) else None
    source, steering = _fitted(reference, name, steering, directions, outputs)
    return StreamSampler(reference, source, steering)


def _lookahead(value: Value, options: Mapping[str, Any]) -> Lookahead:
    if not isinstance(value, RewardModel):
        raise ConfigError(
            f"decoder_options: the direction lookahead reads a reward model token by token, not a "
            f"{type(value).__name__}; fit one with `vgf-llm direction` and name it"
        )
    candidates, least = options.get("candidates", 8), options.get("min_probability", 0.01)
    if not isinstance(candidates, int) or isinstance(candidates, bool) or candidates < 2:
        raise ConfigError(f"decoder_options: candidates must be an integer of at least 2, got {candidates!r}")
    if not isinstance(least, int | float) or not 0 <= least < 1:
        raise ConfigError(f"decoder_options: min_probability must be in [0, 1), got {least!r}")
    return Lookahead(value, candidates, float(least))


def _fitted(
    reference: TorchReference,
    name: Any,
    steering: Steering,
    directions: Directions | None,
    outputs: Mapping[str, float] | None,
) -> tuple[BonusSource, Steering]:
    if directions is None:
        raise ConfigError(f"decoder_options: direction {name!r} has to be loaded, which this command does not do")
    folder = Path(str(name))
    if name in _FITTED:
        if directions.reward_model is None:
            raise ConfigError(
                f"decoder_options: direction {name!r} is looked for beside a reward model; name its folder"
            )
        folder = Path(local_folder(directions.reward_model), FOLDER_NAME, str(name))
        if not folder.is_dir():
            raise ConfigError(
                f"decoder_options: there is no direction {name!r} in '{directions.reward_model}'; fit it with "
                f"`vgf-llm direction --kind {name} --reward {directions.reward_model}`"
            )
    elif not folder.is_dir():
        raise ConfigError(
            f"decoder_options: direction {name!r} is neither lookahead, {', '.join(_FITTED)} nor the folder of one"
        )
    is_own = name in _FITTED or _lies_in(folder, directions.reward_model)  # another may be of another reward
    reward = local_folder(str(directions.reward_model)) if is_own else None
    source = load_direction(folder, reference.model, directions.tokenizer, reward, outputs if is_own else None)
    return source, load_steering(folder, steering, reference.sampling.max_new_tokens)


def _lies_in(folder: Path, reward_model: str | None) -> bool:
    """Return whether a direction lies among those of a reward model's own folder."""
    return reward_model is not None and folder.resolve().parent.parent == Path(local_folder(reward_model)).resolve()


def calibrate(policy: ImplicitPolicy, prompts: Sequence[list[int]]) -> None:
    """Steer a policy that draws in one pass by plain samples to some of the prompts that it will answer.

    Nothing is done for another decoder, or where a fitted direction brought what steering needs. The samples have seeds
    of their own, so a text depends on the prompts that are asked together in a run, and never on its batch.

    Args:
        policy: Of :func:`vgf_llm.answering.assemble.make_policy`.
        prompts: Every prompt of the run, encoded; the first few are used.
    """
    stream, some = policy.decoder, list(prompts[:_CALIBRATION_PROMPTS])
    if isinstance(stream, StreamSampler) and stream.steering.variance is None and some and not policy.budget.is_none:
        seeds_BN = row_seeds(_CALIBRATION_SEED, list(range(len(some))), _CALIBRATION_TEXTS)
        with working("sampling a few texts that steer the nats"):
            policy.decoder = stream.calibrated(some, seeds_BN)
