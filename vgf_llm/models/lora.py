"""Places for a LoRA: which modules are linear layers, by which names PEFT finds them, and what is left out.

A model may hold linear layers that a LoRA cannot go around (a router that returns a tuple), GPT-2 has ``Conv1D`` in
their place, and the experts of a mixture are 3-D parameters of no layer.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from vgf_llm.console.screen import say


def linear_names(body: nn.Module) -> list[str]:
    """Return the names of all linear layers of a body (``q_proj``, ``down_proj``, ``c_attn``, ...): the LoRA default.

    A name is the end of a path that no other kind of module has: its last part, or more where that is the number of an
    entry in a list or stands for something else, too.
    """
    modules = dict(body.named_modules())
    linear = {name for name, child in modules.items() if is_linear(child)}
    others = modules.keys() - linear
    return sorted({_ending(name, others) for name in linear})


def is_linear(module: nn.Module) -> bool:
    """Return whether a LoRA can go around a module: a linear layer that maps one tensor to one tensor."""
    if not isinstance(module, (nn.Linear, Conv1D)):
        return False
    if type(module).forward in (nn.Linear.forward, Conv1D.forward):
        return True
    weight = module.weight
    if weight.is_meta or hasattr(weight, "ds_id"):  # it cannot be tried
        return False
    with torch.no_grad():
        return isinstance(module(weight.new_zeros(1, weight.shape[1])), torch.Tensor)


def _ending(name: str, others: Collection[str]) -> str:
    parts = name.split(".")
    for count in range(1, len(parts) + 1):
        ending = ".".join(parts[-count:])
        if not parts[-count].isdigit() and not any(other == ending or other.endswith(f".{ending}") for other in others):
            return ending
    return name


def not_in_the_decoder(model: nn.Module, decoder: nn.Module) -> list[str]:
    """Return the linear layers of a model that a LoRA of its text must not go around, by their full names.

    These are the layers outside the text decoder (a vision tower) and those that return no tensor (some routers). The
    output layer is left to PEFT, which leaves it out by itself.
    """
    inside = {id(module) for module in decoder.modules()}
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and (id(module) not in inside or not is_linear(module))
    ]


def left_out(decoder: nn.Module) -> dict[str, float]:
    """Return which weights a LoRA leaves as they are, as shares of all weights of the layers, largest first.

    Embedding tables and vectors (norms, biases) are not counted. Weights are named by the end of their path, layer
    numbers left out.

    Args:
        decoder: With PEFT's adapters in it.
    """
    adapted, tables = set(), set()
    for module in decoder.modules():
        if isinstance(inner := getattr(module, "base_layer", None), nn.Module):
            adapted |= {id(parameter) for parameter in inner.parameters()}
        if isinstance(module, nn.Embedding):
            tables |= {id(parameter) for parameter in module.parameters()}
    total = 0
    found: dict[str, int] = {}
    for name, parameter in decoder.named_parameters():
        if "lora_" in name or parameter.dim() < 2 or id(parameter) in tables:
            continue
        size = int(getattr(parameter, "ds_numel", parameter.numel()))
        total += size
        if id(parameter) not in adapted:
            short = ".".join(part for part in name.split(".") if not part.isdigit()).split("layers.")[-1]
            found[short] = found.get(short, 0) + size
    return {name: size / total for name, size in sorted(found.items(), key=lambda entry: -entry[1])}


def tell_left_out(decoder: nn.Module, above: float = 0.05) -> None:
    """Say on standard error which weights a LoRA leaves out, where they are more than a share of all."""
    shares = left_out(decoder)
    if sum(shares.values()) > above:
        largest = ", ".join(f"{name} {share:.0%}" for name, share in list(shares.items())[:3])
        say(f"warning: the LoRA leaves {sum(shares.values()):.0%} of the layers' weights as they are ({largest})")
