"""Keys of earlier versions, and values that other programs give: an error says what to write."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from typing import Any

_NEWEST = ("true", "last")  # what the newest checkpoint was called
_NONE = ("false", "null", "none", "")
_EXPECTED = {"resume": "true, false or the folder of a checkpoint"}


def now_called(key: str, value: Any, known: Collection[str]) -> str | None:
    """Return what to write in place of a key of an earlier version.

    Args:
        key: As the user wrote it, without dashes; dotted for a key inside a block.
        value: Its value, as YAML or a flag gives it.
        known: Keys that the command has.

    Returns:
        A line of a recipe such as ``resume: true``; None where the key was never renamed, or the command has no such.
    """
    old, _, rest = key.partition(".")
    if old not in _RENAMED:
        return None
    new, translate = _RENAMED[old]
    if new not in known:
        return None
    if not rest and isinstance(value, Mapping) and len(value) == 1:
        rest, value = next(iter(value.items()))
    return f"{new}{rest and f'.{rest}'}: {translate(value)}"


def expected(key: str, value: Any, otherwise: str) -> str:
    """Return what a value of the wrong type should have been, in the words of its key where it has some.

    Args:
        key: Whole, dotted inside a block.
        value: That was given; None for null.
        otherwise: The type's name.
    """
    return _EXPECTED.get(key, otherwise) + ("; write false" if key in _EXPECTED and value is None else "")


def line_of(key: str, value: Any) -> str:
    """Write a key and its value as a line of a recipe."""
    return f"{key}: {_same(value)}"


def _resume(value: Any) -> str:
    """Translate `resume_from_checkpoint`: true, false or a folder in `train`, "last", null or a folder elsewhere."""
    text = "null" if value is None else str(value).strip()
    return "true" if text.lower() in _NEWEST else "false" if text.lower() in _NONE else text


def _same(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


_RENAMED: dict[str, tuple[str, Callable[[Any], str]]] = {
    "resume_from_checkpoint": ("resume", _resume),
    "most": ("limits", _same),
}
