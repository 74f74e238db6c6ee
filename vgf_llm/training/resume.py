"""The checkpoint that a training run continues from."""

from __future__ import annotations

from collections.abc import Callable

from vgf_llm.console.screen import say
from vgf_llm.distributed.shards import engine_name
from vgf_llm.runs.going_on import check, check_length, find, make_way
from vgf_llm.training.checkpoints import Checkpoints
from vgf_llm.training.settings import OptimSettings


def checkpoint_to_resume(
    checkpoints: Checkpoints, optim: OptimSettings, steps: Callable[[], int] | None = None
) -> str | None:
    """Return the checkpoint that training continues from, checked, or None for a new run.

    Called by all processes. Checkpoints of output_dir beyond that step would be taken for newer ones of this run: they
    are set aside where this run continues from an earlier one of theirs, and are an error otherwise.

    Args:
        checkpoints: Of the run.
        optim: Its settings.
        steps: Returns the steps that they ask for; a checkpoint beyond them is refused.

    Raises:
        CheckpointError: The one that is named is not whole, or lacks the optimiser state.
        ConfigError: It is of another run; names what differs. Or it is beyond the last step. Or there is none of that
            name. Or a new run would overwrite another's checkpoints or result.
        OutputError: A later checkpoint cannot be set aside.
    """
    first, step = checkpoints.is_first, 0
    folder = find(checkpoints.output_dir, optim.resume, first)
    if folder is not None:
        engine = engine_name(checkpoints.accelerator)
        step = check(folder, checkpoints.identity, engine, first=first, allow=optim.allow_changes)
        if steps is not None:
            check_length(folder, steps(), optim.max_steps)
    make_way(checkpoints.output_dir, folder, step, optim.resume, first)
    if folder is None:
        return None
    if first:
        say(f"going on from '{folder}'")
    return str(folder)
