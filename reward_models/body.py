"""The decoder body that a reward model cuts from a causal LM: its configuration, and its weights, copied or shared.

A shared body holds the base's own Parameter objects, so a value and the policy beside it need one copy of the frozen
base. What is taken are the plain weights: where PEFT has put adapters around a layer of the base, before or after, the
body sees the layer inside and never the adapters (unless they are merged into the weights: that changes both).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from vgf_llm.errors import ModelError
from vgf_llm.models.architecture import (
    cut_config,
    decoder_class,
    decoder_of,
    difference,
    evaluating,
    input_table,
    is_whole,
    layer_outputs,
    num_layers,
    tolerance,
)
from vgf_llm.models.attention import caps_scores

_WRAPPERS = (".base_layer", ".original_module")  # where PEFT keeps the layer that it wraps


def truncated_config(base_config: PreTrainedConfig, num_layers: int | None) -> dict[str, Any]:
    """Return the body's configuration with the first `num_layers` layers (None: all), as a dict that JSON can hold.

    Raises:
        ModelError: num_layers is out of range, or the architecture's configuration cannot be cut.
    """
    fields = cut_config(base_config, num_layers)
    for derived in ("architectures", "_name_or_path", "transformers_version", "torch_dtype", "dtype"):
        fields.pop(derived, None)
    return fields


def plain_weights(base: PreTrainedModel) -> dict[str, Tensor]:
    """Return parameters and buffers of a causal LM's decoder by the names they have without PEFT.

    Adapters keep names that no body has. Buffers are a part of what was trained: routing biases, layer scalars.
    """
    decoder = decoder_of(base)
    found: dict[str, Tensor] = dict(decoder.named_parameters(remove_duplicate=False))
    found |= dict(decoder.named_buffers(remove_duplicate=False))
    plain = {}
    for name, tensor in found.items():
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        plain[name] = tensor
    return plain


def copy_weights(body: PreTrainedModel, base: PreTrainedModel, dtype: torch.dtype) -> None:
    """Copy the base's plain weights into the body: parameters as `dtype`, buffers in the base's precision.

    Raises:
        ModelError: a weight of the body is missing in the base, or has another shape there.
    """
    source = _matching(body, base)
    with torch.no_grad():
        for name, parameter in body.named_parameters(remove_duplicate=False):
            parameter.data = source[name].detach().to(dtype, copy=True)
        for name in _common_buffers(body, source):
            _put(body, name, source[name].detach().clone())


def share_weights(body: PreTrainedModel, base: PreTrainedModel) -> None:
    """Put the base's own parameters and buffers in place of the body's.

    Raises:
        ModelError: a weight is missing or has another shape, or a parameter of the base trains; what two models share
            must hold still.
    """
    source = _matching(body, base)
    for name in dict(body.named_parameters(remove_duplicate=False)):
        if source[name].requires_grad:
            raise ModelError(
                f"the base's {name} trains, so a value cannot share it; freeze the base first (requires_grad_(False)), "
                "give a base of its own, or set lora_r to 0"
            )
        _put(body, name, source[name])
    for name in _common_buffers(body, source):
        _put(body, name, source[name])


def _common_buffers(body: nn.Module, source: dict[str, Tensor]) -> list[str]:
    """Return the buffers that body and base both have in one shape: all persistent ones, and most of the others."""
    buffers = body.named_buffers(remove_duplicate=False)
    return [name for name, buffer in buffers if name in source and source[name].shape == buffer.shape]


def _put(body: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(body.get_submodule(path), leaf, tensor)


def _persistent_buffers(body: nn.Module) -> list[str]:
    persistent = body.state_dict(keep_vars=True).keys()
    return [name for name, _ in body.named_buffers(remove_duplicate=False) if name in persistent]


def _matching(body: PreTrainedModel, base: PreTrainedModel) -> dict[str, Tensor]:
    """Return the base's weights by name after a check that the body has no other names or shapes."""
    source, whose = plain_weights(base), f"the base model {base.config._name_or_path!r}"
    wanted: dict[str, Tensor] = dict(body.named_parameters(remove_duplicate=False))
    wanted |= {name: body.get_buffer(name) for name in _persistent_buffers(body)}
    if num_layers(body.config) == num_layers(base.config):
        persistent = decoder_of(base).state_dict(keep_vars=True).keys()
        extra = sorted(name for name in persistent & source.keys() if name not in wanted)
        if extra and not any(hasattr(module, "_disable_adapters") for module in base.modules()):
            raise ModelError(f"the weight {extra[0]!r} of {whose} has no place in a body of {type(body).__name__}")
    for name, tensor in wanted.items():
        if name not in source:
            advice = "give a causal LM"
            if num_layers(body.config) < num_layers(base.config):
                advice = "this architecture cannot be cut: set num_layers to null"
            raise ModelError(f"{whose} has no weight {name!r}; {advice}")
        expected, found = weight_shape(tensor), weight_shape(source[name])
        if expected != found:
            raise ModelError(
                f"the weight {name!r} of {whose} has shape {list(found)}, its first layers need {list(expected)}; "
                "this architecture cannot be cut: set num_layers to null"
            )
    return source


def weight_shape(tensor: Tensor) -> tuple[int, ...]:
    """Return a weight's shape, also where DeepSpeed has split it."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


@torch.no_grad()
def check_cut(body: PreTrainedModel, base: PreTrainedModel, name: str) -> None:
    """Compare the hidden states of a cut body with those of the base's first layers, on a few ids.

    Layer n of both, before the final norm, and where nothing was cut what the decoder returns. The base runs without
    adapters and with the body's attention. Weights that are not all here are not run.

    Raises:
        ModelError: naming the base and the difference.
    """
    decoder = decoder_of(base)
    if not (is_whole(body) and is_whole(decoder)):
        return
    rows, kept = len(input_table(body)), num_layers(body.config)
    ids_RS = torch.arange(1, 11, device=body.device).remainder(rows).view(2, 5)
    try:
        with _as_plain_as(decoder, body), evaluating(body), evaluating(decoder):
            pairs = [[layer_outputs(model, kept - 1, input_ids=ids_RS, use_cache=False) for model in (body, decoder)]]
            if kept == num_layers(decoder.config):
                pairs.append([model(input_ids=ids_RS, use_cache=False).last_hidden_state for model in (body, decoder)])
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        types = f"{body.dtype} cut from {decoder.dtype}"
        raise ModelError(
            f"the first {kept} layers of {name!r} do not run ({types}): {error}; try another dtype"
        ) from error
    for own, expected in pairs:
        apart = difference(own, expected)
        if apart > max(tolerance(own), tolerance(expected)):
            advice = "report this" if kept == num_layers(decoder.config) else "set num_layers to null"
            raise ModelError(
                f"the first {kept} layers of {name!r} do not give the base's hidden states (they differ by {apart:.2g} "
                f"of their mean size), so the architecture {body.config.model_type!r} cannot be cut here; {advice}"
            )


@contextlib.contextmanager
def _as_plain_as(decoder: PreTrainedModel, body: PreTrainedModel) -> Iterator[None]:
    """Switch adapters that are not merged off and take the body's attention, for the duration."""
    tuned: list[Any] = [
        m for m in decoder.modules() if hasattr(m, "_disable_adapters") and not getattr(m, "merged", False)
    ]
    switched, before = [m._disable_adapters for m in tuned], decoder.config._attn_implementation
    for module in tuned:
        module._disable_adapters = True
    if before != body.config._attn_implementation:
        decoder.set_attn_implementation(body.config._attn_implementation)
    try:
        yield
    finally:
        for module, off in zip(tuned, switched, strict=True):
            module._disable_adapters = off
        if before != decoder.config._attn_implementation:
            decoder.set_attn_implementation(before)


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Create the parameters of modules built in this block on the meta device, without memory; buffers are real."""
    register, kind = nn.Module.register_parameter, cast(Any, nn.Module)

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    kind.register_parameter = register_on_meta
    try:
        yield
    finally:
        kind.register_parameter = register


def body_attention(wanted: str | None, body_config: PreTrainedConfig) -> str | None:
    """Return the attention that a body is built with: what was wanted, where the body can do that."""
    if wanted == "sdpa":
        found = decoder_class(body_config)
        return "eager" if caps_scores(body_config) or not getattr(found, "_supports_sdpa", True) else "sdpa"
    return wanted
