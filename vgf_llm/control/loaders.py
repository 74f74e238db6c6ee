"""Reads OGBench, D4RL and Minari files into transitions.

    *.npz           OGBench: rows are states; read by the package's own loader, rewards relabelled by it for the task
    *.hdf5, *.h5    D4RL: observations, actions, rewards, terminals, and timeouts or next_observations
    a folder        Minari: data/main_data.hdf5 with a group an episode; or the data set's name

A D4RL row whose episode ran out of time has no next state in the file and is left out; where the task ended, the next
state is masked and never looked at.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vgf_llm.control.data import (
    Transitions,
    check_actions,
    check_episodes,
    check_fields,
    check_width,
    unit_actions,
)
from vgf_llm.control.envs import Bounds, is_ogbench
from vgf_llm.control.fetching import is_minari, minari_folder, ogbench_file
from vgf_llm.control.hdf5 import d4rl_fields, minari_rows
from vgf_llm.errors import ConfigError, DataError

_ROW = {"observations": 2, "actions": 2, "rewards": 1, "terminals": 1}


def load(path: str | None, env_name: str | None, env: Any, bounds: Bounds | None) -> Transitions:
    """Read a data set.

    Args:
        path: File, folder, or name of a Minari data set; None: OGBench's package fetches that of `env_name`.
        env_name: Name of the environment, or None.
        env: The environment itself, which relabels OGBench's data, or None.
        bounds: Bounds of its actions; None takes the file's as [-1, 1].

    Raises:
        ConfigError: No path where one is needed, or a package is missing.
        DataError: A file cannot be read or is refused; names file and row.
    """
    if path is None:
        if env_name is None or not is_ogbench(env_name):
            raise ConfigError("data: only OGBench's data sets are fetched by name; give a path")
        path = ogbench_file(env_name)
    source = Path(path)
    if not source.exists() and is_minari(path):
        source = minari_folder(path)
    if source.is_dir():
        name, arrays = minari_rows(source, bounds)
        return from_rows(name, arrays, bounds)
    if not source.is_file():
        raise DataError(f"data: '{path}' does not exist")
    if source.suffix == ".npz":
        if env_name is None or not is_ogbench(env_name):
            raise ConfigError(
                f"env: '{path}' holds no rewards; name the OGBench task, as in cube-single-play-singletask-task1-v0"
            )
        return _ogbench(source, env_name, env)
    if source.suffix in (".hdf5", ".h5"):
        return from_rows(path, d4rl_fields(source, (*_ROW, "timeouts", "next_observations")), bounds)
    raise DataError(f"data: '{path}' is no .npz, .hdf5 or folder")


def from_rows(source: str, arrays: Mapping[str, np.ndarray], bounds: Bounds | None) -> Transitions:
    """Build transitions from D4RL's fields (head of this module), refusing what does not fit.

    Args:
        source: File, the start of a message.
        arrays: Fields by name; further ones are ignored.
        bounds: Bounds of the actions; None: [-1, 1].

    Raises:
        DataError: See `check_fields`, `unit_actions`, `check_episodes`.
    """
    wanted = dict(_ROW)
    if "next_observations" in arrays:
        wanted["next_observations"] = 2
    elif "timeouts" not in arrays:
        raise DataError(f"{source}: needs field 'timeouts' or 'next_observations' to tell episodes apart")
    if "timeouts" in arrays:
        wanted["timeouts"] = 1
    arrays = {name: np.asarray(arrays[name]) for name in wanted if name in arrays}
    check_fields(source, arrays, wanted)
    actions = unit_actions(source, arrays["actions"], bounds)
    terminals = arrays["terminals"].astype(bool)
    timeouts = arrays["timeouts"].astype(bool) if "timeouts" in arrays else np.zeros_like(terminals)
    observations = arrays["observations"].astype(np.float32)
    if "next_observations" in arrays:
        following = arrays["next_observations"].astype(np.float32)
        kept = np.ones(len(actions), dtype=bool)
        ends = terminals | timeouts | np.append(np.abs(observations[1:] - following[:-1]).max(1) > 1e-6, True)
    else:
        following = np.concatenate([observations[1:], observations[-1:]])
        ends = terminals | timeouts
        ends[-1] = True
        kept = ~ends | terminals
        check_episodes(source, ends, kept)
        ends |= np.append(~kept[1:], False)  # the last row that is kept of an episode that ran out of time
    return Transitions(
        observations[kept],
        actions[kept],
        arrays["rewards"].astype(np.float32)[kept],
        (1.0 - terminals).astype(np.float32)[kept],
        following[kept],
        ends[kept],
    )


def _ogbench(path: Path, env_name: str, env: Any) -> Transitions:
    from ogbench.relabel_utils import relabel_dataset
    from ogbench.utils import load_dataset

    raw = _npz(path)
    _check_ogbench(str(path), env_name, env, raw)
    data = load_dataset(str(path), add_info=True)
    relabel_dataset(env_name, env, data)
    return Transitions(
        data["observations"],
        np.clip(data["actions"], -1, 1),
        data["rewards"],
        data["masks"],
        data["next_observations"],
        data["terminals"].astype(bool),
    )


def _npz(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an .npz file."""
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise DataError(f"data: '{path}' holds one array without a name (.npy); write it with numpy.savez")
        with file:
            return {name: np.asarray(file[name]) for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError) as error:
        raise DataError(f"data: '{path}' cannot be read ({error}); bring it or make it again") from error


def _check_ogbench(source: str, env_name: str, env: Any, raw: Mapping[str, np.ndarray]) -> None:
    """Refuse rows of states that the package's loader or its relabelling would trip over or take wrongly."""
    wanted = {"observations": 2, "actions": 2, "terminals": 1, "qpos": 2}
    if env_name.split("-")[0] in ("scene", "puzzle"):
        wanted["button_states"] = 2
    check_fields(source, raw, wanted)
    rows = len(raw["actions"])
    for name in ("qvel", "button_states"):  # the loader takes the rows of these where they are there
        if name in raw and raw[name].shape[:1] != (rows,):
            raise DataError(f"{source}: field '{name}' has shape {raw[name].shape}, 'actions' has {rows} rows")
    widths = {
        "observations": env.observation_space.shape[0],
        "actions": env.action_space.shape[0],
        "qpos": getattr(getattr(env.unwrapped, "model", None), "nq", None),
        "button_states": getattr(env.unwrapped, "_num_buttons", None),
    }
    for name, width in widths.items():
        if name in wanted and width is not None:
            check_width(source, name, raw[name], width)
    check_actions(source, raw["actions"])
    terminals = raw["terminals"].astype(bool)
    check_episodes(source, terminals, ~terminals)
    if not terminals[-1]:
        raise DataError(
            f"{source}: field 'terminals', row {rows - 1}: the last row must end an episode, has "
            f"{raw['terminals'][-1]}; leave out the rows after row {np.flatnonzero(terminals)[-1]}"
        )
