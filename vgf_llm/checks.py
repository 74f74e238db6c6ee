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
