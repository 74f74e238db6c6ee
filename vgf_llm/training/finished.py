"""A run that was stopped after its last step: nothing is left to train, only its result to be put in place."""

from __future__ import annotations

from pathlib import Path

from transformers import TrainerState

from vgf_llm.console.screen import say
from vgf_llm.runs.going_on import best_of
from vgf_llm.runs.result import copy_result
from vgf_llm.training.checkpoints import Checkpoints


def take_result(checkpoints: Checkpoints, checkpoint: str) -> TrainerState:
    """Put a finished run's policy and value in place, from its last checkpoint or its best; returns the last's state.

    Raises:
        OutputError: The folder cannot be written.
    """
    source = Path(checkpoint)
    state: TrainerState = TrainerState.load_from_json(str(source / "trainer_state.json"))
    if checkpoints.is_first:
        say(f"'{source}' is of the last step: nothing is left to train; raise max_steps to go on")
        with checkpoints.replacing(checkpoints.output_dir) as staging:
            copy_result(best_of(source), staging)
    checkpoints.accelerator.wait_for_everyone()
    return state
