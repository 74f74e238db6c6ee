"""Prompts and preference pairs: files or hub names in, checked Python objects out, and their encoding to tokens.

Three shapes of preference data are read as they are: explicit prompt/chosen/rejected strings, conversational message
lists (with the prompt apart or inside both), and whole dialogues with an implicit prompt (Anthropic HH: what both
dialogues share up to the last "Assistant:"). Every fault names the file, the row (a line of the file where rows are
lines, from 1) and the column.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vgf_llm.dialogue import ASSISTANT, HUMAN, Message, Prompt, split_pair
from vgf_llm.encoding import check_prompt_fits, encode_prompt, encode_response, encode_text
from vgf_llm.errors import DataError
from vgf_llm.io import shorten
from vgf_llm.rows import Row, read_rows

__all__ = [
    "PreferencePair",
    "Preferences",
    "check_prompt_fits",
    "encode_prompt",
    "encode_response",
    "encode_text",
    "load_preferences",
    "load_prompts",
    "read_cell",
    "read_number",
    "read_prompt",
]


@dataclass(frozen=True)
class PreferencePair:
    """One comparison: the prompt, the better response, the worse one and by how much (None: not stated)."""

    prompt: Prompt
    chosen: str
    rejected: str
    margin: float | None = None


@dataclass(frozen=True)
class Preferences:
    """Pairs that can be trained on, and what was left out on the way."""

    pairs: list[PreferencePair]
    source: str
    rows: int
    dropped: dict[str, int] = field(default_factory=dict)

    def report(self) -> str:
        """One line for the log: rows read, pairs kept, rows dropped by reason."""
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.dropped.items() if count)
        return f"{self.source}: {self.rows} rows, {len(self.pairs)} pairs kept, dropped: {reasons or 'none'}"


# Prompts and pairs -------------------------------------------------------------------------------------------------


def load_prompts(source: str, column: str = "prompt", split: str = "train", limit: int | None = None) -> list[Prompt]:
    """Read prompts from a local file or a hub dataset.

    A whole dialogue in the column (its last turn is the assistant's) is cut before that turn, so that ``chosen`` of a
    preference set can serve as a column of prompts.

    Args:
        source: a .jsonl, .json, .csv, .parquet (each also with .gz, but parquet) or .txt file (one prompt a line), or
            a hub dataset as ``owner/name`` or ``owner/name/data_dir``, either with ``:split`` at its end.
        column: column that holds a string or a list of ``{"role", "content"}`` messages.
        split: split of a hub dataset whose name does not state one; a file has none.
        limit: only the first so many rows (count, > 0).

    Returns:
        Prompts in file order.

    Raises:
        DataError: limit is below 1, the source cannot be read, or a row has no such column or an empty one.
    """
    rows = read_rows(source, split, limit)
    return [read_prompt(read_cell(row, column, source, number), source, number, column) for number, row in rows]


def load_preferences(
    source: str,
    split: str = "train",
    limit: int | None = None,
    prompt_column: str = "prompt",
    chosen_column: str = "chosen",
    rejected_column: str = "rejected",
    margin_column: str = "margin",
    max_dropped_share: float = 0.2,
) -> Preferences:
    """Read preference pairs from a local file or a hub dataset.

    Args:
        source: as for ``load_prompts``.
        split: split of a hub dataset whose name does not state one; a file has none.
        limit: only the first so many rows (count, > 0).
        prompt_column: column of prompts; where no row has it, the prompt is what chosen and rejected share; where
            one has it, all must.
        chosen_column: column of the better response, a string or messages.
        rejected_column: column of the worse response, a string or messages.
        margin_column: column of how much better, a number; optional.
        max_dropped_share: largest share of rows that may be unusable (identical, empty or diverging early), in [0, 1].

    Returns:
        The pairs with the count of dropped rows by reason.

    Raises:
        DataError: the source cannot be read, a column is missing or malformed, or too many rows are unusable.
    """
    rows = read_rows(source, split, limit)
    explicit = any(prompt_column in row for _, row in rows)
    dropped = {"with chosen == rejected": 0, "with an empty response": 0, "that diverge before the last turn": 0}
    first_dropped: dict[str, int] = {}
    pairs = []
    for number, row in rows:
        better = read_cell(row, chosen_column, source, number, empty_ok=True)
        worse = read_cell(row, rejected_column, source, number, empty_ok=True)
        given = read_cell(row, prompt_column, source, number) if explicit else None
        prompt, chosen, rejected = split_pair(given, better, worse, f"{source}, row {number}")
        reason = _unusable(chosen, rejected)
        if reason is not None:
            dropped[reason] += 1
            first_dropped.setdefault(reason, number)
            continue
        margin = read_number(row.get(margin_column), source, number, margin_column)
        pairs.append(PreferencePair(prompt, str(chosen), str(rejected), margin))
    unusable = len(rows) - len(pairs)
    if unusable > max_dropped_share * len(rows) or not pairs:
        reasons = ", ".join(f"{dropped[reason]} {reason} (first: row {row})" for reason, row in first_dropped.items())
        raise DataError(
            f"{source}: {unusable} of {len(rows)} rows are unusable, more than the allowed share of "
            f"{max_dropped_share:g}: {reasons}; mend the file or raise max_dropped_share"
        )
    return Preferences(pairs, source, len(rows), dropped)


# Shapes of rows -----------------------------------------------------------------------------------------


def read_cell(row: Row, column: str, source: str, number: int, empty_ok: bool = False) -> Any:
    """Return a row's text or checked messages; a column that is missing, malformed or empty is a DataError."""
    where = f"{source}, row {number}"
    if column not in row:
        raise DataError(f"{where}: no column '{column}'; columns: {', '.join(map(str, row))}")
    value = row[column]
    if value is None or not isinstance(value, str | Sequence):
        raise DataError(f"{where}, column '{column}': expected text or messages, got {shorten(repr(value))}")
    if not empty_ok and (not value or isinstance(value, str) and not value.strip()):
        raise DataError(f"{where}, column '{column}': empty; remove the row or fill it")
    return value if isinstance(value, str) else _messages(value, f"{where}, column '{column}'")


def _messages(value: Sequence[Any], where: str) -> list[Message]:
    messages = []
    for index, message in enumerate(value):
        if not isinstance(message, Mapping) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise DataError(
                f"{where}, message {index}: expected an object with 'role' and 'content', got {shorten(repr(message))}"
            )
        messages.append({"role": message["role"], "content": message["content"]})
    return messages


def read_prompt(value: Prompt, source: str, number: int, column: str) -> Prompt:
    """Cut a whole dialogue before the assistant's last turn; leave anything else as it is."""
    if isinstance(value, str):
        if value.startswith(HUMAN) and ASSISTANT in value:
            return value[: value.rfind(ASSISTANT) + len(ASSISTANT)]
        return value
    messages = value[:-1] if value[-1]["role"] == "assistant" else value
    if not messages or not any(message["content"].strip() for message in messages):
        raise DataError(f"{source}, row {number}, column '{column}': empty; no message before the assistant's")
    return messages


def _unusable(chosen: str | None, rejected: str | None) -> str | None:
    if chosen is None or rejected is None:
        return "that diverge before the last turn"
    if not chosen.strip() or not rejected.strip():
        return "with an empty response"
    return "with chosen == rejected" if chosen.strip() == rejected.strip() else None


def read_number(value: Any, source: str, number: int, column: str) -> float | None:
    """Return a cell as a finite number, None where it is empty; anything else is a DataError."""
    if value is None or value == "":
        return None
    try:
        parsed = float(value)
    except (TypeError, ValueError):
        parsed = math.nan
    if not math.isfinite(parsed):
        raise DataError(f"{source}, row {number}, column '{column}': expected a number, got {shorten(repr(value))}")
    return parsed
