"""PEFT adapters as base models: whose they are, how many rows their tables have, and the merge into plain weights.

An adapter that was trained after tokens were added (or a padded table was cut) holds whole tables of another number of
rows than its base, so the base is resized before the adapter is applied. After the merge the logits on a few ids must
be those of the model with the adapter.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from vgf_llm.errors import ModelError
from vgf_llm.models.architecture import difference, input_table, tolerance

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
_NOT_GENERATING = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION", "SEQ_2_SEQ_LM")
_SCORING_HEADS = {"head", "skip_head", "score", "classifier", "v_head"}


def adapter_base(folder: Path) -> str:
    """Return the name of the base model that adapter_config.json gives.

    Raises:
        ModelError: It cannot be read, or names no base or itself.
    """
    name = _read_config(folder).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise ModelError(
            f"'{folder / CONFIG_NAME}' does not say which base model the adapter belongs to: "
            f"base_model_name_or_path is {name!r}; write the base's name there, or name a merged model"
        )
    if Path(name).is_dir() and Path(name).resolve() == folder.resolve():
        raise ModelError(
            f"'{folder / CONFIG_NAME}' names its own folder as the base model (base_model_name_or_path); write the "
            "base's name there"
        )
    return name


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"'{path}' cannot be read ({error}); save the adapter again") from error
    if not isinstance(found, dict):
        raise ModelError(f"'{path}' holds a {type(found).__name__} where an object is expected; save the adapter again")
    return found


def refuse_scoring_adapter(folder: Path) -> None:
    """Refuse an adapter that scores texts where one that writes them is wanted.

    Raises:
        ModelError: The adapter is of a reward model or a classifier.
    """
    config = _read_config(folder)
    heads = sorted(_SCORING_HEADS & set(config.get("modules_to_save") or ()))
    task = config.get("task_type")
    if task in _NOT_GENERATING or heads:
        what = f"task_type {task!r}" if task in _NOT_GENERATING else f"a trained {', '.join(heads)}"
        raise ModelError(
            f"'{folder}' holds the adapter of a reward model or classifier ({what}), not of a language model; name its "
            f"base model ({config.get('base_model_name_or_path')!r}), or an adapter that was trained to write"
        )


def with_adapter(base: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Merge an adapter into its base, in the base's dtype.

    Args:
        base: Causal language model; changed in place.
        folder: Of the adapter.

    Raises:
        ModelError: The adapter is unreadable, changes no weights, does not fit the base, or the merged weights answer
            differently.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from peft.utils import set_peft_model_state_dict
    from peft.utils.save_and_load import load_peft_weights

    _check_whole(folder)
    tables = _table_names(base)
    try:
        _resize(base, folder)
        adapted = PeftModel.from_pretrained(base, str(folder))
        weights = load_peft_weights(str(folder), device="cpu")
        loaded: Any = set_peft_model_state_dict(adapted, dict(weights))
        unexpected = loaded.unexpected_keys
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, SafetensorError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        first_line = " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1]).rstrip(".")
        raise ModelError(
            f"the adapter '{folder}' does not fit its base model: {first_line}. Name the base that it was trained on, "
            "or merge it where it was trained and name the merged model"
        ) from error
    # PEFT saves whole tables that it trains two or three times over where their rows changed, and reads one of them.
    strange = [key for key in unexpected if not any(f".{name}." in key for name in tables)]
    if strange:
        raise ModelError(
            f"the adapter '{folder}' has weights that its base model has no place for, {strange[0]!r} first; is it of "
            "another kind of model?"
        )
    own = get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
    lacking = sorted(key for key in own - weights.keys() if not any(f".{name}." in key for name in tables))
    if lacking:
        raise ModelError(
            f"the adapter '{folder}' lacks weights for parts of its base model, {lacking[0]!r} first, so it was "
            "trained on another one; name the base that it was trained on"
        )
    expected = _logits(adapted)
    _untie(base)
    merged: PreTrainedModel = adapted.merge_and_unload(safe_merge=True)
    _settle_ties(merged)
    found = _logits(merged)
    if difference(found, expected) > tolerance(found):
        raise ModelError(
            f"the adapter '{folder}' cannot be merged: the merged weights give other logits (they differ by "
            f"{difference(found, expected):.2g} of their mean size); merge it where it was trained"
        )
    return merged


def _check_whole(folder: Path) -> None:
    """Refuse an adapter without weights, and one that changes no weights.

    Raises:
        ModelError: Saying which.
    """
    kind = str(_read_config(folder).get("peft_type"))
    if any(word in kind for word in ("PROMPT", "PREFIX", "P_TUNING", "CPT")):
        raise ModelError(
            f"the adapter '{folder}' is of the kind {kind}, which puts vectors before a prompt and cannot be merged "
            "into weights; train a LoRA, or name the base model"
        )
    if not any((folder / name).is_file() for name in (WEIGHTS_NAME, "adapter_model.bin")):
        raise ModelError(f"'{folder}' has {CONFIG_NAME} and no {WEIGHTS_NAME}; save the adapter again")


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    model.eval()
    rows = model.get_input_embeddings().weight.shape[0]
    ids = [index % rows for index in (1, 2, 3, 5, 8, rows - 1)]  # the last row is the newest token
    logits: torch.Tensor = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits
    return logits


def _resize(base: PreTrainedModel, folder: Path) -> None:
    """Give the base as many rows as the adapter's tables have, where it holds any.

    Raises:
        ModelError: The tables' rows differ, or there are more rows than in the base and a table is not in the adapter.
    """
    rows, whole = _table_rows(base, folder)
    if len(rows) > 1:
        raise ModelError(
            f"the adapter '{folder}' holds tables of {' and '.join(map(str, sorted(rows)))} rows; input and output "
            "tables must have the same number of rows"
        )
    own = input_table(base).shape[0]
    if not rows or rows == {own}:
        return
    wanted, tied = rows.pop(), base.config.get_text_config(decoder=True).tie_word_embeddings
    lost = [name for name in _table_names(base) if name not in whole]
    if wanted > own and lost and not (tied and whole):
        raise ModelError(
            f"the adapter '{folder}' was trained with {wanted} rows, its base model has {own}, and the new rows of "
            f"{lost[0]} are not in the adapter, so they are lost; add it to modules_to_save, or merge before saving"
        )
    base.resize_token_embeddings(wanted, mean_resizing=False)


def _table_rows(base: PreTrainedModel, folder: Path) -> tuple[set[int], set[str]]:
    """Return the rows of the tables in an adapter's weights, and the names of the tables that it holds whole."""
    path, names = folder / WEIGHTS_NAME, _table_names(base)
    rows: set[int] = set()
    whole: set[str] = set()
    if not path.is_file():
        return rows, whole
    with safe_open(path, "pt") as weights:
        for key in weights.keys():  # noqa: SIM118 - not a dict
            short = key
            for wrapper in (".token_adapter", ".base_layer", ".modules_to_save.default", ".original_module"):
                short = short.replace(wrapper, "")
            for name in names:
                shape = weights.get_slice(key).get_shape()
                if short.endswith(f".{name}.weight"):
                    rows.add(shape[0])
                    whole.add(name)
                elif short.endswith(f".{name}.lora_B.weight"):
                    rows.add(shape[0])
                elif short.endswith(f".{name}.lora_embedding_A"):
                    rows.add(shape[1])
    return rows, whole


def _table_names(base: PreTrainedModel) -> list[str]:
    tables = (base.get_input_embeddings(), base.get_output_embeddings())
    return [name for name, module in base.named_modules() if any(module is table for table in tables)]


def _untie(base: PreTrainedModel) -> None:
    """Untie tied tables, so that an adapter on one of them is not merged into both."""
    tables: list[Any] = [
        getattr(module, "base_layer", module) for module in (base.get_input_embeddings(), base.get_output_embeddings())
    ]
    if all(hasattr(table, "weight") for table in tables) and tables[0].weight is tables[1].weight:
        tables[1].weight = torch.nn.Parameter(tables[1].weight.detach().clone(), requires_grad=False)


def _settle_ties(model: PreTrainedModel) -> None:
    """Tie tables again that are equal after a merge; say that they are not tied where an adapter made them differ."""
    config = model.config.get_text_config(decoder=True)
    output: Any = model.get_output_embeddings()
    if not config.tie_word_embeddings or output is None:
        return
    table = input_table(model)
    if output.weight is table:
        return
    if output.weight.shape == table.shape and torch.equal(output.weight, table):
        model.tie_weights()
    else:
        config.tie_word_embeddings = model.config.tie_word_embeddings = False
