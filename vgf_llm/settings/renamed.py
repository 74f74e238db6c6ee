"""Keys of earlier versions: an error names the new key and the value to write."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

_NEWEST = ("true", "last")  # what the newest checkpoint was called
_NONE = ("false", "null", "none", "")


def now_called(key: str, value: Any, known: Collection[str]) -> str | None:
    """Return what to write in place of a key of an earlier version.

    Args:
        key: As the user wrote it, without dashes.
        value: Its value, as YAML or a flag gives it.
        known: Keys that the command has.

    Returns:
        A line of a recipe such as ``resume: true``; None where the key was never renamed, or the command has no such.
    """
    if key not in _RENAMED:
        return None
    new, translate = _RENAMED[key]
    return f"{new}: {translate(value)}" if new in known else None


def _resume(value: Any) -> str:
    """Translate `resume_from_checkpoint`: true, false or a folder in `train`, "last", null or a folder elsewhere."""
    text = "null" if value is None else str(value).strip()
    return "true" if text.lower() in _NEWEST else "false" if text.lower() in _NONE else text


_RENAMED: dict[str, tuple[str, Callable[[Any], str]]] = {"resume_from_checkpoint": ("resume", _resume)}
