"""Everything that depends on a base model's architecture, answered from attributes and never from names.

A configuration may nest its text part (Gemma 3 with a vision tower) and may have other names (GPT-2's ``n_layer``), so
:func:`text_config` and attributes are used throughout, and the decoder of a loaded model is found by its class.

A prompt is kept as keys and values, and a value is a function of input embeddings. So an architecture is supported if
(1) every layer keeps keys and values and nothing else, (2) ids and the embeddings of these ids give the same hidden
states, (3) off-table embeddings are accepted, and (4) a text continued from a prompt's keys and values is the whole
text. :func:`check_config` refuses what its configuration gives away, before weights are read;
:func:`vgf_llm.models.probe.check_decoder` measures (2) to (4) on a few ids of the loaded model.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, DynamicLayer, DynamicSlidingWindowLayer

from vgf_llm.errors import ModelError

_POSITIONS = ("max_position_embeddings", "max_seq_len", "max_sequence_length")
_KEYS_AND_VALUES = (DynamicLayer, DynamicSlidingWindowLayer)
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}  # of the mean size of a hidden state; 16-bit types: 0.1
_ADVICE = "name a decoder-only model whose layers are all attention; docs/models.md lists what was tried"


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the configuration of the text decoder: the nested one of a multimodal model, else the same object."""
    return config.get_text_config(decoder=True)


def vocabulary_rows(config: PreTrainedConfig) -> int:
    """Return the rows of the input table; padded tables have more rows than the tokenizer has tokens."""
    return int(text_config(config).vocab_size)


def input_table(model: PreTrainedModel) -> Tensor:
    """Return the weights of the input table, [V, D]; V counts padding rows."""
    table = model.get_input_embeddings().weight
    assert isinstance(table, Tensor)
    return table


def max_positions(config: PreTrainedConfig) -> int | None:
    """Return the longest text in tokens, or None where the architecture states no limit."""
    text = text_config(config)
    return next((int(getattr(text, name)) for name in _POSITIONS if getattr(text, name, None)), None)


def num_layers(config: PreTrainedConfig) -> int:
    """Return the number of decoder layers."""
    return int(text_config(config).num_hidden_layers)


def decoder_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """Return the class of the decoder without a head; None where transformers does not know the configuration."""
    try:
        found = AutoModel._model_mapping[type(text_config(config))]
    except KeyError:
        return None
    return found[0] if isinstance(found, tuple) else found


def decoder_of(model: Any) -> PreTrainedModel:
    """Return the text decoder inside a causal language model, which returns ``last_hidden_state``.

    Multimodal wrappers and PEFT's wrappers are looked into; a decoder is returned as it is.
    """
    wanted = decoder_class(model.config)
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and type(module) is wanted:
            return module
    found: PreTrainedModel = model.get_decoder()
    return found


def decoder_layers(decoder: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Return the path and the list of a decoder's layers.

    Raises:
        ModelError: The decoder has no module list with one entry per configured layer.
    """
    count = num_layers(decoder.config)
    lists = [
        (name, module)
        for name, module in decoder.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if not lists:
        raise ModelError(f"{type(decoder).__name__} has no list of {count} layers")
    return min(lists, key=lambda entry: entry[0].count("."))


def cut_config(config: PreTrainedConfig, kept: int | None) -> dict[str, Any]:
    """Return the text configuration with the first ``kept`` layers (None: all), as a dict that JSON can hold.

    Everything with one entry per layer is cut as well: lists (``layer_types``, widths) and ``per_layer_config``.

    Raises:
        ModelError: ``kept`` is out of range.
    """
    text = copy.deepcopy(text_config(config))
    available = text.num_hidden_layers
    kept = available if kept is None else kept
    if not 1 <= kept <= available:
        raise ModelError(f"num_layers is {kept}, but the base model has layers 1 to {available}")
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == available and not _is_not_per_layer(name):
            setattr(text, name, value[:kept])
    text.num_hidden_layers = kept
    fields = text.to_dict()
    if isinstance(fields.get("per_layer_config"), dict):
        fields["per_layer_config"] = {key: own for key, own in fields["per_layer_config"].items() if int(key) < kept}
    return fields


def _is_not_per_layer(name: str) -> bool:
    return name.startswith("_") or name.endswith(("token_id", "token_ids")) or name in ("architectures", "labels")


def check_config(config: PreTrainedConfig, name: str) -> None:
    """Refuse an architecture that its configuration shows to be unsupported; no weights are needed.

    Args:
        config: Of the model, nested or not.
        name: What the user calls the model.

    Raises:
        ModelError: Naming the architecture, and the layer types or the feature that is not supported.
    """
    text = text_config(config)
    reason = _unsupported(config, text)
    if reason:
        raise refusal(text, name, reason)


def _unsupported(config: PreTrainedConfig, text: PreTrainedConfig) -> str | None:
    if getattr(config, "is_encoder_decoder", False) or getattr(text, "is_encoder_decoder", False):
        return "it is an encoder-decoder"
    types = getattr(text, "layer_types", None) or ()
    stateful = sorted({kind for kind in types if DYNAMIC_LAYER_TYPE_MAPPING.get(kind) not in _KEYS_AND_VALUES})
    if stateful:
        return f"its layers of type {', '.join(stateful)} keep other states than keys and values"
    if getattr(text, "hidden_size_per_layer_input", None):
        return "every layer reads the token ids again (per-layer embeddings), so embeddings alone are not its input"
    found = decoder_class(config)
    if found is None:
        return None
    if getattr(found, "_is_stateful", False):
        kinds = getattr(text, "layers_block_type", None) or getattr(text, "block_types", None) or ()
        named = f" ({', '.join(sorted(set(kinds)))})" if kinds else ""
        return f"its layers{named} keep recurrent states, which are not keys and values"
    missing = [key for key in ("inputs_embeds", "past_key_values", "attention_mask") if not _takes(found, key)]
    if missing:
        return f"its forward takes no {' and no '.join(missing)}"
    return None


def _takes(found: type[PreTrainedModel], key: str) -> bool:
    return key in signature(found.forward).parameters


def refusal(text: PreTrainedConfig, name: str, reason: str) -> ModelError:
    """Return the error that refuses an architecture: which, of which model, why, and what to take instead."""
    return ModelError(f"the architecture {text.model_type!r} of {name!r} is not supported: {reason}; {_ADVICE}")


def is_whole(module: nn.Module) -> bool:
    """Return whether all parameters are here: none on the meta device and none split by DeepSpeed or FSDP."""
    return all(
        not parameter.is_meta and parameter.numel() > 0 and not hasattr(parameter, "ds_id")
        for parameter in module.parameters()
    )


def check_structure(model: PreTrainedModel, name: str) -> None:
    """Refuse a model by its configuration and modules; weights are not looked at and may be on the meta device.

    Raises:
        ModelError: As :func:`check_config`, or the model has no decoder that stands alone.
    """
    check_config(model.config, name)
    wanted = decoder_class(model.config)
    if wanted is not None and not any(type(module) is wanted for module in model.modules()):
        reason = f"a {type(model).__name__} does not contain a {wanted.__name__}, so it has no separate decoder"
        raise refusal(text_config(model.config), name, reason)
    try:
        decoder_layers(decoder_of(model))
    except ModelError as error:
        raise refusal(text_config(model.config), name, str(error)) from error


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Dropout off (and gradient checkpointing, which drops the cache); every module gets its own mode back."""
    modes = [(one, one.training) for one in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for one, mode in modes:
            one.training = mode


def difference(found: Tensor, expected: Tensor) -> float:
    """Return the mean absolute difference in units of the mean absolute value that is expected."""
    scale = expected.float().abs().mean().clamp(min=1e-12)
    return float((found.float() - expected.float()).abs().mean() / scale)


def tolerance(hidden: Tensor) -> float:
    """Return the largest :func:`difference` that rounding explains in this dtype."""
    return _TOLERANCE.get(hidden.dtype, 0.1)


def layer_outputs(decoder: PreTrainedModel, index: int, **inputs: Any) -> Tensor:
    """Run a decoder and return what its layer ``index`` gives out, before any final norm: [R, S, D]."""
    _, layers = decoder_layers(decoder)
    seen: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, Sequence) else output)

    handle = layers[index].register_forward_hook(keep)
    try:
        decoder(**inputs)
    finally:
        handle.remove()
    return seen[-1]
