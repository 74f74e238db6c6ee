"""The sums of a log line that is not written yet, kept with a checkpoint: a resumed run writes the line in full.

Every process keeps its own, because losses and figures are summed over processes when the line is written.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from vgf_llm.runs.files import write_json_atomic


def save_log_sums(trainer: Any, folder: str | Path, figures: Any) -> None:
    """Write this process's sums since the last log line into a checkpoint.

    Args:
        trainer: A transformers Trainer.
        folder: Of the checkpoint.
        figures: The trainer's own sums, anything that JSON holds.

    Raises:
        OutputError: The file cannot be written.
    """
    state = {
        "processes": trainer.accelerator.num_processes,
        "figures": figures,
        "loss": trainer._tr_loss.item(),
        "logged_loss": trainer._total_loss_scalar,
        "logged_step": trainer._globalstep_last_logged,
    }
    write_json_atomic(_path(trainer, folder), state)


class ContinuesLogging(TrainerCallback):
    """Gives a trainer the sums of a checkpoint back when training begins, which is when the Trainer sets its own to 0.

    Nothing is given back to another number of processes, whose shares would be others.

    Args:
        trainer: Continues.
        folder: Of the checkpoint.
        load: Takes the trainer's own sums.
    """

    def __init__(self, trainer: Any, folder: str | Path, load: Callable[[Any], None]) -> None:
        self.trainer, self.path, self.load = trainer, _path(trainer, folder), load

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read them, once."""
        trainer = self.trainer
        trainer.remove_callback(self)
        if not self.path.is_file():
            return
        saved = json.loads(self.path.read_text())
        if saved["processes"] != trainer.accelerator.num_processes:
            return
        self.load(saved["figures"])
        trainer._tr_loss.fill_(saved["loss"])
        trainer._total_loss_scalar = saved["logged_loss"]
        trainer._globalstep_last_logged = saved["logged_step"]


def _path(trainer: Any, folder: str | Path) -> Path:
    return Path(folder) / f"log_state_{trainer.accelerator.process_index}.json"
