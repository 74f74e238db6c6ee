"""Reads HDF5 files into rows of D4RL's fields: a D4RL file itself, or the episodes of a Minari folder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from vgf_llm.control.data import check_fields, check_numbers, check_shape, unit_actions
from vgf_llm.control.envs import Bounds
from vgf_llm.errors import ConfigError, DataError

_EPISODE = {"observations": 2, "actions": 2, "rewards": 1, "terminations": 1}
_PREFIX = "episode_"


def d4rl_fields(path: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Read those fields that a D4RL file has.

    Args:
        path: File.
        names: Fields to look for.

    Raises:
        ConfigError: h5py is missing.
        DataError: The file or a field cannot be read, or it is Minari's.
    """
    with _opened(path) as file:
        arrays = {name: _read(str(path), file, name) for name in names if name in file}
        if not arrays and f"{_PREFIX}0" in file:
            raise DataError(f"{path}: a Minari file; give the folder that holds data/main_data.hdf5")
    return arrays


def minari_rows(folder: Path, bounds: Bounds | None) -> tuple[str, dict[str, np.ndarray]]:
    """Read a Minari folder's episodes, each checked alone, so that a message names the episode and its row.

    Args:
        folder: The data set's folder.
        bounds: Bounds of the actions; None: [-1, 1].

    Returns:
        The file, and the rows of all episodes one after another in D4RL's fields.

    Raises:
        ConfigError: h5py is missing.
        DataError: Names the file, the episode, the field and the row at fault.
    """
    path = next((p for p in (folder / "data" / "main_data.hdf5", folder / "main_data.hdf5") if p.is_file()), None)
    if path is None:
        raise DataError(f"data: folder '{folder}' holds no data/main_data.hdf5")
    columns: dict[str, list[np.ndarray]] = {}
    with _opened(path) as file:
        names = _episode_names(path, file)
        for name in names:
            for key, values in _episode(f"{path}, {name}", file[name], bounds).items():
                kept = columns.setdefault(key, [])
                if kept and kept[0].shape[1:] != values.shape[1:]:
                    raise DataError(
                        f"{path}, {name}: field '{key}' has {values.shape[1]} columns, "
                        f"that of {names[0]} has {kept[0].shape[1]}"
                    )
                kept.append(values)
    return str(path), {key: np.concatenate(values) for key, values in columns.items()}


def _episode_names(path: Path, file: Any) -> list[str]:
    """The episodes' groups in the order of their numbers."""
    names = [name for name in file if name.startswith(_PREFIX)]
    if not names:
        raise DataError(f"{path}: holds no episode")
    for name in names:
        if not name.removeprefix(_PREFIX).isdecimal() or not hasattr(file[name], "keys"):
            raise DataError(f"{path}: '{name}' is no episode; only groups {_PREFIX}<number> may start with '{_PREFIX}'")
    return sorted(names, key=lambda name: int(name.removeprefix(_PREFIX)))


def _episode(source: str, group: Any, bounds: Bounds | None) -> dict[str, np.ndarray]:
    """One episode: T actions and T + 1 observations."""
    arrays = {name: _read(source, group, name) for name in _EPISODE if name in group}
    observations = arrays.get("observations")
    if observations is None:
        raise DataError(f"{source}: field 'observations' is missing; it has {', '.join(sorted(group)) or 'no field'}")
    check_shape(source, "observations", observations, 2)
    check_fields(source, arrays, {name: size for name, size in _EPISODE.items() if name != "observations"})
    actions = arrays["actions"]
    if len(observations) != len(actions) + 1:
        raise DataError(
            f"{source}: {len(actions)} actions need {len(actions) + 1} observations, has {len(observations)}"
        )
    check_numbers(source, "observations", observations)
    unit_actions(source, actions, bounds)
    timeouts = np.zeros(len(actions), dtype=bool)
    timeouts[-1] = True
    return {
        "observations": observations[:-1],
        "next_observations": observations[1:],
        "actions": actions,
        "rewards": arrays["rewards"],
        "terminals": arrays["terminations"],
        "timeouts": timeouts,
    }


def _read(source: str, group: Any, name: str) -> np.ndarray:
    """One field of a file or group."""
    try:
        node = group[name]
        if hasattr(node, "keys"):
            raise DataError(f"{source}: field '{name}' is a group (a dictionary); only plain vectors are read")
        return np.asarray(node[()])
    except (OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{source}: field '{name}' cannot be read ({error}); bring or make the file again") from error


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        import h5py
    except ImportError as error:
        raise ConfigError("data: HDF5 files need h5py: pip install 'vgf-llm[control]'") from error
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, RuntimeError) as error:
        raise DataError(f"data: '{path}' cannot be read ({error}); bring or make it again") from error
