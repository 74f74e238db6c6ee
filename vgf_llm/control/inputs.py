"""Looks at the data, environment and trackers of a control run before torch is imported."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from vgf_llm.control.fetching import is_minari
from vgf_llm.control.settings import AgentSettings, DataSettings, TrainSettings
from vgf_llm.errors import ConfigError, DataError

_FILES = (".npz", ".hdf5", ".h5")


def check_options(settings: TrainSettings, data: DataSettings, agent: AgentSettings) -> None:
    """Refuse options that do not go together.

    Raises:
        ConfigError: Naming them.
    """
    if 0 < settings.cached_samples < agent.num_particles:
        raise ConfigError(
            f"cached_samples must be 0 or at least num_particles ({agent.num_particles}), got {settings.cached_samples}"
        )
    if data.env is None and settings.online_steps:
        raise ConfigError("online_steps needs an environment: set env")


def check_names(settings: TrainSettings, data: DataSettings) -> None:
    """Refuse trackers, environments and data that are not there, judged by their names alone.

    Raises:
        ConfigError: A package is missing.
        DataError: The data file does not exist or is of another kind.
    """
    for name in settings.report_to:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"report_to: {name} is not installed: pip install {name}")
    _check_environment(data.env)
    if data.data is None:
        return
    source = Path(data.data)
    if not source.exists() and not is_minari(data.data):
        raise DataError(f"data: '{data.data}' does not exist (current folder: {Path.cwd()})")
    if source.is_file() and source.suffix not in _FILES:
        raise DataError(f"data: '{data.data}' is not a .npz or .hdf5 file, nor a folder")


def _check_environment(name: str | None) -> None:
    if name is None:
        return
    if ":" in name:
        if not name.partition(":")[0] or not name.partition(":")[2]:
            raise ConfigError(f"env: '{name}' cannot be loaded; write package.module:function")
        return
    package = "ogbench" if "singletask" in name.split("-") else "gymnasium"
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"env: '{name}' needs {package}: pip install 'vgf-llm[control]'")
