"""The sums of a log line that is not written yet, kept with a checkpoint: a resumed run writes the line in full.

Every process keeps its own, because the losses and figures are summed over processes when the line is written.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from vgf_llm.runs.files import write_json_atomic

if TYPE_CHECKING:
    from vgf_llm.training.trainer import VGFTrainer


def save_log_state(trainer: VGFTrainer, folder: str | Path) -> None:
    """Write this process's sums since the last log line into a checkpoint.

    Raises:
        OutputError: The file cannot be written.
    """
    state = {
        "processes": trainer.accelerator.num_processes,
        "metrics": trainer.metrics.state_dict(),
        "loss": trainer._tr_loss.item(),
        "logged_loss": trainer._total_loss_scalar,
        "logged_step": trainer._globalstep_last_logged,
    }
    write_json_atomic(_path(trainer, folder), state)


class GoesOnLogging(TrainerCallback):
    """Gives a trainer the sums of a checkpoint back when training begins, which is when the Trainer sets its own to 0.

    Nothing is given back to another number of processes, whose shares would be others.

    Args:
        trainer: Goes on.
        folder: Of the checkpoint.
    """

    def __init__(self, trainer: VGFTrainer, folder: str | Path) -> None:
        self.trainer = trainer
        self.path = _path(trainer, folder)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read them, once."""
        trainer = self.trainer
        trainer.remove_callback(self)
        if not self.path.is_file():
            return
        saved = json.loads(self.path.read_text())
        if saved["processes"] != trainer.accelerator.num_processes:
            return
        trainer.metrics.load_state_dict(saved["metrics"])
        trainer._tr_loss.fill_(saved["loss"])
        trainer._total_loss_scalar = saved["logged_loss"]
        trainer._globalstep_last_logged = saved["logged_step"]


def _path(trainer: VGFTrainer, folder: str | Path) -> Path:
    return Path(folder) / f"log_state_{trainer.accelerator.process_index}.json"
