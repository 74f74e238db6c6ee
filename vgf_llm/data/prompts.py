"""Prompts and preference pairs: files or hub names in, checked Python objects out.

Preference data is read in the shapes it has: a prompt with chosen and rejected as text or messages, whole conversations
that share their prompt (messages, or Anthropic HH's Human/Assistant text), and plain texts that share their first
words. docs/data.md lists every shape. Every fault names the file, the row (a line of the file where rows are lines,
from 1) and the column; what is odd in single rows is counted, and an error only where too many rows are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vgf_llm.data.cells import (
    check_difference,
    check_named,
    missing_column,
    read_cell,
    read_difference,
    read_number,
    refuse_columns,
)
from vgf_llm.data.dialogue import (
    ASSISTANT,
    DIVERGE,
    EMPTY,
    EMPTY_PROMPT,
    NO_PROMPT,
    SAME,
    Prompt,
    PromptText,
    UnusableRowError,
    as_messages,
    check_characters,
    open_dialogue,
    split_pair,
    turns_of,
)
from vgf_llm.data.encoding import check_prompt_fits, encode_prompt, encode_prompts, encode_response, encode_text
from vgf_llm.data.rows import Place, Row, read_rows
from vgf_llm.errors import DataError
from vgf_llm.runs.files import shorten

__all__ = [
    "PreferencePair",
    "Preferences",
    "check_prompt_fits",
    "encode_prompt",
    "encode_prompts",
    "encode_response",
    "encode_text",
    "load_preferences",
    "load_prompt_texts",
    "load_prompts",
    "read_cell",
    "read_number",
    "read_prompt",
    "repeated_prompts",
]

_NO_OPINION = "without an opinion on any objective"
_REPEATS = 0.9  # share of rows whose responses start with their prompt from which they repeat it


@dataclass(frozen=True)
class PreferencePair:
    """One comparison: the prompt, the better response, the worse one and by how much (None: not stated).

    Attributes:
        differences: By how much chosen is better on each objective; 0 where the row has no opinion.
    """

    prompt: Prompt
    chosen: str
    rejected: str
    margin: float | None = None
    differences: tuple[float, ...] = ()


@dataclass(frozen=True)
class Preferences:
    """Pairs that can be trained on, and what was left out on the way."""

    pairs: list[PreferencePair]
    source: str
    rows: int
    dropped: dict[str, int] = field(default_factory=dict)
    repeated: int = 0

    def report(self) -> str:
        """One line for the log: rows read, pairs kept, rows dropped by reason."""
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.dropped.items() if count)
        line = f"{self.source}: {self.rows} rows, {len(self.pairs)} pairs kept, dropped: {reasons or 'none'}"
        return line + (f"; {self.repeated} pairs repeated their prompt, which was cut off" if self.repeated else "")


# Prompts -----------------------------------------------------------------------------------------------------------


def load_prompts(
    source: str,
    column: str = "prompt",
    split: str = "train",
    limit: int | None = None,
    system_column: str = "system",
) -> list[Prompt]:
    """Read prompts from local files or a hub dataset.

    A whole dialogue in the column (its last turn is the assistant's) is cut before that turn, so that ``chosen`` of a
    preference set can serve as a column of prompts.

    Args:
        source: as for ``vgf_llm.data.rows.read_rows``.
        column: column that holds a string or a list of messages.
        split: split of a hub dataset or folder whose name does not state one; a file has none.
        limit: only the first so many rows (count, > 0).
        system_column: column of a system turn, where rows have it.

    Returns:
        Prompts in file order.

    Raises:
        DataError: limit is below 1, the source cannot be read, or a row has no such column or an empty one.
    """
    return [text.prompt for text in load_prompt_texts(source, column, split, limit, system_column)]


def load_prompt_texts(
    source: str,
    column: str = "prompt",
    split: str = "train",
    limit: int | None = None,
    system_column: str = "system",
) -> list[PromptText]:
    """As :func:`load_prompts`, with the other columns of each row, which reward functions may ask for."""
    texts, rows = [], read_rows(source, split, limit)
    check_named(rows, source, "system_column", system_column, "system")
    for number, row in rows:
        others = {name: value for name, value in row.items() if name not in (column, system_column)}
        prompt = prompt_of(row, source, number, column, system_column)
        texts.append(PromptText(prompt, others, f"{source}, row {number}"))
    return texts


def prompt_of(row: Row, source: str, number: Place, column: str, system_column: str = "system") -> Prompt:
    """Return a row's prompt, up to where the assistant's answer begins, with its system turn.

    Raises:
        DataError: naming file, row and column.
    """
    refuse_columns(row, source, number, (column, system_column))
    cell = read_cell(row, column, source, number, option="prompt_column")
    return with_system(read_prompt(cell, source, number, column), row, system_column, source, number)


def with_system(prompt: Prompt, row: Row, column: str, source: str, number: Place) -> Prompt:
    """Put a row's system turn before its prompt; a prompt that starts with one must have the same.

    Raises:
        DataError: the column is not text, or differs from the system turn of the prompt.
    """
    system = row.get(column)
    if system is None or system == "" or column == "prompt":
        return prompt
    if not isinstance(system, str):
        raise DataError(
            f"{source}, row {number}, column '{column}': expected the text of a system turn, got "
            f"{shorten(repr(system))}; rename the column, or name another with --system_column"
        )
    messages = as_messages(prompt)
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages] if system.strip() else prompt
    if messages[0]["content"].strip() != system.strip():
        raise DataError(
            f"{source}, row {number}: the prompt starts with the system turn {shorten(repr(messages[0]['content']))}, "
            f"and column '{column}' holds {shorten(repr(system))}; keep one of them"
        )
    return prompt


def read_prompt(value: Prompt, source: str, number: Place, column: str) -> Prompt:
    """Return a prompt that the assistant is to answer: a dialogue is cut before the assistant's last turn.

    A Human/Assistant text that ends in the human's turn keeps it and gets the assistant's marker.
    """
    if isinstance(value, str):
        check_characters(value, f"{source}, row {number}, column '{column}'")
        turns = turns_of(value)
        if turns and turns[-1].role == "assistant":
            return value[: turns[-1].start]
        return open_dialogue(value)
    messages = value[:-1] if value[-1]["role"] == "assistant" else value
    if not messages or not any(message["content"].strip() for message in messages):
        raise DataError(f"{source}, row {number}, column '{column}': empty; no message before the assistant's")
    return messages


# Pairs -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Columns:
    """Names of a preference set's columns."""

    prompt: str
    chosen: str
    rejected: str
    margin: str
    system: str
    preference: str
    objectives: Mapping[str, str]


def load_preferences(
    source: str,
    split: str = "train",
    limit: int | None = None,
    prompt_column: str = "prompt",
    chosen_column: str = "chosen",
    rejected_column: str = "rejected",
    margin_column: str = "margin",
    max_dropped_share: float = 0.2,
    system_column: str = "system",
    preference_column: str = "overall_preference",
    objectives: Mapping[str, str] | None = None,
) -> Preferences:
    """Read preference pairs from local files or a hub dataset.

    Args:
        source: as for ``vgf_llm.data.rows.read_rows``.
        split: split of a hub dataset or folder whose name does not state one; a file has none.
        limit: only the first so many rows (count, > 0).
        prompt_column: column of prompts; where no row has it, the prompt is what chosen and rejected share; where
            one has it, all must.
        chosen_column: column of the better response, a string or messages.
        rejected_column: column of the worse response, a string or messages.
        margin_column: column of how much better, a number; or two columns as ``score_chosen-score_rejected``. Optional.
        max_dropped_share: largest share of rows that may be unusable (identical, empty or diverging early), in [0, 1].
        system_column: column of a system turn, where rows have it.
        preference_column: where rows have it, a number that says which response is better: below 0 the one in
            chosen_column, above 0 the other, 0 neither (HelpSteer3).
        objectives: names of objectives, each with a column of how much better chosen is there, or two as for
            margin_column; null, NaN, "N/A" or 0 is no opinion. A row without any is left out, and counts as usable.
            The preference_column keeps its own sign.

    Returns:
        The pairs with the count of dropped rows by reason.

    Raises:
        DataError: the source cannot be read, a column is missing or malformed, or too many rows are unusable.
    """
    rows = read_rows(source, split, limit)
    names = (prompt_column, chosen_column, rejected_column, margin_column, system_column, preference_column)
    columns = _Columns(*names, objectives or {})
    check_named(rows, source, "system_column", system_column, "system")
    check_named(rows, source, "preference_column", preference_column, "overall_preference")
    check_difference(rows, source, "margin_column", margin_column, "margin")
    _check_objectives(rows, source, columns.objectives)
    explicit = any(prompt_column in row for _, row in rows)
    cells = [_cells(row, source, number, columns, explicit) for number, row in rows]
    repeated = repeated_prompts(cells, source)
    dropped = dict.fromkeys((SAME, EMPTY, DIVERGE), 0)
    first: dict[str, str] = {}
    pairs: list[PreferencePair] = []
    for (number, row), (given, better, worse), cut in zip(rows, cells, repeated, strict=True):
        if cut:
            better, worse = better[len(given) :], worse[len(given) :]
        try:
            if explicit and not given:
                raise UnusableRowError(EMPTY_PROMPT)
            prompt, chosen, rejected = split_pair(given if explicit else None, better, worse, f"{source}, row {number}")
            margin, swap = _margin(row, source, number, columns)
            differences = _differences(row, source, number, columns, swap)
        except UnusableRowError as odd:
            dropped[odd.reason] = dropped.get(odd.reason, 0) + 1
            first.setdefault(odd.reason, f"row {number}" + (f": {odd.detail}" if odd.detail else ""))
            continue
        prompt = with_system(prompt, row, system_column, source, number)
        chosen, rejected = (rejected, chosen) if swap else (chosen, rejected)
        pairs.append(PreferencePair(prompt, chosen, rejected, margin, differences))
    unusable = len(rows) - len(pairs) - (dropped.get(_NO_OPINION, 0) if pairs else 0)
    if unusable > max_dropped_share * len(rows) or not pairs:
        reasons = ", ".join(f"{dropped[reason]} {reason} (first: {seen})" for reason, seen in first.items())
        advice = "" if explicit or NO_PROMPT not in first else f"; {_no_prompt_column(rows[0][1], columns)}"
        raise DataError(
            f"{source}: {unusable} of {len(rows)} rows are unusable, more than the allowed share of "
            f"{max_dropped_share:g}: {reasons}{advice}; mend the file or raise max_dropped_share"
        )
    return Preferences(pairs, source, len(rows), dropped, sum(repeated))


def _no_prompt_column(row: Row, columns: _Columns) -> str:
    there = ", ".join(map(str, row))
    return f"no column '{columns.prompt}'; columns: {there}; name another with --prompt_column"


def _cells(row: Row, source: str, number: Place, columns: _Columns, explicit: bool) -> tuple[Any, Any, Any]:
    """Return a row's prompt (None where there is no such column), chosen and rejected."""
    refuse_columns(row, source, number, (columns.prompt, columns.chosen, columns.rejected, columns.system))
    better = read_cell(row, columns.chosen, source, number, empty_ok=True, option="chosen_column")
    worse = read_cell(row, columns.rejected, source, number, empty_ok=True, option="rejected_column")
    if not explicit:
        if isinstance(better, str) and not turns_of(better) and _may_be_prompt(row, columns):
            raise missing_column(row, columns.prompt, source, number, "prompt_column")
        return None, better, worse
    given = read_cell(row, columns.prompt, source, number, empty_ok=True, option="prompt_column")
    blank = isinstance(given, str) and not given.strip()
    return (None if blank else given), better, worse


def _may_be_prompt(row: Row, columns: _Columns) -> bool:
    """Whether another column of the row holds sentences or messages: its prompt, by another name."""
    others = [value for name, value in row.items() if name not in (columns.chosen, columns.rejected)]
    return any((isinstance(one, str) and " " in one.strip()) or isinstance(one, list) for one in others)


def repeated_prompts(cells: Sequence[tuple[Any, ...]], source: str) -> list[bool]:
    """Return which rows' responses start with their prompt, where that is how the file is written.

    Args:
        cells: (prompt, response, ...) of each row; only texts repeat.
        source: for the message.

    Raises:
        DataError: more than half of the rows repeat it, but too many do not to tell.
    """
    found = [
        all(isinstance(one, str) for one in cell) and all(_repeats(one, cell[0]) for one in cell[1:]) for cell in cells
    ]
    share = sum(found) / len(found)
    if share >= _REPEATS:
        return found
    if share > 0.5:
        raise DataError(
            f"{source}: responses start with their prompt in {sum(found)} of {len(found)} rows (first: row "
            f"{found.index(True) + 1}); take it away there, or the model would read it twice"
        )
    return [False] * len(found)


def _repeats(response: str, prompt: str) -> bool:
    if turns_of(response):  # a whole dialogue is split by its turns
        return False
    rest = response[len(prompt) :]
    return response.startswith(prompt) and (not rest or rest[0].isspace() or prompt.endswith((ASSISTANT, "\n", " ")))


def _margin(row: Row, source: str, number: Place, columns: _Columns) -> tuple[float | None, bool]:
    """Return by how much chosen is better, and whether the row says that rejected is the better one.

    Raises:
        UnusableRowError: neither is better.
        DataError: a number is malformed.
    """
    preference = read_number(row.get(columns.preference), source, number, columns.preference)
    if preference is not None:
        if preference == 0:
            if columns.objectives:  # they may state what the preference does not
                return None, False
            raise UnusableRowError("in which neither response is better")
        return abs(preference), preference > 0
    return read_difference(row, columns.margin, source, number), False


def _differences(row: Row, source: str, number: Place, columns: _Columns, swap: bool) -> tuple[float, ...]:
    """Return by how much the better response is better on each objective, 0 where the row has no opinion.

    Raises:
        UnusableRowError: it has no opinion on any.
        DataError: a number is malformed.
    """
    found = [_difference(row, source, number, columns, column) for column in columns.objectives.values()]
    if found and not any(found):
        raise UnusableRowError(_NO_OPINION)
    return tuple(-difference if swap else difference for difference in found)


def _difference(row: Row, source: str, number: Place, columns: _Columns, column: str) -> float:
    """Return by how much the response in chosen_column is better by a column; below 0 in preference_column means it."""
    difference = read_difference(row, column, source, number, unrated=True) or 0.0
    return -difference if difference and column == columns.preference else difference


def _check_objectives(rows: Sequence[tuple[Place, Row]], source: str, objectives: Mapping[str, str]) -> None:
    """Refuse an objective whose column is not there, or says nothing.

    Raises:
        DataError: naming objective and column.
    """
    for name, column in objectives.items():
        check_difference(rows, source, "objectives", column)
        if not any(read_difference(row, column, source, number, unrated=True) for number, row in rows):
            raise DataError(
                f"{source}: no row has an opinion on the objective '{name}': column '{column}' is null or 0 in all "
                f"{len(rows)}; name another column, or leave the objective out"
            )
