"""The table that particles live in, on its way to an engine's processes: a folder named in vLLM's additional config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

TABLE_SETTING = "vgf_table"
_NAME, _KEY = "table.safetensors", "table_VD"


@dataclass(frozen=True)
class TableFolder:
    """An additional config that names the folder. What vLLM compiles does not hang by it, and so is found again."""

    folder: str

    def compute_hash(self) -> str:
        """Return the same for every folder: a mapping would be hashed with its temporary name."""
        return TABLE_SETTING


def save_table(table_VD: Tensor, folder: str | Path) -> Path:
    """Write a table to where an engine finds it; returns the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({_KEY: table_VD.detach().cpu().contiguous().clone()}, folder / _NAME)
    return folder


def load_table(config: object) -> Tensor | None:
    """Return the table [V, D] that an additional config names; None where it names none.

    Args:
        config: A :class:`TableFolder`, a mapping with the folder under ``vgf_table``, or anything else.
    """
    named = config.get(TABLE_SETTING) if isinstance(config, Mapping) else None
    folder = config.folder if isinstance(config, TableFolder) else named
    return None if folder is None else load_file(Path(folder) / _NAME)[_KEY]
