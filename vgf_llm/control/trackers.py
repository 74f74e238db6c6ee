"""TensorBoard and Weights & Biases beside metrics.jsonl; each package is imported only where it is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vgf_llm.errors import ConfigError


class Trackers:
    """The trackers of a run.

    Args:
        names: "tensorboard", "wandb" or both; none writes nowhere.
        folder: Folder of the run; TensorBoard's files go into its runs/.

    Raises:
        ConfigError: The package of one is missing.
    """

    def __init__(self, names: Sequence[str], folder: Path) -> None:
        self._board: Any = None
        self._wandb: Any = None
        if "tensorboard" in names:
            self._board = _import("torch.utils.tensorboard", "tensorboard").SummaryWriter(str(folder / "runs"))
        if "wandb" in names:
            self._wandb = _import("wandb", "wandb").init(dir=str(folder), name=folder.name)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Write the numbers of a step."""
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)

    def close(self) -> None:
        """Finish what is being written."""
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def _import(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"report_to: {package} is not installed: pip install {package}") from error
