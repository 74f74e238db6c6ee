"""Environments by name, with actions in [-1, 1] whatever their own bounds, and rewards as the data has them.

A name is one of three things:

    cube-single-play-singletask-task1-v0   a single-task environment of OGBench (its data set's name)
    Hopper-v5                              a gymnasium id
    package.module:function                a Python function that returns an environment with gymnasium's interface
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from vgf_llm.errors import ConfigError


@dataclass(frozen=True)
class Bounds:
    """Bounds of an environment's actions [A], and the map between them and [-1, 1]."""

    low: np.ndarray
    high: np.ndarray

    def to_unit(self, actions: np.ndarray) -> np.ndarray:
        """Map actions [..., A] from the environment's bounds to [-1, 1]."""
        unit: np.ndarray = 2 * (actions - self.low) / (self.high - self.low) - 1
        return unit

    def from_unit(self, actions: np.ndarray) -> np.ndarray:
        """Map actions [..., A] from [-1, 1] to the environment's bounds."""
        own: np.ndarray = self.low + (np.clip(actions, -1, 1) + 1) / 2 * (self.high - self.low)
        return own


def bounds_of(env: Any, name: str) -> Bounds:
    """Return the bounds of an environment's actions.

    Raises:
        ConfigError: The action space is not a bounded vector.
    """
    low, high = getattr(env.action_space, "low", None), getattr(env.action_space, "high", None)
    if (
        low is None
        or high is None
        or low.ndim != 1
        or not (np.isfinite(low).all() and np.isfinite(high).all() and (low < high).all())
    ):
        raise ConfigError(f"env: '{name}' needs a bounded vector of actions, has {env.action_space}")
    return Bounds(np.asarray(low, dtype=np.float64), np.asarray(high, dtype=np.float64))


def is_ogbench(name: str) -> bool:
    """Whether a name is that of a single-task data set of OGBench."""
    return "singletask" in name.split("-")


def make_env(name: str) -> Any:
    """Make the environment of a name (head of this module).

    Raises:
        ConfigError: It does not exist, or a package is missing.
    """
    if ":" in name:
        return _function(name)()
    if is_ogbench(name):
        package = _import("ogbench", name)
        return _made(lambda: package.make_env_and_datasets(name, env_only=True), name)
    return make_plain(name)


def make_plain(name: str, **arguments: Any) -> Any:
    """Make a gymnasium environment; OGBench's own are registered first where the package is there.

    Raises:
        ConfigError: It does not exist, or a package is missing.
    """
    gymnasium = _import("gymnasium", name)
    if importlib.util.find_spec("ogbench") is not None:
        _import("ogbench", name)
    return _made(lambda: gymnasium.make(name, **arguments), name)


def reset(env: Any, seed: int) -> np.ndarray:
    """Start an episode that depends on nothing but the seed (mazes draw from numpy's global generator).

    Returns:
        The first observation, float32 [O].
    """
    np.random.seed(seed)
    observation, _ = env.reset(seed=seed)
    return np.asarray(observation, dtype=np.float32)


def _made(make: Callable[[], Any], name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return make()
        except Exception as error:  # gymnasium's and the packages' own errors share no base
            raise ConfigError(f"env: '{name}' cannot be made: {error}") from error


def _import(package: str, name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(package)
        except ImportError as error:
            raise ConfigError(f"env: '{name}' needs {error.name or package}: pip install 'vgf-llm[control]'") from error


def _function(name: str) -> Callable[[], Any]:
    module, _, function = name.partition(":")
    try:
        made: Callable[[], Any] = getattr(importlib.import_module(module), function)
        return made
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"env: '{name}' cannot be loaded ({error}); write package.module:function") from error
