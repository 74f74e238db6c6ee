"""The decoder body that a reward model cuts from a causal LM: its configuration, and its weights, copied or shared.

A shared body holds the base's own Parameter objects, so a value and the policy beside it need one copy of the frozen
base. What is taken are the plain weights: where PEFT has put adapters around a layer of the base, before or after, the
body sees the layer inside and never the adapters (unless they are merged into the weights: that changes both).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from vgf_llm.errors import ModelError

_WRAPPERS = (".base_layer", ".original_module")  # where PEFT keeps the layer that it wraps


def truncated_config(base_config: PreTrainedConfig, num_layers: int | None) -> dict[str, Any]:
    """Return the body's configuration with the first `num_layers` layers (None: all), as a dict that JSON can hold.

    Raises:
        ModelError: num_layers is out of range.
    """
    fields = base_config.get_text_config(decoder=True).to_dict()
    available = fields["num_hidden_layers"]
    kept = available if num_layers is None else num_layers
    if not 1 <= kept <= available:
        raise ModelError(f"num_layers is {num_layers}, but the base model has layers 1 to {available}")
    fields["num_hidden_layers"] = kept
    if fields.get("layer_types"):
        fields["layer_types"] = fields["layer_types"][:kept]
    for derived in ("architectures", "_name_or_path", "transformers_version", "torch_dtype", "dtype"):
        fields.pop(derived, None)
    return fields


def plain_weights(base: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Return the parameters of a causal LM's decoder by the names they have without PEFT; adapters are left out."""
    weights = {}
    for name, parameter in base.base_model.named_parameters(remove_duplicate=False):
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        weights[name] = parameter
    return weights


def copy_weights(body: nn.Module, base: PreTrainedModel, dtype: torch.dtype) -> None:
    """Copy the base's plain weights into the body, as `dtype`; buffers (rotary frequencies) keep their precision."""
    source = _matching(body, base)
    with torch.no_grad():
        for name, parameter in body.named_parameters(remove_duplicate=False):
            parameter.data = source[name].detach().to(dtype, copy=True)


def share_weights(body: nn.Module, base: PreTrainedModel) -> None:
    """Put the base's own parameters in place of the body's.

    Raises:
        ModelError: a parameter of the base trains; what two models share must hold still.
    """
    source = _matching(body, base)
    for name in dict(body.named_parameters(remove_duplicate=False)):
        if source[name].requires_grad:
            raise ModelError(
                f"the base's {name} trains, so a value cannot share it; freeze the base first (requires_grad_(False)), "
                "give a base of its own, or set lora_r to 0"
            )
        path, _, leaf = name.rpartition(".")
        setattr(body.get_submodule(path), leaf, source[name])


def _matching(body: nn.Module, base: PreTrainedModel) -> dict[str, nn.Parameter]:
    source = plain_weights(base)
    missing = [name for name, _ in body.named_parameters(remove_duplicate=False) if name not in source]
    if missing:
        raise ModelError(f"the base model {base.config._name_or_path!r} has no weight {missing[0]!r}; give a causal LM")
    return source


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Create the parameters of modules built in this block on the meta device, without memory; buffers are real."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def linear_names(body: nn.Module) -> list[str]:
    """Return the leaf names of all linear layers of a body (`q_proj`, `down_proj`, ...): the LoRA default."""
    return sorted({name.rpartition(".")[2] for name, child in body.named_modules() if isinstance(child, nn.Linear)})
