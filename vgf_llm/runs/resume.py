"""The setting `resume` of every command: false, true, or a folder.

    false       a new run
    true        continue from the newest whole checkpoint (or the rows) of output_dir; a new run where there is none
    <folder>    continue from that checkpoint

Commands that write rows and no checkpoints take true or false. Nothing heavy is imported here.
"""

from __future__ import annotations

from pathlib import Path

from vgf_llm.errors import ConfigError, require

_TRUE_WORDS = ("last", "latest", "newest", "auto")  # of other programs, and of earlier versions


def require_resume(value: bool | str) -> None:
    """Refuse what is neither true, false, nor a text that can name a folder; for a `__post_init__`.

    Raises:
        SettingError: Naming the key, the value and what to write.
    """
    valid = "true (the newest checkpoint of output_dir), false (a new run), or the folder of a checkpoint"
    require(isinstance(value, bool) or bool(value.strip()), "resume", value, valid)


def require_resume_rows(value: bool | str) -> None:
    """Refuse a folder where a run is its output_dir: its rows are continued, and it has no checkpoints.

    Raises:
        SettingError: Naming the key, the value and what to write.
    """
    valid = "true or false (this command continues the rows of its output_dir: name that folder in output_dir)"
    require(isinstance(value, bool), "resume", value, valid)


def check_resume(wanted: bool | str, output_dir: str | Path) -> None:
    """Refuse a checkpoint folder that does not exist; cheap, before any library is imported.

    Args:
        wanted: The setting.
        output_dir: Where the newest checkpoint is looked for.

    Raises:
        ConfigError: There is no such folder.
    """
    if isinstance(wanted, bool) or Path(wanted).is_dir():
        return
    meant = "write true" if wanted in _TRUE_WORDS else "true takes the newest checkpoint"
    raise ConfigError(f"resume: '{wanted}' is not a folder; {meant}, or name a checkpoint in '{output_dir}'")
