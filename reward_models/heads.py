"""Heads of classifiers as they lie on disk, where transformers builds another one and drops what does not fit.

transformers' decoders have a linear ``score`` without a bias. A ``score.bias`` in the file is dropped there without an
error, and a stack (``score.0``, ``score.2``) is replaced by random numbers. Both are read from the file here. A file
does not say what stands between the layers of a stack: Qwen2.5's reward models have a ReLU, others name it as
``head_activation`` in config.json.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.activations import ACT2FN

from vgf_llm.errors import ModelError

_SCORE = re.compile(r"(?:.*\.)?score\.(?:modules_to_save\.(?:default\.)?)?((?:\d+\.)?(?:weight|bias))")
_HEADS = re.compile(r"(?:score|classifier|reward|reward_head|v_head|value_head|regression_layer|gating)\.")


def attach_head(model: Any, folder: Path, missing: list[str], unexpected: list[str]) -> list[str]:
    """Give a classifier the head that its file holds; returns the weights that are still missing.

    Args:
        model: As transformers loaded it; its ``score`` is replaced where the file has more than one weight.
        folder: Of the file.
        missing: Weights that the file lacks for transformers' class.
        unexpected: Weights of the file that the class has no place for.

    Raises:
        ModelError: The file holds a head that cannot be rebuilt.
    """
    parts = _head_parts(folder)
    if hasattr(model, "score") and set(parts) - {"weight"}:
        like = next(model.score.parameters())
        score = _linear(parts) if set(parts) == {"weight", "bias"} else _stack(parts, model.config, folder)
        model.score = score.to(device=like.device, dtype=like.dtype)
        missing = [name for name in missing if not name.startswith("score.")]
        unexpected = [name for name in unexpected if not _SCORE.fullmatch(name)]
    lost = [name for name in unexpected if _HEADS.match(name)]
    if lost:
        raise ModelError(
            f"the classifier '{folder}' holds {', '.join(lost[:3])}, which {type(model).__name__} has no place for, so "
            "it would score without them; wrap it as a Python function with its own code"
        )
    return missing


def _head_parts(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of ``score`` in a folder's safetensors, by their names inside it."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(str(path), framework="pt") as file:
            for name in list(file.keys()):
                if matched := _SCORE.fullmatch(name):
                    found[matched.group(1)] = file.get_tensor(name)
    return found


def _linear(parts: dict[str, Tensor], prefix: str = "") -> nn.Linear:
    weight, bias = parts[f"{prefix}weight"], parts.get(f"{prefix}bias")
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer.eval().requires_grad_(False)


def _stack(parts: dict[str, Tensor], config: Any, folder: Path) -> nn.Sequential:
    """Rebuild a stack of linear layers with an activation between each two."""
    places = sorted({int(name.split(".")[0]) for name in parts if name[0].isdigit()})
    is_plain = all(f"{at}.weight" in parts and parts[f"{at}.weight"].dim() == 2 for at in places)
    shapes = ", ".join(f"score.{name} {list(tensor.shape)}" for name, tensor in sorted(parts.items()))
    if not is_plain or len(places) < 2 or any(not name[0].isdigit() for name in parts):
        raise ModelError(f"the head of the classifier '{folder}' is not a stack of linear layers: it has {shapes}")
    named = getattr(config, "head_activation", None)
    if named is None and any(str(one).startswith("Qwen2ForRewardModel") for one in config.architectures or []):
        named = "relu"
    if named not in ACT2FN:
        raise ModelError(
            f"the head of the classifier '{folder}' is a stack ({shapes}), and no file says which activation stands "
            'between its layers; add "head_activation" to its config.json ("relu", "gelu", "silu", "tanh")'
        )
    layers: list[nn.Module] = []
    for at in places:
        layers += [_linear(parts, f"{at}."), ACT2FN[named]]
    return nn.Sequential(*layers[:-1])
