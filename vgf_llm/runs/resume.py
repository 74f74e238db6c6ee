"""The setting `resume` of every command: false, true, or a folder.

    false       a new run; output_dir holds no checkpoints, a result there is replaced
    true        continue from the newest whole checkpoint (or the rows) of output_dir; a new run where there is neither
    <folder>    continue from that checkpoint

Commands that write rows and no checkpoints take true or false. Nothing heavy is imported here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vgf_llm.errors import ConfigError, require
from vgf_llm.runs.manifest import MANIFEST_NAME

STATE_NAME = "trainer_state.json"
"""Of transformers' Trainer, which writes it last."""
_TRUE_WORDS = ("last", "latest", "newest", "auto", "yes", "on")  # of other programs, and of earlier versions
_FALSE_WORDS = ("null", "none", "no", "off", "never", "~")
_LOADED = ("adapter_config.json", "config.json")  # a folder with one of them loads


def require_resume(value: bool | str) -> None:
    """Refuse what is neither true, false, nor a text that can name a folder; for a `__post_init__`.

    Raises:
        SettingError: Naming the key, the value and what to write.
    """
    valid = "true (the newest checkpoint of output_dir), false (a new run), or the folder of a checkpoint"
    holds = isinstance(value, bool) or (isinstance(value, str) and bool(value.strip()))
    require(holds, "resume", value, valid)


def require_resume_rows(value: bool | str) -> None:
    """Refuse a folder where a run is its output_dir: its rows are continued, and it has no checkpoints.

    Raises:
        SettingError: Naming the key, the value and what to write.
    """
    valid = "true or false (this command continues the rows of its output_dir: name that folder in output_dir)"
    word = _boolean_for(value)
    require(isinstance(value, bool), "resume", value, valid if word is None else f"true or false: write {word}")


def _boolean_for(value: object) -> str | None:
    """Return the Boolean that a word stands for elsewhere."""
    word = str(value).strip().lower()
    return "true" if word in _TRUE_WORDS else "false" if word in _FALSE_WORDS else None


def check_resume(wanted: bool | str, output_dir: str | Path) -> None:
    """Refuse a folder that is not a checkpoint; cheap, before any library is imported or folder made.

    Args:
        wanted: The setting.
        output_dir: Where the newest checkpoint is looked for.

    Raises:
        ConfigError: There is no such folder, or it is not a checkpoint; names one where it is the folder of a run.
    """
    from vgf_llm.runs.checkpoint import published

    if isinstance(wanted, bool):
        return
    folder = Path(wanted)
    if not folder.is_dir():
        word = _boolean_for(wanted)
        meant = "true takes the newest checkpoint" if word is None else f"write {word}"
        raise ConfigError(f"resume: '{wanted}' is not a folder; {meant}, or name a checkpoint in '{output_dir}'")
    if any((folder / name).is_file() for name in (MANIFEST_NAME, STATE_NAME)):
        return
    if found := published(folder):
        raise ConfigError(
            f"resume: '{wanted}' is not a checkpoint but the folder of a run; its newest is '{found[-1]}'"
        )
    raise ConfigError(
        f"resume: '{wanted}' is not a checkpoint: it has no {MANIFEST_NAME}; name one in '{output_dir}', or write true "
        "for the newest"
    )


def refuse_mixing(output_dir: str | Path, found: Sequence[Path]) -> None:
    """Refuse to write among the checkpoints of another run.

    Args:
        output_dir: Of the run.
        found: The other run's checkpoints in it.

    Raises:
        ConfigError: There are some.
    """
    if found:
        raise ConfigError(
            f"output_dir '{output_dir}' holds {', '.join(path.name for path in found)} of another run, which this one "
            "would mix with its own and delete; set resume: true to continue that run, name another output_dir, or "
            "remove them"
        )


def refuse_new_run(wanted: bool | str, output_dir: str | Path) -> None:
    """Refuse a new run in a folder that holds checkpoints; a result there may be replaced.

    Raises:
        ConfigError: As `refuse_mixing`.
    """
    from vgf_llm.runs.checkpoint import published

    if wanted is False:
        refuse_mixing(output_dir, published(output_dir))


def refuse_to_train_anew(output_dir: str | Path) -> None:
    """Refuse to start anew under `resume: true` where a result would be lost by it.

    Called where output_dir holds no checkpoint to continue from.

    Raises:
        ConfigError: There is a result.
    """
    if any((Path(output_dir) / name).is_file() for name in _LOADED):
        raise ConfigError(
            f"resume: '{output_dir}' holds the result of a run and no whole checkpoint to continue from (save_steps "
            "writes them); name another output_dir, or write resume: false to train anew and replace the result"
        )
