"""Makes a data set in OGBench's format with scripted behaviour, where the published ones cannot be fetched.

    python -m vgf_llm.control.collect --dataset cube-single-play-v0 --episodes 250

A row is (observation, action, whether the episode ends, state of the simulation before the action), as OGBench stores
it: an episode of S rows holds S - 1 transitions. `<dataset>.npz` and `<dataset>-val.npz` load with the package's own
loader. Every episode has its own seed, so the first episodes of a longer collection are those of a shorter one.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vgf_llm.cli import run_main
from vgf_llm.console.library_log import library_output
from vgf_llm.console.progress import track
from vgf_llm.console.screen import emit
from vgf_llm.control.envs import make_plain
from vgf_llm.control.oracles import Behaviour, make_behaviour
from vgf_llm.errors import ConfigError, OutputError, require, require_finite
from vgf_llm.runs.files import check_writable
from vgf_llm.settings.parse import parse

_STATE_KEYS = {"qpos": "prev_qpos", "qvel": "prev_qvel", "button_states": "prev_button_states"}


@dataclass(frozen=True)
class CollectSettings:
    """What to collect."""

    dataset: str = "cube-single-play-v0"
    """Name as OGBench has it, <environment>-<play|noisy|navigate>-v0; also the name of the file."""
    output_dir: str = "outputs/control/data"
    """Folder of the .npz files."""
    episodes: int = 250
    """Training episodes, at least 1."""
    val_episodes: int = 25
    """Episodes of the validation file, at least 1."""
    episode_steps: int = 1001
    """Rows of an episode, at least 2; its transitions are one fewer."""
    noise: float = 0.1
    """Standard deviation >= 0 of the behaviour's noise, in units of the action range."""
    seed: int = 0
    """Seed of the first episode, at least 0; each further episode adds one."""

    def __post_init__(self) -> None:
        """Validate ranges; raises SettingError."""
        last = self.seed + max(self.episodes, 0) + max(self.val_episodes, 0)
        require(self.seed >= 0 and last <= 2**32, "seed", self.seed, "from 0 to 2**32 - 1, for every episode")
        for key, least in (("episodes", 1), ("val_episodes", 1), ("episode_steps", 2)):
            require(getattr(self, key) >= least, key, getattr(self, key), f"at least {least}")
        require_finite("noise", self.noise, 0, "a finite number >= 0")
        require(len(self.dataset.split("-")) >= 3, "dataset", self.dataset, "<environment>-<kind>-v0")


def environment_of(dataset: str) -> tuple[str, str]:
    """Split "cube-single-play-v0" into ("cube-single-v0", "play")."""
    *environment, kind, version = dataset.split("-")
    return "-".join([*environment, version]), kind


def collect(settings: CollectSettings) -> dict[str, Any]:
    """Run the behaviour and write both files.

    Returns:
        Figures of the run: paths, transitions and transitions a second.

    Raises:
        ConfigError: No behaviour or environment of that name, or a package is missing.
        OutputError: A file cannot be written.
    """
    folder = check_writable(settings.output_dir)
    name, kind = environment_of(settings.dataset)
    arguments: dict[str, Any] = {"terminate_at_goal": False, "max_episode_steps": settings.episode_steps}
    if name.split("-")[0] != "pointmaze":
        arguments |= {"mode": "data_collection"}
    env = make_plain(name, **arguments)
    behaviour = make_behaviour(env, name, kind, settings.noise, np.random.default_rng(settings.seed))
    start, rows = time.monotonic(), 0
    paths = []
    counts = {"": settings.episodes, "-val": settings.val_episodes}
    first = settings.seed
    for ending, count in counts.items():
        columns: dict[str, list[Any]] = defaultdict(list)
        for episode in track(range(first, first + count), f"collecting{ending}", count, unit="episodes"):
            _episode(env, behaviour, episode, settings.episode_steps, columns)
        first += count
        paths.append(_write(folder / f"{settings.dataset}{ending}.npz", columns))
        rows += len(columns["actions"])
    seconds = time.monotonic() - start
    transitions = rows - sum(counts.values())
    return {
        "files": [str(path) for path in paths],
        "transitions": transitions,
        "transitions_per_sec": round(transitions / seconds, 1),
    }


def _episode(env: Any, behaviour: Behaviour, seed: int, steps: int, columns: dict[str, list[Any]]) -> None:
    """Append one episode's rows."""
    np.random.seed(seed)  # the package's oracles and mazes draw from numpy's global generator
    observation, info = env.reset(seed=seed)
    behaviour.reset(observation, info)
    if hasattr(env.unwrapped, "get_ob"):  # a maze walker has moved the point
        observation = env.unwrapped.get_ob()
    for step in range(steps):
        action = behaviour.act(observation, info)
        following, _, _, _, info = env.step(action)
        columns["observations"].append(np.asarray(observation, dtype=np.float32))
        columns["actions"].append(np.asarray(action, dtype=np.float32))
        columns["terminals"].append(step + 1 == steps)
        for key, source in _STATE_KEYS.items():
            if source in info:
                columns[key].append(np.array(info[source], dtype=np.int64 if key == "button_states" else np.float32))
        observation = following


def _write(path: Path, columns: dict[str, list[Any]]) -> Path:
    """Write a compressed .npz under its final name only when it is whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp.npz")
    try:
        arrays: dict[str, Any] = {key: np.stack(values) for key, values in columns.items()}
        np.savez_compressed(temporary, **arrays)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OutputError(f"'{path}' cannot be written ({error.strerror or error})") from error
    return path


def main(argv: list[str] | None = None) -> int:
    """Collect a data set; the last line of standard output is JSON."""
    (settings,) = parse(
        CollectSettings,
        argv=argv,
        prog="vgf-llm control-collect",
        description="Collect a data set in OGBench's format with scripted behaviour.",
    )
    if Path(settings.output_dir, f"{settings.dataset}.npz").exists():
        raise ConfigError(
            f"output_dir: '{settings.output_dir}' holds {settings.dataset}.npz; name another folder or remove it"
        )
    with library_output(settings.output_dir):
        emit(json.dumps(collect(settings)))
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
