"""Sequence- and token-classification models on a causal decoder as reward models: TRL's output, and the hub's.

    r(x, y) = sum_k a_k (W_k h + b_k),   h = the hidden state of the last token that the classifier reads

The decoder's weights are taken over as they are, not copied. A weighted sum of outputs is one linear head again; where
the head is a small MLP its last layer is. A classifier was trained on conversations that its template closes, and reads
the last token that is not its padding token. So every response is closed by the template's own ids (for ChatML
``<|im_end|>`` and a line break), less those at the end that equal the padding token: the last id left is the one read.
A token classifier knows no padding token and is read at the last id of all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from reward_models.body import parameters_on_meta, truncated_config
from reward_models.configuration import RewardModelConfig
from reward_models.heads import attach_head
from reward_models.modelling import RewardModel
from reward_models.outputs import output_weights, weighted_layer, weights_by_name
from reward_models.sources import imported_outputs, shown_name, weights_folder
from vgf_llm.data.encoding import in_template, set_in_template, template_variables
from vgf_llm.data.endings import closing_id, closing_ids, eos_ids_of
from vgf_llm.errors import ModelError
from vgf_llm.models.architecture import check_structure, decoder_of, input_table, text_config
from vgf_llm.models.attention import settle_attention
from vgf_llm.models.loading import load_tokenizer
from vgf_llm.models.probe import check_decoder
from vgf_llm.models.whole import loaded_whole
from vgf_llm.runs.provenance import model_mark

ADAPTER_NAME = "adapter_config.json"
_KINDS = {
    "ForSequenceClassification": AutoModelForSequenceClassification,
    "ForTokenClassification": AutoModelForTokenClassification,
    "Qwen2ForRewardModel": AutoModelForSequenceClassification,
}
_PROBES = ("The lamp isn't on; 12.5% of 3,400 rooms are dark.", "  two\n\nlines\t", "naïve café 日本語 🙂")
_TASKS = {"SEQ_CLS": AutoModelForSequenceClassification, "TOKEN_CLS": AutoModelForTokenClassification}


def classifier_class(folder: str | Path) -> Any | None:
    """Return the transformers class that loads a folder's classifier, or None where the folder holds something else.

    Args:
        folder: Of a model, or of a PEFT adapter around one.
    """
    folder = Path(folder)
    adapter = _json(folder / ADAPTER_NAME)
    if adapter:
        if adapter.get("task_type") in _TASKS:
            return _TASKS[adapter["task_type"]]
        own = _json(folder / "config.json").get("model_type") == RewardModelConfig.model_type
        return AutoModelForSequenceClassification if not own and _has_score(weights_folder(folder)) else None
    for name in _json(folder / "config.json").get("architectures") or []:
        for ending, found in _KINDS.items():
            if str(name).endswith(ending):
                return found
    return None


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _has_score(folder: Path) -> bool:
    """Return whether an adapter without a task type trains a classifier's head."""
    try:
        with safe_open(str(folder / "adapter_model.safetensors"), framework="pt") as file:
            return any(".score." in name for name in set(file.keys()))
    except (OSError, SafetensorError):
        return False


@loaded_whole()
def read_classifier(folder: str | Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load a classifier with all its weights; an adapter is merged into its base.

    Raises:
        ModelError: It is not a classifier, or weights are missing.
    """
    loader, folder = classifier_class(folder), weights_folder(folder)
    if loader is None:
        raise ModelError(f"'{folder}' is not a sequence- or token-classification model")
    name, labels = str(folder), {}
    if (folder / ADAPTER_NAME).is_file():
        name, labels = _base_of(folder), _labels_of(folder)
    try:
        loaded: Any = loader.from_pretrained(name, dtype=dtype, output_loading_info=True, **labels)
        model, report = loaded
        missing = sorted(report["missing_keys"])
        missing = attach_head(model, Path(name), missing, sorted(report["unexpected_keys"]))
        if (folder / ADAPTER_NAME).is_file():
            model, missing = _with_adapter(model, folder, missing)
            missing = attach_head(model, folder, missing, [])
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise ModelError(f"the classifier '{folder}' cannot be loaded: {_first_line(error)}") from error
    if missing:
        advice = "save it again"
        if (folder / ADAPTER_NAME).is_file():
            advice = (
                'random numbers would stand in for them; train with modules_to_save=["score"] (task_type="SEQ_CLS")'
            )
        raise ModelError(f"the classifier '{folder}' lacks the weights {', '.join(missing[:3])}; {advice}")
    ready: PreTrainedModel = model.eval().requires_grad_(False)
    return ready


def _base_of(folder: Path) -> str:
    name = _json(folder / ADAPTER_NAME).get("base_model_name_or_path")
    if not name:
        raise ModelError(f"'{folder / ADAPTER_NAME}' does not name its base_model_name_or_path; add it")
    return str(name)


def _labels_of(folder: Path) -> dict[str, int]:
    """Return how many outputs the head has that an adapter's folder holds, where it holds one."""
    with safe_open(str(folder / "adapter_model.safetensors"), framework="pt") as file:
        shapes = [file.get_slice(name).get_shape() for name in set(file.keys()) if name.endswith(("score.weight",))]
    return {"num_labels": int(shapes[0][0])} if shapes else {}


def _with_adapter(model: PreTrainedModel, folder: Path, missing: list[str]) -> tuple[Any, list[str]]:
    """Merge an adapter; returns the model and the weights that neither base nor adapter had."""
    from peft import PeftModel
    from peft.utils.save_and_load import load_peft_weights

    given = load_peft_weights(str(folder), device="cpu")
    is_saved = any(".score." in key for key in given)
    if not is_saved and (missing or _json(folder / ADAPTER_NAME).get("task_type") in _TASKS):
        return model, missing or ["score.weight"]
    adapted = PeftModel.from_pretrained(model, str(folder))
    merged = adapted.merge_and_unload(safe_merge=True)
    held = [name for name in missing if any(key.endswith(f".{name}") for key in given)]
    return merged, [name for name in missing if name not in held]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def output_names(model: PreTrainedModel) -> list[str]:
    """Return the names of a classifier's outputs, in order."""
    return _names_in(model.config)


def saved_output_names(folder: str | Path) -> list[str]:
    """Return the names of the outputs of a folder's classifier, in order, without loading its weights.

    Raises:
        ModelError: Its configuration cannot be read.
    """
    folder = weights_folder(folder)
    name, labels = str(folder), {}
    if (folder / ADAPTER_NAME).is_file():
        name, labels = _base_of(folder), _labels_of(folder)
    try:
        return _names_in(AutoConfig.from_pretrained(name, **labels))
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"the classifier '{folder}' cannot be loaded: {_first_line(error)}") from error


def _names_in(config: Any) -> list[str]:
    labels: dict[int, str] = getattr(config, "id2label", None) or {}
    return [str(labels.get(index, index)) for index in range(int(config.num_labels or 1))]


def reward_head(score: nn.Module, weights_K: Tensor) -> nn.Module:
    """Return a head with one output: the weighted sum of ``score``'s, in float32.

    Args:
        score: A linear layer, or a stack that ends in one.
        weights_K: A weight per output.

    Raises:
        ModelError: It is neither.
    """
    layers = list(score) if isinstance(score, nn.Sequential) else [score]
    last = layers[-1]
    if not isinstance(last, nn.Linear) or last.out_features != len(weights_K):
        raise ModelError(f"the classifier's head is a {type(score).__name__}, which is not a stack ending in a Linear")
    joined = weighted_layer(last, weights_K)
    return joined if len(layers) == 1 else nn.Sequential(*(layer.float() for layer in layers[:-1]), joined)


def load_classifier(
    folder: str | Path,
    *,
    outputs: Mapping[str, float] | None = None,
    base_tokenizer: Any | None = None,
    dtype: torch.dtype = torch.float32,
) -> RewardModel:
    """Load a classifier on a causal decoder as a reward model; its own parameters are used, not copied.

    Args:
        folder: Of the model, or of a PEFT adapter around one.
        outputs: Weights of its outputs by name or number; needed where there are several.
        base_tokenizer: The base model's. Both must give texts the same ids; templates may differ: prompts are then
            read under the classifier's own, with those variables that are fixed in the base's and that it reads.
        dtype: Of the decoder; the head is float32.

    Raises:
        ModelError: It cannot be loaded, or its decoder is not causal (such a model can be called, not differentiated).
        ConfigError: As for :func:`reward_models.outputs.output_weights`.
    """
    model = read_classifier(folder, dtype)
    if getattr(model, "score", None) is None:
        raise ModelError(
            f"'{folder}' is a {type(model).__name__}: an encoder, which has no value in the policy's token space; name "
            "it among the rewards of `vgf-llm train` with value: learned, where it is called as a function"
        )
    weights_K = output_weights(output_names(model), outputs or imported_outputs(folder), f"'{shown_name(folder)}'")
    tokenizer = own_tokenizer(folder, template_variables(base_tokenizer))
    if base_tokenizer is not None and not same_ids(tokenizer, base_tokenizer):
        raise ModelError(
            f"the tokenizer of '{shown_name(folder)}' gives other ids than the base model's, so its gradient means "
            "nothing there; name it among the rewards of `vgf-llm train` with value: learned, where it is called as a "
            "function"
        )
    value = as_reward_model(model, folder, tokenizer, weights_K)
    if base_tokenizer is not None:  # its responses end in its own EOS, which the closing takes the place of
        ends = {*eos_ids_of(tokenizer), *eos_ids_of(base_tokenizer), closing_id(base_tokenizer)}
        value.config.end_ids = sorted(ends)
    if base_tokenizer is not None and tokenizer.chat_template != base_tokenizer.chat_template:
        value.own_tokenizer = tokenizer
    return value


def own_tokenizer(folder: str | Path, variables: Mapping[str, Any] | None = None) -> PreTrainedTokenizerBase:
    """Load a reward model's own tokenizer, with those variables of the policy's chat template that its own reads."""
    tokenizer = load_tokenizer(str(folder))
    set_in_template(tokenizer, in_template(tokenizer, variables or {}))
    return tokenizer


def as_reward_model(model: Any, folder: str | Path, tokenizer: Any, weights_K: Tensor) -> RewardModel:
    """Return a classifier on a causal decoder as a reward model; its own parameters are used, not copied.

    Args:
        model: Of ``read_classifier``, with a ``score``.
        folder: It was read from, for messages and the card.
        tokenizer: Its own.
        weights_K: Weight of each output.

    Raises:
        ModelError: Its decoder is not supported, or its head is not a stack that ends in a Linear.
    """
    check_structure(model, shown_name(folder))
    head = reward_head(model.score, weights_K)
    decoder, config = decoder_of(model), text_config(model.config)
    with parameters_on_meta():
        value = RewardModel(
            RewardModelConfig(
                body_config=truncated_config(model.config, None),
                pooling="last",
                base_name=shown_name(folder),
                train_embeddings=True,
                pad_token_id=config.pad_token_id,
                embedding_width=input_table(model).shape[-1],
                output_width=_width(head),
                closing=_read_closing(tokenizer, None if reads_every_token(model) else model.config.pad_token_id),
                end_ids=list(eos_ids_of(tokenizer)),
            )
        )
    value.body = decoder
    value._modules["head"] = head  # linear, or a stack that ends in a linear layer
    settle_attention(value.body)
    check_decoder(value.body, shown_name(folder))
    value.config.base_weights = model_mark(value.body)
    value.reward_outputs = weights_by_name(output_names(model), weights_K)
    ready: RewardModel = value.eval()
    return ready


def is_decoder(folder: str | Path) -> bool:
    """Return whether a classifier's head reads the last token of a decoder, by its configuration and class."""
    folder = Path(folder)
    loader = classifier_class(folder)
    name = _base_of(folder) if (folder / ADAPTER_NAME).is_file() else str(folder)
    with torch.device("meta"):
        model: Any = loader.from_config(AutoConfig.from_pretrained(name)) if loader is not None else None
    return hasattr(model, "score")


def same_ids(one: Any, other: Any) -> bool:
    """Return whether two tokenizers give texts the same ids; what they call their EOS or padding may differ."""
    same = one.get_vocab() == other.get_vocab()
    return same and all(
        one(text, add_special_tokens=False)["input_ids"] == other(text, add_special_tokens=False)["input_ids"]
        for text in _PROBES
    )


def _width(head: nn.Module) -> int:
    first = head[0] if isinstance(head, nn.Sequential) else head
    return int(first.in_features)  # type: ignore[arg-type]


def reads_every_token(model: Any) -> bool:
    """Return whether a classifier has outputs at every token; its score is read at the last one, whatever its id."""
    return type(model).__name__.endswith("ForTokenClassification")


def _read_closing(tokenizer: Any, pad_id: int | None) -> list[int]:
    """Return what closes a response, up to the last token that the classifier does not take for padding."""
    closing = closing_ids(tokenizer)
    while closing and closing[-1] == pad_id:
        closing.pop()
    return closing
