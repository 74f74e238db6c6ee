"""Where a run goes on from."""

from __future__ import annotations

from pathlib import Path

from vgf_llm.console.screen import say
from vgf_llm.distributed.processes import of_first
from vgf_llm.distributed.shards import engine_name, require_state
from vgf_llm.errors import CheckpointError, ConfigError
from vgf_llm.runs.checkpoint import beyond, newest_whole, supersede
from vgf_llm.runs.manifest import check_identity, verify
from vgf_llm.training.checkpoints import Checkpoints
from vgf_llm.training.settings import OptimSettings

_LENGTH = ("optimisation.max_steps", "optimisation.num_train_epochs")  # may change: a run may be made longer or shorter


def checkpoint_to_resume(checkpoints: Checkpoints, optim: OptimSettings) -> str | None:
    """Return the checkpoint that training goes on from, checked, or None for a new run.

    Called by all processes. Checkpoints of output_dir beyond that step would be taken for newer ones of this run: they
    are set aside where this run goes on with an earlier one of theirs, and are an error otherwise.

    Raises:
        CheckpointError: The one that is named is not whole, or lacks what the engine reads.
        ConfigError: It is of another run; names what differs. Or there is none of that name. Or a new run would
            overwrite another's.
        OutputError: A later checkpoint cannot be set aside.
    """
    wanted = optim.resume_from_checkpoint
    folder, step = _find(checkpoints, wanted), 0
    if folder is not None:
        step = _check(folder, checkpoints, optim)
    _make_way(checkpoints, folder, step, goes_on=wanted is True)
    if folder is None:
        return None
    if checkpoints.is_first:
        say(f"going on from '{folder}'")
    return str(folder)


def _find(checkpoints: Checkpoints, wanted: bool | str) -> Path | None:
    """Return the folder that is named, or the newest whole one."""
    if wanted is False:
        return None
    if wanted is not True:
        if not Path(wanted).is_dir():
            raise ConfigError(f"resume_from_checkpoint: '{wanted}' is no folder; true takes the newest of output_dir")
        return Path(wanted)
    first = checkpoints.is_first
    folder: Path | None = of_first(newest_whole(checkpoints.output_dir) if first else None)
    if folder is None and first:
        say(f"'{checkpoints.output_dir}' holds no whole checkpoint: starting anew")
    return folder


def _check(folder: Path, checkpoints: Checkpoints, optim: OptimSettings) -> int:
    """Verify a checkpoint and that it is of this run; returns its step."""
    try:
        manifest = verify(folder)
    except CheckpointError as error:
        raise CheckpointError(f"resume_from_checkpoint: {error}") from error
    allowed = check_identity(manifest, checkpoints.identity, optim.allow_changes, _LENGTH)
    require_state(folder, engine_name(checkpoints.accelerator))
    if checkpoints.is_first:
        for change in allowed:
            say(f"changed since the checkpoint: {change}")
    return manifest.step


def _make_way(checkpoints: Checkpoints, folder: Path | None, step: int, goes_on: bool) -> None:
    """Set later checkpoints of this run aside, and refuse to mix with those of another one."""
    output_dir, first = checkpoints.output_dir, checkpoints.is_first
    own = goes_on or (folder is not None and folder.resolve().parent == output_dir.resolve())
    found = of_first(beyond(output_dir, step if own else 0) if first else [])
    if not found:
        return
    names = ", ".join(path.name for path in found)
    if not own:
        raise ConfigError(
            f"output_dir '{output_dir}' holds {names} of another run, which this one would mix with its own and "
            "delete; set resume_from_checkpoint: true to go on with that run, name another output_dir, or remove them"
        )
    if first:
        say(f"set aside as .<name>.superseded: {names}")
        supersede(found)
