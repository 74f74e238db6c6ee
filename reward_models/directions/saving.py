"""Directions on disk: direction.safetensors and direction.json in a folder of their own, whole or absent under a kill.

The JSON says what the direction was fitted to: the reward by name and digest, the base model by the mark of its weights
and the tokenizer by its fingerprint. A direction is not loaded for other ones.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reward_models.directions.causal import CausalDirection, CausalHead
from reward_models.functions import load_function
from reward_models.secant import weights_digest
from vgf_llm.errors import ModelError
from vgf_llm.models.architecture import input_table
from vgf_llm.models.loading import fingerprint
from vgf_llm.runs.files import write_json_atomic
from vgf_llm.runs.provenance import model_mark
from vgf_llm.runs.result import replaced, settle
from vgf_llm.text.bonus import BonusSource, TableBonus
from vgf_llm.text.stream import Steering

WEIGHTS_NAME, FACTS_NAME = "direction.safetensors", "direction.json"
Direction: TypeAlias = TableBonus | CausalDirection
Kind: TypeAlias = Literal["table", "constant", "causal"]
_ADVICE = "fit it with `vgf-llm direction --kind ... --reward ...`"


@dataclass(frozen=True)
class FittedTo:
    """Reward, base model and tokenizer of a direction.

    Attributes:
        reward: Folder or function, as it was named.
        reward_sha256: Of a folder's weights or a function's source; None where neither can be read.
        base_model: Name of the reference.
        base_mark: Mark of its weights (`vgf_llm.runs.provenance.model_mark`); None where it has none.
        tokenizer_sha256: Fingerprint of the tokenizer.
        template_sha256: Fingerprint of its chat template.
        reward_outputs: Weights of the reward's outputs, by name; None in files of earlier versions.
    """

    reward: str
    reward_sha256: str | None
    base_model: str
    base_mark: str | None
    tokenizer_sha256: str
    template_sha256: str
    reward_outputs: dict[str, float] | None = None

    @classmethod
    def of(
        cls,
        reward: str,
        base_model: str,
        lm: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        outputs: Mapping[str, float] | None = None,
    ) -> FittedTo:
        """Take the marks of what is in use now."""
        prints = fingerprint(tokenizer)
        marks = reward_digest(reward), base_model, model_mark(lm), prints.tokenizer, prints.template
        return cls(reward, *marks, None if outputs is None else dict(outputs))


def reward_digest(reward: str) -> str | None:
    """Return the SHA-256 of a folder's weights, or of a function's source where Python can show it."""
    if Path(reward).is_dir():
        return weights_digest(reward)
    try:
        source = inspect.getsource(load_function(reward))
    except (OSError, TypeError):  # a built-in, or a callable object
        return None
    return hashlib.sha256(source.encode()).hexdigest()


def save_direction(
    direction: Direction | CausalHead, kind: Kind, folder: str | Path, fitted_to: FittedTo, **facts: Any
) -> None:
    """Write a direction; a kill leaves the old pair of files or the new one.

    Args:
        direction: What was fitted; of a causal one, the head is enough.
        kind: Its kind.
        folder: Where it goes; created if missing.
        fitted_to: Reward, base and tokenizer.
        facts: Fidelity, cost and settings for direction.json, anything that JSON holds.

    Raises:
        OutputError: The folder refuses a write.
    """
    if isinstance(direction, TableBonus):
        tensors, shape = {"bonus": direction.bonus_V.contiguous()}, {"vocabulary": len(direction.bonus_V)}
    else:
        head = direction if isinstance(direction, CausalHead) else direction.head
        tensors = {name: tensor.contiguous() for name, tensor in head.state_dict().items()}
        shape = {"hidden_width": head.hidden_width, "width": head.width, "units": head.units}
        shape["vocabulary"] = head.vocabulary
    with replaced(folder, FACTS_NAME) as staging:
        save_file(tensors, staging / WEIGHTS_NAME)
        write_json_atomic(staging / FACTS_NAME, {"kind": kind, **shape, "fitted_to": asdict(fitted_to)} | facts)


def load_direction(
    folder: str | Path,
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    reward: str | None = None,
    outputs: Mapping[str, float] | None = None,
) -> BonusSource:
    """Read a direction and check that it belongs to this base model, tokenizer and reward.

    A table or constant is a number per token, which another model of the same tokenizer may be tilted by. A causal
    direction reads hidden states, so that it is refused for other weights.

    Args:
        folder: Where `save_direction` wrote to.
        lm: The reference.
        tokenizer: Its tokenizer.
        reward: The reward that is in use, a folder or function; None looks at the one that the direction names, where
            its folder is still there.
        outputs: Weights of its outputs that are in use, by name; None compares none.

    Raises:
        ModelError: There is none, it cannot be read, or it was fitted to something else.
    """
    settle(folder)
    path = Path(folder) / FACTS_NAME
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        kind, fitted_to = facts["kind"], FittedTo(**facts["fitted_to"])
        tensors = load_file(Path(folder) / WEIGHTS_NAME)
    except FileNotFoundError as error:
        raise ModelError(f"'{folder}' has no {Path(error.filename or FACTS_NAME).name}; {_ADVICE}") from error
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise ModelError(f"the direction in '{folder}' cannot be read ({error!r}); {_ADVICE}") from error
    _check_reward(folder, fitted_to, reward)
    if None not in (outputs, fitted_to.reward_outputs) and outputs != fitted_to.reward_outputs:
        raise ModelError(
            f"the direction in '{folder}' was fitted to reward_outputs {fitted_to.reward_outputs}, and those in use "
            f"are {outputs}; give the former, or {_ADVICE} again"
        )
    _check_tokens(folder, fitted_to, tokenizer)
    try:
        return _built(folder, kind, facts, tensors, fitted_to, lm)
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(f"the direction in '{folder}' cannot be read ({error!r}); {_ADVICE}") from error


def load_steering(folder: str | Path, steering: Steering, longest: int) -> Steering:
    """Return the steering with the variance of a saved direction, and the lengths of the samples it was measured on.

    Args:
        folder: Of a direction that was loaded.
        steering: Nats and their cap.
        longest: Longest response now; lengths that were seen under another limit are not used.
    """
    facts = json.loads((Path(folder) / FACTS_NAME).read_text(encoding="utf-8")).get("steering")
    if facts is None:
        return steering
    left_T = tensor(facts["left"]) if len(facts["left"]) == longest else None
    return replace(steering, variance=float(facts["variance"]), left_T=left_T)


def _built(
    folder: str | Path, kind: str, facts: dict[str, Any], tensors: dict[str, Tensor], fitted_to: FittedTo, lm: Any
) -> BonusSource:
    table_VD = input_table(lm)
    if kind in ("table", "constant"):
        bonus_V = tensors["bonus"]
        if len(bonus_V) != len(table_VD):
            raise ModelError(
                f"the direction in '{folder}' has {len(bonus_V)} tokens, the base model {len(table_VD)}; {_ADVICE} for "
                "this base model"
            )
        return TableBonus(bonus_V.float().to(table_VD.device))
    if kind != "causal":
        raise ValueError(f"kind {kind!r}")
    mark = model_mark(lm)
    if None not in (mark, fitted_to.base_mark) and mark != fitted_to.base_mark:
        raise ModelError(
            f"the causal direction in '{folder}' reads the hidden states of {fitted_to.base_model!r} as it was when it "
            f"was fitted (mark {str(fitted_to.base_mark)[:12]}, these weights {str(mark)[:12]}); name that base model, "
            "or fit it again"
        )
    sizes = (int(facts[name]) for name in ("hidden_width", "width", "vocabulary", "units"))
    head = CausalHead(*sizes)
    head.load_state_dict(tensors)
    if (head.vocabulary, head.width) != table_VD.shape:
        raise ModelError(
            f"the causal direction in '{folder}' is for a table of {head.vocabulary} by {head.width}, the base model's "
            f"is {len(table_VD)} by {table_VD.shape[1]}; fit it again"
        )
    return CausalDirection.of(head.to(table_VD.device).eval().requires_grad_(False), table_VD)


def _check_reward(folder: str | Path, fitted_to: FittedTo, reward: str | None) -> None:
    """Refuse a direction of other reward weights."""
    name = fitted_to.reward if reward is None else reward
    if reward is None and not Path(name).is_dir():  # moved, or a function: nothing to compare with
        return
    found = reward_digest(name)
    if None not in (found, fitted_to.reward_sha256) and found != fitted_to.reward_sha256:
        raise ModelError(
            f"the direction in '{folder}' was fitted to {fitted_to.reward!r} with SHA-256 "
            f"{str(fitted_to.reward_sha256)[:12]}, and {name!r} has {str(found)[:12]} now; {_ADVICE} again"
        )


def _check_tokens(folder: str | Path, fitted_to: FittedTo, tokenizer: PreTrainedTokenizerBase) -> None:
    found = fingerprint(tokenizer).tokenizer
    if found != fitted_to.tokenizer_sha256:
        raise ModelError(
            f"the direction in '{folder}' was fitted to another tokenizer (fingerprint "
            f"{fitted_to.tokenizer_sha256[:12]}, this one {found[:12]}); use the tokenizer of "
            f"{fitted_to.base_model!r}, or fit it again"
        )
