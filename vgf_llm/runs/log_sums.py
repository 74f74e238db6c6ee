"""The sums of a log line that is not written yet, kept with a checkpoint: a resumed run writes the line in full.

Every process keeps its own, because losses and figures are summed over processes when the line is written.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback

from vgf_llm.runs.files import write_json_atomic
from vgf_llm.runs.trainer_internals import LossSums, loss_sums, set_loss_sums

_NAME = "log_state_{}.json"


def save_log_sums(trainer: Trainer, folder: str | Path, figures: Any) -> None:
    """Write this process's sums since the last log line into a checkpoint.

    Args:
        trainer: Has summed its loss.
        folder: Of the checkpoint.
        figures: The trainer's own sums, anything that JSON holds.

    Raises:
        OutputError: The file cannot be written.
    """
    sums = loss_sums(trainer)
    state = {
        "processes": trainer.accelerator.num_processes,
        "figures": figures,
        "loss": sums.loss,
        "logged_loss": sums.logged_loss,
        "logged_step": sums.logged_step,
    }
    write_json_atomic(_path(trainer, folder), state)


def load_log_sums(trainer: Trainer, folder: str | Path) -> Any:
    """Give a trainer the loss sums of a checkpoint back, and return its own figures; None where there are none.

    To be called when training has begun, which is when the Trainer sets its sums to 0. Nothing is given back to another
    number of processes, whose shares would be others.
    """
    path = _path(trainer, folder)
    if not path.is_file():
        return None
    saved = json.loads(path.read_text())
    if saved["processes"] != trainer.accelerator.num_processes:
        return None
    set_loss_sums(trainer, LossSums(saved["loss"], saved["logged_loss"], saved["logged_step"]))
    return saved["figures"] if "figures" in saved else saved["metrics"]  # the name of earlier versions


def saved_figures(folder: str | Path) -> Any:
    """Return the first process's own sums in a checkpoint.

    Raises:
        OSError, ValueError, KeyError: There are none.
    """
    return json.loads((Path(folder) / _NAME.format(0)).read_bytes())["figures"]


class ContinuesLogging(TrainerCallback):
    """Gives a trainer the sums of a checkpoint back when training begins.

    Args:
        trainer: Continues.
        folder: Of the checkpoint.
        load: Takes the trainer's own sums.
    """

    def __init__(self, trainer: Trainer, folder: str | Path, load: Callable[[Any], None]) -> None:
        self.trainer, self.folder, self.load = trainer, folder, load

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read them, once."""
        self.trainer.remove_callback(self)
        figures = load_log_sums(self.trainer, self.folder)
        if figures is not None:
            self.load(figures)


def _path(trainer: Trainer, folder: str | Path) -> Path:
    return Path(folder) / _NAME.format(trainer.accelerator.process_index)
