"""A run that was stopped after its last step: nothing is left to train, only its result to be put in place."""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers import TrainerState

from vgf_llm.console.screen import say
from vgf_llm.runs.checkpoint import writing
from vgf_llm.runs.going_on import is_finished
from vgf_llm.training.checkpoints import VALUE_FOLDER, Checkpoints
from vgf_llm.training.settings import OptimSettings

_RESULT = ("adapter_*", "model*.safetensors*", "*config.json", "tokenizer*", "chat_template*", "README.md")


def finished(checkpoint: str, optim: OptimSettings) -> bool:
    """Return whether a checkpoint is of the last step that the settings ask for."""
    return is_finished(Path(checkpoint), optim.max_steps, optim.num_train_epochs)


def take_result(checkpoints: Checkpoints, checkpoint: str) -> TrainerState:
    """Copy a finished run's policy and value from its last checkpoint to its output folder; returns its state.

    Raises:
        OutputError: The folder cannot be written.
    """
    source, target = Path(checkpoint), checkpoints.output_dir
    state: TrainerState = TrainerState.load_from_json(str(source / "trainer_state.json"))
    if checkpoints.is_first:
        say(f"'{source}' is of the last step: nothing is left to train; raise max_steps to go on")
        with writing("the result", target, "make room, and call this again"):
            for path in sorted({path for pattern in _RESULT for path in source.glob(pattern)}):
                shutil.copy2(path, target / path.name)
            if (source / VALUE_FOLDER).is_dir():
                shutil.copytree(source / VALUE_FOLDER, target / VALUE_FOLDER, dirs_exist_ok=True)
    checkpoints.accelerator.wait_for_everyone()
    return state
