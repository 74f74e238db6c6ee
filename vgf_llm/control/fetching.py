"""Data sets by name, where a network is there: OGBench's and Minari's packages keep them in stores of their own."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

from vgf_llm.errors import ConfigError, DataError

_PATIENCE_SEC = 30.0
_MINARI_NAME = re.compile(r"[\w.-]+(/[\w.-]+)*-v\d+")
_INSTEAD = "bring the data and give its path, or make some with python -m vgf_llm.control.collect"


def ogbench_file(env_name: str) -> str:
    """Return the file of an OGBench task's data set, downloaded by the package where its store has none.

    Args:
        env_name: Such as cube-single-play-singletask-task1-v0.

    Raises:
        DataError: It cannot be fetched.
    """
    from ogbench.utils import DEFAULT_DATASET_DIR, download_datasets

    parts = env_name.split("-")
    name = "-".join([*parts[: parts.index("singletask")], parts[-1]])
    path = Path(DEFAULT_DATASET_DIR).expanduser() / f"{name}.npz"
    if not path.exists():
        patience = socket.getdefaulttimeout()
        socket.setdefaulttimeout(_PATIENCE_SEC)  # the package waits for ever where no network answers
        try:
            download_datasets([name])
        except OSError as error:
            raise DataError(f"data: '{name}' cannot be fetched ({error}); {_INSTEAD}") from error
        finally:
            socket.setdefaulttimeout(patience)
    return str(path)


def is_minari(name: str) -> bool:
    """Whether a string can be the name of a Minari data set, such as mujoco/hopper/medium-v0."""
    return _MINARI_NAME.fullmatch(name) is not None


def minari_folder(name: str) -> Path:
    """Return the folder of a Minari data set, downloaded by the package where its store has none.

    Args:
        name: Such as mujoco/hopper/medium-v0 or D4RL/pen/human-v2.

    Raises:
        ConfigError: The store has none of that name and the package minari is missing.
        DataError: It cannot be fetched.
    """
    store = Path(os.environ.get("MINARI_DATASETS_PATH", "~/.minari/datasets")).expanduser()
    folder = store / name
    if not folder.is_dir():
        try:
            import minari
        except ImportError as error:
            raise ConfigError(
                f"data: '{name}' is no file or folder, nor in Minari's store '{store}'; give a path, or have one "
                "of that name (as in mujoco/hopper/medium-v0) fetched: pip install minari"
            ) from error
        try:
            minari.download_dataset(name)
        except Exception as error:  # the package lets through what its transports raise
            raise DataError(f"data: '{name}' cannot be fetched ({error}); {_INSTEAD}") from error
    return folder
