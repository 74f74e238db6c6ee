"""A run that can be stopped and gone on with: who may write into a folder, and whether the run is the same one."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vgf_llm.errors import ConfigError, OutputError
from vgf_llm.runs.files import write_json_atomic

Config = dict[str, Any]
_HOW = ("resume", "record", "batch_prompts", "output_dir", "engine")  # how a run is made, not what it makes
_UNSET: tuple[Any, ...] = (None, "", [], {})  # of a setting that is newer than the run


def no_changes(before: Config, now: Config) -> list[str]:
    """Find nothing to object to beyond the keys themselves."""
    return []


def refuse_rows(rows_path: Path, resume: bool) -> None:
    """Refuse rows that are there already; cheap, so that it can come before anything is loaded.

    Raises:
        OutputError: There are rows and ``resume`` is off.
    """
    if rows_path.exists() and not resume:
        raise OutputError(f"{rows_path} exists; add --resume to go on with it, or name another output_dir")


def claim(
    rows_path: Path,
    config: Config,
    *,
    resume: bool,
    free: Sequence[str] = (),
    changes: Callable[[Config, Config], list[str]] = no_changes,
) -> None:
    """Refuse to mix the rows of two runs; record the configuration of this one in config.json beside the rows.

    Args:
        rows_path: The run's rows, in its output folder.
        config: Everything that decides what a row holds; keys that only say how it is made are left out here.
        resume: Whether the user asked to go on with rows that are there.
        free: Keys that may change, because they only add rows.
        changes: Given the old and the new configuration, names what else has changed.

    Raises:
        OutputError: There are rows and ``resume`` is off, or they stand without their configuration, or it is broken.
        ConfigError: ``resume`` is on and the configuration is another one.
    """
    output_dir, config_path = rows_path.parent, rows_path.parent / "config.json"
    config = {key: value for key, value in config.items() if key not in _HOW}
    refuse_rows(rows_path, resume)
    if rows_path.exists():
        if not config_path.exists():
            raise OutputError(f"{rows_path} exists without its config.json; name another output_dir")
        before = _read_config(config_path)
        newer = {key for key, value in config.items() if key not in before and value in _UNSET}
        changed = [k for k in config if k not in {*free, *newer} and before.get(k) != config[k]]
        changed += changes(before, config)
        if changed:
            raise ConfigError(
                f"{output_dir} was started with other settings ({', '.join(changed)}; the old ones are in its "
                "config.json); resume with those, or name another output_dir"
            )
    write_json_atomic(config_path, config)


def _read_config(path: Path) -> Config:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OutputError(f"{path} cannot be read ({error}); name another output_dir") from error
    if not isinstance(found, dict):
        raise OutputError(f"{path} holds a {type(found).__name__} where settings are expected; name another output_dir")
    return found
