"""The pairs that a reward model is checked on."""

from __future__ import annotations

from dataclasses import dataclass

from vgf_llm.data.prompts import PreferencePair


@dataclass(frozen=True)
class Pairs:
    """Pairs that a model is checked on.

    Attributes:
        kept: Usable pairs, at least one.
        dropped: Rows of the file left out, by reason.
        is_given: Whether they are the user's.
    """

    kept: list[PreferencePair]
    dropped: dict[str, int]
    is_given: bool
