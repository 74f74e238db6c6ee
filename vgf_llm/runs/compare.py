"""Hold two checkpoints against each other, bit by bit: a resumed run has to end where an unbroken one does.

Tensors are compared as bytes (a NaN equals itself, 0.0 and -0.0 differ), the trainer's log without the fields that a
clock writes. Files that hold no tensors this reader may open safely are compared as bytes.
"""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from vgf_llm.runs.manifest import MANIFEST_NAME

# The manifest follows from the others, the pickled arguments and the card name the folder they were written for.
_NOT_STATE = {MANIFEST_NAME, "training_args.bin", "README.md"}
_WALL_CLOCK = ("runtime", "_per_second", "_sec", "_seconds", "best_model_checkpoint", "peak_memory_gib")
_STAGES = ".seconds/"
_SETS = ("target_modules", "modules_to_save")  # PEFT writes them in another order in every process
_PICKLED = {".pt", ".pth", ".bin"}


def compare_checkpoints(one: str | Path, other: str | Path) -> list[str]:
    """Name what differs between two checkpoints.

    Args:
        one: a checkpoint folder.
        other: another one.

    Returns:
        One line for each difference, sorted by file (``optimizer.pt: state.0.exp_avg``); empty where there is none.

    Raises:
        OSError: a file cannot be read; ``verify`` both first.
    """
    one, other = Path(one), Path(other)
    names = [{p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()} for root in (one, other)]
    lines = []
    for name in sorted((names[0] | names[1]) - _NOT_STATE):
        if name not in names[0] or name not in names[1]:
            lines.append(f"{name}: only in '{one if name in names[0] else other}'")
        else:
            lines += [f"{name}: {difference}" for difference in _compare_file(one / name, other / name)]
    return lines


def _compare_file(one: Path, other: Path) -> Iterator[str]:
    if one.read_bytes() == other.read_bytes():
        return
    if one.suffix == ".safetensors":
        yield from _compare_trees(_read_safetensors(one), _read_safetensors(other))
    elif one.suffix == ".json":
        yield from _compare_json(one, other)
    elif one.suffix in _PICKLED:
        try:
            trees = _read_pickled(one), _read_pickled(other)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            yield f"bytes differ (not opened as tensors: {str(error).splitlines()[0]})"
        else:
            yield from _compare_trees(*trees)
    else:
        yield "bytes differ"


def _compare_json(one: Path, other: Path) -> Iterator[str]:
    try:
        contents = [json.loads(path.read_bytes()) for path in (one, other)]
        for content in contents:
            content |= {name: sorted(content[name]) for name in _SETS if isinstance(content.get(name), list)}
        trees = [dict(_flatten(content)) for content in contents]
    except ValueError:
        yield "bytes differ (not JSON)"
        return
    for tree in trees:
        for key in [key for key in tree if key.endswith(_WALL_CLOCK) or _STAGES in key]:
            del tree[key]
    yield from _compare_trees(*trees)


def _compare_trees(one: Any, other: Any) -> Iterator[str]:
    """Yield the dotted key of every leaf that differs, with both values where they are no arrays."""
    leaves, others = dict(_flatten(one)), dict(_flatten(other))
    for key in sorted(leaves.keys() | others.keys()):
        if key not in leaves or key not in others:
            yield f"{key} only in the {'first' if key in leaves else 'second'}"
        elif not _same(leaves[key], others[key]):
            plain = not isinstance(leaves[key], torch.Tensor | np.ndarray)
            yield f"{key} {leaves[key]!r} != {others[key]!r}" if plain else key


def _flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        items = list(tree.items())
    elif isinstance(tree, list | tuple) and not (len(tree) > 64 and isinstance(tree[0], int)):
        items = list(enumerate(tree))
    else:  # a leaf, or a generator's state, which is one value in hundreds of integers
        yield prefix, np.array(tree) if isinstance(tree, list | tuple) else tree
        return
    for key, value in items:
        yield from _flatten(value, f"{prefix}.{key}" if prefix else str(key))


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and _bytes(one) == _bytes(other)
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    if isinstance(one, float) and isinstance(other, float):
        return one == other or (math.isnan(one) and math.isnan(other))
    return bool(type(one) is type(other) and one == other)


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _read_safetensors(path: Path) -> dict[str, Any]:
    """Tensors by full name."""
    with safe_open(path, framework="pt", device="cpu") as handle:
        return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (not a dictionary)


def _read_pickled(path: Path) -> Any:
    """Load tensors and plain containers only; NumPy's arrays are allowed because the random state holds them."""
    reconstruct = np._core.multiarray._reconstruct  # type: ignore[attr-defined]
    allowed = [reconstruct, np.ndarray, np.dtype, type(np.dtype(np.uint32))]
    with torch.serialization.safe_globals(allowed):
        return torch.load(path, map_location="cpu", weights_only=True)
