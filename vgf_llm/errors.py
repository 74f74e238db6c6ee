"""The errors that are the user's to mend: each names the file, row, column or key, the value seen and what to do.

The command line prints their message without a traceback and ends with exit code 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


class VGFError(Exception):
    """Base of every error whose cause is an input and not a fault of the program."""


class ConfigError(VGFError):
    """A recipe or flag is unknown, has the wrong type or a value out of range."""


class DataError(VGFError):
    """A data file is missing, malformed or does not hold what the command needs."""


class ModelError(VGFError):
    """A model or tokenizer cannot be loaded or does not fit the other one it is used with."""


class CheckpointError(VGFError):
    """A training checkpoint is incomplete or was changed since it was written."""


class OutputError(VGFError):
    """An output folder or file cannot be written."""


class DivergedError(VGFError):
    """A loss or gradient of training became infinite or NaN."""


class SyncError(VGFError):
    """An engine that training samples from does not run the weights that are trained."""


class NonFiniteError(VGFError):
    """A value or gradient became infinite or NaN during the flow.

    Attributes:
        group: index of the prompt in the batch.
        step: flow step at which it happened (0 is the first).
    """

    def __init__(self, message: str, group: int, step: int) -> None:
        """Store the position with the message."""
        super().__init__(message)
        self.group = group
        self.step = step

    def __reduce__(self) -> tuple[type[NonFiniteError], tuple[str, int, int]]:
        """Survive pickling (worker processes hand errors back)."""
        return NonFiniteError, (str(self), self.group, self.step)


class SettingError(ValueError):
    """A setting has a value that it cannot have; `vgf_llm.settings.parse` adds the file or flag that it came from.

    Attributes:
        key: Name of the setting, dotted where it is a setting of a block.
        value: Its value.
        valid: What is allowed, ending the sentence "<key> must be ...".
    """

    def __init__(self, key: str, value: Any, valid: str) -> None:
        """Store the parts with the sentence."""
        shown = repr(value) if isinstance(value, str) else value
        hint = " (YAML reads 1e-5 as text: write 1.0e-5)" if _is_number(value) else ""
        super().__init__(f"{key} must be {valid}, got {shown}{hint}")
        self.key, self.value, self.valid = key, value, valid

    def __reduce__(self) -> tuple[type[SettingError], tuple[str, Any, str]]:
        """Survive pickling."""
        return SettingError, (self.key, self.value, self.valid)


def _is_number(value: Any) -> bool:
    """Return whether a text would be a number without its quotes."""
    if not isinstance(value, str):
        return False
    try:
        float(value)
    except ValueError:
        return False
    return True


def require(holds: bool, key: str, value: Any, valid: str) -> None:
    """Raise unless the condition holds.

    Args:
        holds: The condition.
        key: Name of the setting.
        value: Its value.
        valid: What is allowed, ending the sentence "<key> must be ...".

    Raises:
        SettingError: The condition does not hold.
    """
    if not holds:
        raise SettingError(key, value, valid)


def require_finite(key: str, value: Any, least: float, valid: str, above: bool = False) -> None:
    """Raise unless the value is a finite number of at least ``least``, or above it.

    Args:
        key: Name of the setting.
        value: Its value; a Boolean is not a number.
        least: The bound.
        valid: As for `require`.
        above: Whether the bound itself is refused.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    require(is_number and math.isfinite(value) and (value > least if above else value >= least), key, value, valid)


def require_integer(key: str, value: Any, least: int) -> None:
    """Raise unless the value is an integer of at least ``least``; a Boolean is not one."""
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    require(is_integer and value >= least, key, value, f"an integer >= {least}")


def require_choice(key: str, value: Any, choices: Sequence[str]) -> None:
    """Raise unless the value is one of the choices."""
    require(value in choices, key, value, f"one of {', '.join(choices)}")


def require_training_seed(key: str, value: int) -> None:
    """Raise unless numpy, which training draws from too, takes the seed: 0 to 2**32 - 1."""
    require(0 <= value < 2**32, key, value, "from 0 to 2**32 - 1")


def require_sampling_seed(key: str, value: int, runs: int = 1) -> None:
    """Raise unless a seed, and the ``runs - 1`` that follow it, are 64-bit integers."""
    valid = "from -2**63 to 2**63 - 1" + (f" less the {runs - 1} seeds that follow it" if runs > 1 else "")
    require(value >= -(2**63) and value + runs <= 2**63, key, value, valid)
