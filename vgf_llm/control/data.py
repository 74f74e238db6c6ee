"""Transitions as tensors, what is refused before training, and the buffer that grows online.

What is refused, with file and row: missing or wrongly shaped fields, numbers that are not finite in float32, flags that
are neither 0 nor 1, actions of another width than the bounds or outside them, episodes without a transition.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from vgf_llm.control.agent import Batch
from vgf_llm.control.envs import Bounds
from vgf_llm.errors import DataError

_TOLERANCE = 1e-3  # actions of published files leave the bounds by rounding
_FLAGS = ("terminals", "terminations", "timeouts")


@dataclass(frozen=True)
class Transitions:
    """K transitions as float32 arrays; actions are in [-1, 1]."""

    observations: np.ndarray
    """[K, O]"""
    actions: np.ndarray
    """[K, A]"""
    rewards: np.ndarray
    """[K]"""
    masks: np.ndarray
    """[K]; 1 where rewards can follow, 0 where the task has ended."""
    next_observations: np.ndarray
    """[K, O]"""
    ends: np.ndarray
    """Bool [K]; the last transition of an episode."""

    def __post_init__(self) -> None:
        """Refuse fields of unequal lengths."""
        lengths = {field.name: len(getattr(self, field.name)) for field in fields(self)}
        if len(set(lengths.values())) > 1:
            raise DataError(f"transitions: fields need equal lengths, have {lengths}; look where episodes end")

    def __len__(self) -> int:
        return len(self.rewards)

    def digest(self) -> str:
        """SHA-256 of all fields."""
        result = hashlib.sha256()
        for field in fields(self):
            result.update(np.ascontiguousarray(getattr(self, field.name)).tobytes())
        return result.hexdigest()

    def observation_moments(self) -> tuple[Tensor, Tensor]:
        """Return the observations' mean and standard deviation [O]; a spread of 0 is given as 1."""
        values = self.observations.astype(np.float64)
        std_O = values.std(0)
        std_O[std_O == 0] = 1.0
        return torch.from_numpy(values.mean(0)).float(), torch.from_numpy(std_O).float()

    def with_rewards(self, shift: float, normalise: bool) -> tuple[Transitions, float]:
        """Shift rewards, then scale them so that the data's episode returns span 1000 (D4RL's locomotion).

        Args:
            shift: Added to every reward.
            normalise: Whether to scale.

        Returns:
            The transitions, and the scale that online rewards are to be multiplied by.

        Raises:
            DataError: All episode returns are equal.
        """
        rewards = self.rewards + np.float32(shift)
        scale = 1.0
        if normalise:
            starts = np.concatenate([[0], np.flatnonzero(self.ends)[:-1] + 1])
            returns = np.add.reduceat(rewards.astype(np.float64), starts)
            if returns.max() <= returns.min():
                raise DataError(f"normalise_returns: every episode of the data returns {returns.max():g}")
            scale = 1000.0 / float(returns.max() - returns.min())
        return replace(self, rewards=(rewards * scale).astype(np.float32)), scale


def check_fields(source: str, arrays: Mapping[str, np.ndarray], wanted: Mapping[str, int]) -> None:
    """Refuse missing fields, unequal lengths or widths, and what `check_shape` and `check_numbers` refuse.

    Args:
        source: File, the start of a message.
        arrays: Fields by name.
        wanted: Number of dimensions of each field that is needed; 'actions' is one of them.

    Raises:
        DataError: Names the file, the field and the first row at fault.
    """
    for name, dimensions in wanted.items():
        if name not in arrays:
            raise DataError(f"{source}: field '{name}' is missing; it has {', '.join(sorted(arrays)) or 'no field'}")
        check_shape(source, name, arrays[name], dimensions)
    rows = len(arrays["actions"])
    if rows == 0:
        raise DataError(f"{source}: holds no row")
    for name in wanted:
        if len(arrays[name]) != rows:
            raise DataError(f"{source}: field '{name}' has {len(arrays[name])} rows, 'actions' has {rows}")
        check_numbers(source, name, arrays[name])
    if "next_observations" in wanted:
        width, following = (arrays[name].shape[1] for name in ("observations", "next_observations"))
        if width != following:
            raise DataError(f"{source}: field 'next_observations' has {following} columns, 'observations' has {width}")


def check_shape(source: str, name: str, values: np.ndarray, dimensions: int) -> None:
    """Refuse a field that holds no numbers, has another number of dimensions or rows of no number.

    Raises:
        DataError: Names the file and the field.
    """
    if values.ndim != dimensions:
        raise DataError(f"{source}: field '{name}' needs {dimensions} dimension(s), has shape {values.shape}")
    if values.dtype.kind not in "biuf":
        raise DataError(f"{source}: field '{name}' needs real numbers, has type {values.dtype}")
    if 0 in values.shape[1:]:
        raise DataError(f"{source}: field '{name}' needs at least one column, has shape {values.shape}")


def check_numbers(source: str, name: str, values: np.ndarray) -> None:
    """Refuse numbers [rows, ...] that are not finite in float32, and flags other than 0 and 1.

    Raises:
        DataError: Names the file, the field, the first row at fault and its value.
    """
    with np.errstate(over="ignore"):
        finite = np.isfinite(values.astype(np.float32, copy=False)).reshape(len(values), -1).all(1)
    if not finite.all():
        row = int(np.argmin(finite))
        kind = " in float32" if np.isfinite(values[row]).all() else ""
        raise DataError(f"{source}: field '{name}', row {row}: not finite{kind}: {values[row]}")
    if name in _FLAGS:
        flags = (values == 0) | (values == 1)
        if not flags.all():
            row = int(np.argmin(flags))
            raise DataError(f"{source}: field '{name}', row {row}: needs 0 or 1, has {values[row]}")


def unit_actions(source: str, actions: np.ndarray, bounds: Bounds | None) -> np.ndarray:
    """Map actions [rows, A] from the bounds (None: [-1, 1]) to [-1, 1], float32.

    Raises:
        DataError: They have another width than the bounds, or see `check_actions`.
    """
    if bounds is None:
        return check_actions(source, actions)
    check_width(source, "actions", actions, len(bounds.low))
    return check_actions(source, bounds.to_unit(actions))


def check_width(source: str, name: str, values: np.ndarray, width: int) -> None:
    """Refuse a field [rows, columns] of another number of columns than the environment's.

    Raises:
        DataError: Names the file, the field and both widths.
    """
    if values.shape[1] != width:
        raise DataError(
            f"{source}: field '{name}' has {values.shape[1]} columns, the environment's has {width}; "
            "give the environment that the data come from"
        )


def check_actions(source: str, actions: np.ndarray) -> np.ndarray:
    """Refuse actions outside [-1, 1]; what rounding left outside is clipped.

    Raises:
        DataError: Names the file and the first row at fault.
    """
    outside = (np.abs(actions) > 1 + _TOLERANCE).any(1)
    if outside.any():
        row = int(np.argmax(outside))
        raise DataError(
            f"{source}: field 'actions', row {row}: outside the bounds (-1 and 1 after scaling): {actions[row]}"
        )
    return np.clip(actions, -1, 1).astype(np.float32)


def check_episodes(source: str, ends: np.ndarray, kept: np.ndarray) -> None:
    """Refuse episodes without a transition.

    Args:
        source: File.
        ends: Bool [rows], the last row of each episode.
        kept: Bool [rows], the rows that are transitions (a last row without a next state is none).

    Raises:
        DataError: Names the file, the episode and its last row.
    """
    last = np.flatnonzero(ends)
    if not len(last):
        raise DataError(f"{source}: field 'terminals' marks no end of an episode")
    counts = np.diff(np.concatenate([[0], np.cumsum(kept)[last]]))
    if (counts == 0).any():
        episode = int(np.argmin(counts))
        raise DataError(f"{source}: episode {episode}, which ends at row {last[episode]}, holds no transition")


class Buffer:
    """Transitions on a device, with room for those that online steps add.

    Args:
        data: The offline transitions.
        room: Online transitions it can take, at least 0.
        device: Torch device.
    """

    def __init__(self, data: Transitions, room: int, device: str) -> None:
        self.offline = self.size = len(data)
        self.device = device
        self.tensors = {
            name: torch.cat([torch.from_numpy(values), torch.zeros((room, *values.shape[1:]))]).to(device)
            for name, values in (
                ("observations", data.observations),
                ("actions", data.actions),
                ("rewards", data.rewards),
                ("masks", data.masks),
                ("next_observations", data.next_observations),
            )
        }

    def add(self, **transition: np.ndarray | float) -> None:
        """Append one transition; its fields are those of `Transitions` without `ends`."""
        for name, values in self.tensors.items():
            values[self.size] = torch.as_tensor(transition[name], dtype=torch.float32)
        self.size += 1

    def batch(self, rows_B: torch.Tensor) -> Batch:
        """Return the transitions of some rows."""
        taken = [self.tensors[name][rows_B] for name in self.tensors]
        return Batch(*taken)

    def online(self) -> dict[str, torch.Tensor]:
        """Return what online steps have added, to be saved."""
        return {name: values[self.offline : self.size].clone() for name, values in self.tensors.items()}

    def restore(self, online: Mapping[str, torch.Tensor]) -> None:
        """Put back what `online` returned."""
        self.size = self.offline + len(online["rewards"])
        for name, values in self.tensors.items():
            values[self.offline : self.size] = online[name].to(values)
