"""The checkpoint that a run continues from: found, verified, of the same run, and the later ones set aside.

Called by all processes of a run; what is read from disk is read by the first and told to the others. Nothing here knows
which trainer it is for.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from vgf_llm.console.screen import say
from vgf_llm.distributed.processes import of_first
from vgf_llm.distributed.shards import require_state
from vgf_llm.errors import CheckpointError, ConfigError
from vgf_llm.runs.checkpoint import beyond, newest_whole, published, supersede
from vgf_llm.runs.manifest import MANIFEST_NAME, check_identity, verify
from vgf_llm.runs.resume import STATE_NAME, check_resume, refuse_mixing, refuse_to_train_anew

LENGTH = ("optimisation.max_steps", "optimisation.num_train_epochs")
"""Keys of an identity that may change: a run may be made longer or shorter."""


def find(output_dir: str | Path, wanted: bool | str, first: bool, unlisted: bool = False) -> Path | None:
    """Return the checkpoint that is named, or the newest whole one; None for a new run.

    Args:
        output_dir: Of the run.
        wanted: The setting `resume`.
        first: Whether this is the first process.
        unlisted: Whether one without a manifest will do, as earlier versions wrote them, where no other is there.

    Raises:
        ConfigError: There is no folder of that name, or no checkpoint but a result, which a new run would replace.
    """
    if wanted is False:
        return None
    if wanted is not True:
        check_resume(wanted, output_dir)
        return Path(wanted)
    found: Path | None = of_first(_newest(output_dir, unlisted) if first else None)
    if found is None:
        refuse_to_train_anew(output_dir)
        if first:
            say(f"'{output_dir}' holds no whole checkpoint: starting anew")
    return found


def _newest(output_dir: str | Path, unlisted: bool) -> Path | None:
    whole = newest_whole(output_dir)
    if whole is not None or not unlisted:
        return whole
    return next((folder for folder in reversed(published(output_dir)) if is_unlisted(folder)), None)


def is_unlisted(folder: Path) -> bool:
    """Return whether a checkpoint is complete but has no manifest, as earlier versions wrote those of rewards."""
    return (folder / STATE_NAME).is_file() and not (folder / MANIFEST_NAME).exists()


def check(
    folder: Path,
    identity: dict[str, Any],
    engine: str,
    *,
    first: bool,
    allow: Collection[str] = (),
    free: Collection[str] = LENGTH,
    unlisted: bool = False,
) -> int:
    """Verify a checkpoint and that it is of this run.

    Args:
        folder: Of the checkpoint.
        identity: Of the run that is to continue from it.
        engine: Of `distributed.shards.engine_name`; the optimiser state that it reads must be there.
        first: Whether this is the first process, which speaks.
        allow: Keys of the identity that may differ.
        free: Keys that need no permission.
        unlisted: Whether one without a manifest is taken, with a line that says so.

    Returns:
        Its step.

    Raises:
        CheckpointError: It is not whole, or lacks the optimiser state.
        ConfigError: It is of another run; names what differs.
    """
    if unlisted and is_unlisted(folder):
        if first:
            say(f"'{folder}' has no {MANIFEST_NAME} (of an earlier version): taken without being verified")
        require_state(folder, engine)
        return step_of(folder)
    try:
        manifest = verify(folder)
    except CheckpointError as error:
        raise CheckpointError(f"resume: {error}") from error
    allowed = check_identity(manifest, identity, allow, free)
    require_state(folder, engine)
    if first:
        for change in allowed:
            say(f"changed since the checkpoint: {change}")
    return manifest.step


def make_way(output_dir: str | Path, folder: Path | None, step: int, wanted: bool | str, first: bool) -> None:
    """Set later checkpoints of this run aside, and refuse to mix with those of another one.

    Args:
        output_dir: Of the run.
        folder: That it continues from; None for a new run.
        step: Of that checkpoint; 0 for a new run.
        wanted: The setting `resume`.
        first: Whether this is the first process.

    Raises:
        ConfigError: output_dir holds checkpoints that are not this run's.
        OutputError: One of them cannot be renamed.
    """
    output_dir = Path(output_dir)
    own = wanted is True or (folder is not None and folder.resolve().parent == output_dir.resolve())
    found = of_first(beyond(output_dir, step if own else 0) if first else [])
    if not found:
        return
    if not own:
        refuse_mixing(output_dir, found)
    if first:
        say(f"set aside as .<name>.superseded: {', '.join(path.name for path in found)}")
        supersede(found)


def step_of(folder: Path) -> int:
    """Return the step of a checkpoint of transformers' Trainer.

    Raises:
        CheckpointError: Its trainer_state.json cannot be read.
    """
    return int(_state(folder)["global_step"])


def check_length(folder: Path, steps: int, max_steps: int) -> None:
    """Refuse a checkpoint beyond the last step that the settings ask for.

    Args:
        folder: Of the checkpoint.
        steps: That the run takes under its settings, from its first on.
        max_steps: Of the settings; -1 goes by num_train_epochs.

    Raises:
        ConfigError: Naming both numbers.
    """
    step = step_of(folder)
    if step > steps:
        asked = f"max_steps is {steps}" if max_steps > 0 else f"num_train_epochs asks for {steps}"
        raise ConfigError(
            f"resume: '{folder}' has {step} steps, and {asked}: name an earlier checkpoint, or set max_steps to at "
            f"least {step}"
        )


def is_finished(folder: Path, steps: int) -> bool:
    """Return whether a checkpoint is of the last step that the settings ask for.

    transformers would take one more step from there, at a learning rate beyond its schedule.

    Args:
        folder: Of the checkpoint.
        steps: As for `check_length`.
    """
    return step_of(folder) >= steps


def best_of(folder: Path) -> Path:
    """Return the checkpoint that a finished run's result is taken from: the best where one was kept, else the last.

    Args:
        folder: Of the last checkpoint, verified.

    Raises:
        CheckpointError: The best one is not whole.
    """
    named = _state(folder).get("best_model_checkpoint")
    if not named:
        return folder
    best = folder.parent / Path(named).name  # next to it, also where the run's folder was moved
    if not best.is_dir():
        say(f"'{best}', the best checkpoint, is not there any more: the result is the last one's")
        return folder
    if best != folder and not is_unlisted(best):
        verify(best)
    return best


def _state(folder: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads((folder / STATE_NAME).read_bytes())
        return state | {"global_step": int(state["global_step"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"resume: '{folder / STATE_NAME}' cannot be read ({error!r})") from error
