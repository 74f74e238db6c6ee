"""PEFT adapters as base models: whose they are, how many rows their tables have, and the merge into plain weights.

An adapter that was trained after tokens were added (or a padded table was cut) holds whole tables of another number of
rows than its base, so the base is resized before the adapter goes on. After the merge the logits on a few ids must be
those of the model with the adapter.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from vgf_llm.architecture import difference, tolerance
from vgf_llm.errors import ModelError
from vgf_llm.screen import say

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
_NOT_GENERATING = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION", "SEQ_2_SEQ_LM")
_SCORING_HEADS = {"head", "skip_head", "score", "classifier", "v_head"}


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Return what adapter_config.json says.

    Raises:
        ModelError: It cannot be read, or names no base.
    """
    path = folder / CONFIG_NAME
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found["base_model_name_or_path"], str):
            raise ValueError("base_model_name_or_path is empty")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"'{path}' does not say which base model the adapter belongs to ({error!r}); save the adapter again, or "
            "name a merged model"
        ) from error
    return found


def refuse_scoring_adapter(folder: Path) -> None:
    """Refuse an adapter that scores texts where one that writes them is wanted.

    Raises:
        ModelError: The adapter is of a reward model or a classifier.
    """
    config = read_adapter_config(folder)
    heads = sorted(_SCORING_HEADS & set(config.get("modules_to_save") or ()))
    task = config.get("task_type")
    if task in _NOT_GENERATING or heads:
        what = f"task_type {task!r}" if task in _NOT_GENERATING else f"a trained {', '.join(heads)}"
        raise ModelError(
            f"'{folder}' holds the adapter of a reward model or classifier ({what}), not of a language model; name its "
            f"base model, {config['base_model_name_or_path']!r}, or an adapter that was trained to write"
        )


def with_adapter(base: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Merge an adapter into its base, in the base's dtype.

    Args:
        base: Causal language model; changed in place.
        folder: Of the adapter.

    Raises:
        ModelError: The adapter is unreadable, does not fit the base, or the merged weights answer differently.
    """
    from peft import PeftModel
    from peft.utils import set_peft_model_state_dict
    from peft.utils.save_and_load import load_peft_weights

    try:
        _resize(base, folder)
        adapted = PeftModel.from_pretrained(base, str(folder))
        weights = load_peft_weights(str(folder), device="cpu")
        strange = set_peft_model_state_dict(adapted, dict(weights)).unexpected_keys
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, SafetensorError) as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"the adapter '{folder}' does not fit its base model: {first_line}. Name the base that it was trained on, "
            "or merge it where it was trained and name the merged model"
        ) from error
    if strange:
        raise ModelError(
            f"the adapter '{folder}' has weights that its base model has no place for, {strange[0]!r} first; is it of "
            "another kind of model?"
        )
    expected = _logits(adapted)
    merged = adapted.merge_and_unload(safe_merge=True)
    _settle_ties(merged)
    found = _logits(merged)
    if difference(found, expected) > tolerance(found):
        raise ModelError(
            f"the adapter '{folder}' cannot be merged: the merged weights give other logits (they differ by "
            f"{difference(found, expected):.2g} of their mean size); merge it where it was trained"
        )
    return merged


@torch.no_grad()
def _logits(model: torch.nn.Module) -> torch.Tensor:
    model.eval()
    rows = model.get_input_embeddings().weight.shape[0]
    ids = [index % rows for index in (1, 2, 3, 5, 8, rows - 1)]  # the last row is the newest token
    return model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits


def _resize(base: PreTrainedModel, folder: Path) -> None:
    """Give the base as many rows as the adapter's whole tables have, where it holds any."""
    rows = _table_rows(base, folder)
    if len(rows) > 1:
        raise ModelError(
            f"the adapter '{folder}' holds tables of {' and '.join(map(str, sorted(rows)))} rows; input and output "
            "tables must have as many rows as each other"
        )
    if rows and rows != {base.get_input_embeddings().weight.shape[0]}:
        base.resize_token_embeddings(rows.pop(), mean_resizing=False)


def _table_rows(base: PreTrainedModel, folder: Path) -> set[int]:
    """Return the rows of every input and output table in an adapter's weights."""
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        return set()
    tables = (base.get_input_embeddings(), base.get_output_embeddings())
    names = [name for name, module in base.named_modules() if any(module is table for table in tables)]
    rows = set()
    with safe_open(path, "pt") as weights:
        for key in weights.keys():  # noqa: SIM118 - not a dict
            short = (
                key.replace(".base_layer", "").replace(".modules_to_save.default", "").replace(".original_module", "")
            )
            for name in names:
                shape = weights.get_slice(key).get_shape()
                if short.endswith((f".{name}.weight", f".{name}.lora_B.weight")):
                    rows.add(shape[0])
                elif short.endswith(f".{name}.lora_embedding_A"):
                    rows.add(shape[1])
    return rows


def _settle_ties(model: PreTrainedModel) -> None:
    """Tie tables again that are equal after a merge; say that they are not tied where an adapter made them differ."""
    config, output = model.config.get_text_config(decoder=True), model.get_output_embeddings()
    if not config.tie_word_embeddings or output is None:
        return
    table = model.get_input_embeddings().weight
    if output.weight is table:
        return
    if output.weight.shape == table.shape and torch.equal(output.weight, table):
        model.tie_weights()
    else:
        config.tie_word_embeddings = model.config.tie_word_embeddings = False


def left_out(adapted: torch.nn.Module) -> dict[str, float]:
    """Return which weights of the layers a LoRA leaves as they are, as shares of all of them, largest first.

    Embedding tables, output layers and vectors (norms, biases) are not counted. Weights are named by the end of their
    path, layer numbers left out.
    """
    adapters, tables = set(), set()
    for module in adapted.modules():
        if hasattr(module, "base_layer"):
            adapters |= {id(parameter) for parameter in module.base_layer.parameters()}
        if isinstance(module, torch.nn.Embedding):
            tables |= {id(parameter) for parameter in module.parameters()}
    output = adapted.get_output_embeddings() if hasattr(adapted, "get_output_embeddings") else None
    if output is not None:
        tables |= {id(parameter) for parameter in output.parameters()}
    total, found = 0, {}
    for name, parameter in adapted.named_parameters():
        if "lora_" in name or "modules_to_save" in name or parameter.dim() < 2 or id(parameter) in tables:
            continue
        size = int(getattr(parameter, "ds_numel", parameter.numel()))
        total += size
        if id(parameter) not in adapters:
            short = ".".join(part for part in name.split(".") if not part.isdigit()).split("layers.")[-1]
            found[short] = found.get(short, 0) + size
    return {name: size / total for name, size in sorted(found.items(), key=lambda entry: -entry[1])}


def tell_left_out(adapted: torch.nn.Module, above: float = 0.05) -> None:
    """Say on standard error which weights a LoRA leaves out where they are more than a share of all."""
    shares = left_out(adapted)
    if sum(shares.values()) > above:
        largest = ", ".join(f"{name} {share:.0%}" for name, share in list(shares.items())[:4])
        say(
            f"warning: the LoRA leaves {sum(shares.values()):.0%} of the layers' weights as they are ({largest})",
        )
