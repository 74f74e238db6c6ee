"""The one way in which settings refuse a value; `vgf_llm.config` turns it into an error that names file or flag."""

from __future__ import annotations

from typing import Any


def require(holds: bool, key: str, value: Any, valid: str) -> None:
    """Raise unless the condition holds.

    Args:
        holds: The condition.
        key: Name of the setting.
        value: Its value.
        valid: What is allowed, ending the sentence "<key> must be ...".

    Raises:
        ValueError: Naming the key, what is valid and the value seen.
    """
    if not holds:
        raise ValueError(f"{key} must be {valid}, got {value}")


def require_training_seed(key: str, value: int) -> None:
    """Raise unless numpy, which training draws from too, takes the seed: 0 to 2**32 - 1."""
    require(0 <= value < 2**32, key, value, "from 0 to 2**32 - 1")


def require_sampling_seed(key: str, value: int, runs: int = 1) -> None:
    """Raise unless a seed, and the ``runs - 1`` that follow it, are 64-bit integers."""
    valid = "from -2**63 to 2**63 - 1" + (f" less the {runs - 1} seeds that follow it" if runs > 1 else "")
    require(value >= -(2**63) and value + runs <= 2**63, key, value, valid)
