"""Marks of what an artefact was made from, so that a change under it is told.

An adapter, a reward model or a half-finished run names its base by a path or hub name. The weights behind a name can
change; nothing fails then, and the numbers are of another model. A mark is a digest of a sample of every weight, fast
even for large models, and the same in float32 and bfloat16.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from vgf_llm.console.screen import say
from vgf_llm.runs.files import write_json_atomic

BASE_NAME = "vgf_base.json"
"""File beside an adapter that says which weights it was trained on."""

_VALUES = 64  # of each weight, evenly spaced
_BYTES = 65536  # of the start, middle and end of each file
_WEIGHTS, _TEXTS = ("*.safetensors", "*.gguf", "*.bin"), ("*config.json", "tokenizer*", "chat_template*", "*.model")


@torch.no_grad()
def weights_mark(named: Iterable[tuple[str, Tensor]]) -> str:
    """Return a SHA-256 over each weight's name, shape and some of its values, rounded to bfloat16.

    Args:
        named: Weights by name, whole. The order does not matter.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(named, key=lambda one: one[0]):
        flat = weight.detach().reshape(-1)
        index = torch.linspace(0, max(flat.numel() - 1, 0), min(_VALUES, flat.numel()), dtype=torch.float64).long()
        values = flat[index.to(flat.device)].to(torch.bfloat16).cpu()
        digest.update(f"{name} {list(weight.shape)}".encode() + values.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def model_mark(model: nn.Module) -> str | None:
    """Return the mark of a model's parameters; None where they are elsewhere, or in float16, which rounds otherwise."""
    named = list(model.named_parameters())
    if any(p.is_meta or p.dtype == torch.float16 or p.numel() == 0 for _, p in named):
        return None
    return weights_mark(named)


def tell_if_changed(made_from: str | None, found: str | None, artefact: str, base: str) -> bool:
    """Say on standard error that the base model is not the one an artefact was made from.

    Args:
        made_from: Mark that the artefact carries; None for one without.
        found: Mark of the base as it is now; None where it has none.
        artefact: What was made, for the message.
        base: Name of the base model, for the message.

    Returns:
        Whether it changed.
    """
    changed = None not in (made_from, found) and made_from != found
    if changed:
        say(
            f"WARNING: {artefact} was made from other weights than {base!r} has now, so its numbers are those of "
            "another model; name the base it was trained on, or train it again",
        )
    return changed


def write_base(folder: Path, name: str, mark: str | None) -> None:
    """Write which base an adapter was trained on into its folder, where the base has a mark."""
    if mark is not None:
        write_json_atomic(folder / BASE_NAME, {"base_model": name, "weights": mark})


def read_base(folder: Path) -> str | None:
    """Return the mark of the base that an adapter was trained on; None where its folder does not say."""
    try:
        found = json.loads((folder / BASE_NAME).read_text(encoding="utf-8"))["weights"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, str) else None


def folder_mark(name: str) -> str | None:
    """Return a SHA-256 of a model's folder: its configuration and tokenizer whole, its weights in samples.

    Args:
        name: Of a base model; None is returned where it is not a local folder.
    """
    folder = Path(name)
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted({path for pattern in (*_WEIGHTS, *_TEXTS) for path in folder.glob(pattern) if path.is_file()}):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with open(path, "rb") as file:
            if any(path.match(pattern) for pattern in _TEXTS):
                digest.update(file.read())
                continue
            for start in (0, max(size // 2 - _BYTES // 2, 0), max(size - _BYTES, 0)):
                file.seek(start)
                digest.update(file.read(_BYTES))
    return digest.hexdigest()
