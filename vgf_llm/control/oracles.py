"""Scripted behaviour for data sets in OGBench's format: the package's own manipulation oracles, and a maze walker.

A behaviour is told when an episode starts (`reset`) and asked for an action in [-1, 1] at every step (`act`); it takes
a new aim of its own whenever it has reached the last one, so that an episode holds many of them ("play", "navigate").

    play      manipulation: the package's plan oracles, smooth paths with temporally correlated noise
    noisy     manipulation: its Markov oracles, with independent noise on every action
    navigate  point mazes: towards a random free cell along shortest paths, with independent noise

The noise is numpy's global one where the package's oracles draw from it; the collector seeds it for every episode.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from vgf_llm.errors import ConfigError

MANIPULATION = ("cube", "scene", "puzzle")
_LANE = 1.2  # most distance from a corridor's middle along each axis; its walls stop a point at 1.3


class Behaviour(Protocol):
    """What the collector asks of a controller."""

    def reset(self, observation: np.ndarray, info: dict[str, Any]) -> None:
        """Take note that an episode has started."""
        ...

    def act(self, observation: np.ndarray, info: dict[str, Any]) -> np.ndarray:
        """Return an action in [-1, 1]."""
        ...


class Manipulator:
    """An arm that works off random targets with the package's oracles.

    Args:
        env: Environment in data-collection mode.
        kind: "play" or "noisy".
        noise: Standard deviation >= 0: of the plan (play) or of each action (noisy).
        generator: Source of the noise on actions.
    """

    def __init__(self, env: Any, kind: str, noise: float, generator: np.random.Generator) -> None:
        self._env = env
        self._action_noise = noise if kind == "noisy" else 0.0
        self._generator = generator
        self._oracles = _oracles(env, kind, noise)
        self._oracle: Any = None

    def reset(self, observation: np.ndarray, info: dict[str, Any]) -> None:
        """Take the oracle of the target that the environment has set."""
        self._oracle = self._oracles[info["privileged/target_task"]]
        self._oracle.reset(observation, info)

    def act(self, observation: np.ndarray, info: dict[str, Any]) -> np.ndarray:
        """Follow the oracle; once it is done, the environment sets a new target."""
        if self._oracle.done:
            observation, info = self._env.unwrapped.set_new_target()
            self.reset(observation, info)
        action = np.asarray(self._oracle.select_action(observation, info))
        noise = self._action_noise * self._generator.standard_normal(action.shape)
        return np.clip(action + noise, -1, 1)


class MazeWalker:
    """A point that walks to random free cells along shortest paths, each walk on a lane of its own.

    A lane lies beside the middles of the cells, so that the data reach the walls: a critic that never saw the edge of a
    corridor sends its agent there.

    Args:
        env: A point maze.
        noise: Standard deviation >= 0 of each action.
        generator: Source of aims and noise.
    """

    def __init__(self, env: Any, noise: float, generator: np.random.Generator) -> None:
        self._maze = env.unwrapped
        self._noise = noise
        self._generator = generator
        self._free = [tuple(cell) for cell in np.argwhere(self._maze.maze_map == 0)]

    def reset(self, observation: np.ndarray, info: dict[str, Any]) -> None:
        """Put the point into a random free cell and choose an aim."""
        start = self._free[self._generator.integers(len(self._free))]
        self._maze.set_xy(np.array(self._maze.ij_to_xy(start)) + self._generator.uniform(-1, 1, 2))
        self._choose()

    def act(self, observation: np.ndarray, info: dict[str, Any]) -> np.ndarray:
        """Walk at full speed towards the next cell of the path, noise added."""
        position = self._maze.get_xy()
        if np.linalg.norm(position - self._aim) < 0.5:
            self._choose()
        offset = self._next(position) - position
        direction = offset / max(float(np.linalg.norm(offset)), 1e-6)
        action: np.ndarray = np.clip(direction + self._noise * self._generator.standard_normal(2), -1, 1)
        return action

    def _choose(self) -> None:
        cell = self._free[self._generator.integers(len(self._free))]
        middle = np.array(self._maze.ij_to_xy(cell), dtype=float)
        self._lane = self._generator.uniform(-_LANE, _LANE, 2)
        self._aim = middle + self._lane
        _, self._steps_to_aim = self._maze.get_oracle_subgoal(middle, middle)

    def _next(self, position: np.ndarray) -> np.ndarray:
        """The aim itself in its own cell, else a place in the neighbour that is nearest to it."""
        i, j = self._maze.xy_to_ij(position)
        if self._steps_to_aim[i, j] <= 0:  # the aim's cell, or a wall's edge
            return self._aim
        around = [(i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)]
        reachable = [cell for cell in around if self._steps_to_aim[cell] >= 0]
        nearest = min(reachable, key=lambda cell: self._steps_to_aim[cell])
        return np.array(self._maze.ij_to_xy(nearest), dtype=float) + self._lane


def make_behaviour(env: Any, name: str, kind: str, noise: float, generator: np.random.Generator) -> Behaviour:
    """Return the behaviour for an environment and a kind of data.

    Args:
        env: The environment.
        name: Its name, e.g. "cube-single-v0".
        kind: "play", "noisy" or "navigate".
        noise: See the behaviours.
        generator: Source of randomness.

    Raises:
        ConfigError: There is no scripted behaviour for this pair.
    """
    family = name.split("-")[0]
    if family in MANIPULATION and kind in ("play", "noisy"):
        return Manipulator(env, kind, noise, generator)
    if family == "pointmaze" and kind == "navigate":
        return MazeWalker(env, noise, generator)
    raise ConfigError(
        f"dataset: no scripted behaviour makes '{kind}' data in '{name}'; there is play and noisy for "
        f"{', '.join(MANIPULATION)} and navigate for pointmaze"
    )


def _oracles(env: Any, kind: str, noise: float) -> dict[str, Any]:
    """One oracle a task; those of tasks that the environment never sets are never asked."""
    closed = "puzzle" in type(env.unwrapped).__name__.lower()
    if kind == "play":
        from ogbench.manipspace.oracles.plan.button_plan import ButtonPlanOracle
        from ogbench.manipspace.oracles.plan.cube_plan import CubePlanOracle
        from ogbench.manipspace.oracles.plan.drawer_plan import DrawerPlanOracle
        from ogbench.manipspace.oracles.plan.window_plan import WindowPlanOracle

        return {
            "cube": CubePlanOracle(env=env, noise=noise),
            "button": ButtonPlanOracle(env=env, noise=noise, gripper_always_closed=closed),
            "drawer": DrawerPlanOracle(env=env, noise=noise),
            "window": WindowPlanOracle(env=env, noise=noise),
        }
    from ogbench.manipspace.oracles.markov.button_markov import ButtonMarkovOracle
    from ogbench.manipspace.oracles.markov.cube_markov import CubeMarkovOracle
    from ogbench.manipspace.oracles.markov.drawer_markov import DrawerMarkovOracle
    from ogbench.manipspace.oracles.markov.window_markov import WindowMarkovOracle

    return {
        "cube": CubeMarkovOracle(env=env),
        "button": ButtonMarkovOracle(env=env, gripper_always_closed=closed),
        "drawer": DrawerMarkovOracle(env=env),
        "window": WindowMarkovOracle(env=env),
    }
