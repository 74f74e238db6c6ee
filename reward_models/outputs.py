"""Several outputs of a reward model as one: the weighted sum of linear heads is a linear head.

    sum_k a_k r_k(x, y) = (a W) . pool(h) + (a V) . mean(u) + a . b

with a row of W, V and b per output. The outputs are those of a classifier, or the objectives of a model of ours. Once
they are folded, the score and its gradient cost what one output costs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from reward_models.modelling import RewardModel
from vgf_llm.errors import ConfigError


def output_weights(names: Sequence[str], wanted: Mapping[str, float] | None, where: str) -> Tensor:
    """Return one weight per output, [K].

    Args:
        names: Of the outputs.
        wanted: Weights by name or by number; None where there is one output.
        where: Names the model in errors.

    Raises:
        ConfigError: Several outputs and no weights; a weight of an output that there is not, or of one named twice; a
            weight that is not a finite number; or weights that are all 0.
    """
    if not wanted:
        if len(names) > 1:
            raise ConfigError(
                f"reward_outputs: {where} has {len(names)} outputs ({', '.join(names)}); give their weights, for "
                f'example {{"{names[0]}": 1.0}}'
            )
        return torch.ones(1)
    weights_K, seen = torch.zeros(len(names)), set()
    for name, weight in wanted.items():
        place = place_of(name, names)
        if place is None:
            raise ConfigError(f"reward_outputs: {where} has no output {str(name)!r}; it has {', '.join(names)}")
        if place in seen:
            raise ConfigError(f"reward_outputs: the output {names[place]!r} of {where} is named twice; drop one")
        if not isinstance(weight, int | float) or isinstance(weight, bool) or not math.isfinite(weight):
            raise ConfigError(f"reward_outputs: the weight of {str(name)!r} must be a finite number, got {weight!r}")
        seen.add(place)
        weights_K[place] = weight
    if not weights_K.any():
        raise ConfigError(f"reward_outputs: the weights {dict(wanted)} are all 0; raise one of {', '.join(names)}")
    return weights_K


def place_of(name: Any, names: Sequence[str]) -> int | None:
    """Return the place of an output among all, by its name or number (a text or an integer); None where it is not."""
    name = str(name)
    if name in names:
        return names.index(name)
    return int(name) if name.isascii() and name.isdecimal() and int(name) < len(names) else None


def weights_by_name(names: Sequence[str], weights_K: Tensor) -> dict[str, float]:
    """Return the weights that are not 0 by the names of their outputs; empty for a single output that counts once."""
    if weights_K.tolist() == [1.0]:
        return {}
    found = {name: float(f"{weight:.7g}") for name, weight in zip(names, weights_K.tolist(), strict=True)}
    return {name: weight for name, weight in found.items() if weight}


def weighted_layer(layer: nn.Linear, weights_K: Tensor, bias: bool = True) -> nn.Linear:
    """Return a linear layer with one output, the weighted sum of a layer's K outputs, in float32.

    Args:
        layer: With K outputs, with or without a bias.
        weights_K: A weight per output.
        bias: Whether the result has a bias; one that the layer does not have is 0.
    """
    weights_K = weights_K.to(layer.weight.device)
    joined = nn.Linear(layer.in_features, 1, bias=bias, device=layer.weight.device)
    with torch.no_grad():
        joined.weight.copy_(weights_K @ layer.weight.float())
        if bias:
            joined.bias.fill_(0.0 if layer.bias is None else float(weights_K @ layer.bias.float()))
    return joined


def fold_objectives(model: RewardModel, wanted: Mapping[str, float] | None, where: str) -> RewardModel:
    """Give a model with an output per objective the single output of their weighted sum; changed in place, returned.

    A model without objectives has one output and is left as it is.

    Args:
        model: As it was trained.
        wanted: Weights by name or number; None where there is one output.
        where: Names the model in errors.

    Raises:
        ConfigError: As for `output_weights`, or weights for a model without objectives.
    """
    names, train = model.config.objectives, model.head.weight.requires_grad
    if not names:
        if wanted:
            given = ", ".join(map(str, wanted))
            raise ConfigError(f"reward_outputs: {where} has one output without a name; drop {given}")
        return model
    weights_K = output_weights(names, wanted, where)
    model.head = weighted_layer(model.head, weights_K).requires_grad_(train)
    if model.skip_head is not None:
        model.skip_head = weighted_layer(model.skip_head, weights_K, bias=False).requires_grad_(train)
    model.config.objectives = []
    model.reward_outputs = weights_by_name(names, weights_K)
    return model


def even_weights(names: Sequence[str]) -> dict[str, float]:
    """Return the weights of the outputs' mean, 1 / K each, by name: those that a card's figures are for."""
    return {name: 1 / len(names) for name in names}
