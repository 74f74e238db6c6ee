"""The sums of a log line that is not written yet, kept with a checkpoint: a resumed run writes the line in full.

Every process keeps its own, because the losses and figures are summed over processes when the line is written.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from vgf_llm.runs.files import write_json_atomic
from vgf_llm.training.metrics import MetricSums
from vgf_llm.training.transformers_internals import LossSums

if TYPE_CHECKING:
    from accelerate import Accelerator


def save_log_state(folder: str | Path, accelerator: Accelerator, metrics: MetricSums, losses: LossSums) -> None:
    """Write this process's sums since the last log line into a checkpoint.

    Raises:
        OutputError: The file cannot be written.
    """
    state = {
        "processes": accelerator.num_processes,
        "metrics": metrics.state_dict(),
        "loss": losses.loss,
        "logged_loss": losses.logged_loss,
        "logged_step": losses.logged_step,
    }
    write_json_atomic(_path(folder, accelerator), state)


def load_log_state(folder: str | Path, accelerator: Accelerator, metrics: MetricSums) -> LossSums | None:
    """Give figures their sums of a checkpoint back, and return those of the loss.

    Nothing is given back to another number of processes, whose shares would be others.
    """
    path = _path(folder, accelerator)
    if not path.is_file():
        return None
    saved = json.loads(path.read_text())
    if saved["processes"] != accelerator.num_processes:
        return None
    metrics.load_state_dict(saved["metrics"])
    return LossSums(saved["loss"], saved["logged_loss"], saved["logged_step"])


def _path(folder: str | Path, accelerator: Accelerator) -> Path:
    return Path(folder) / f"log_state_{accelerator.process_index}.json"
