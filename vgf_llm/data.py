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

from vgf_llm.dialogue import ASSISTANT, HUMAN, Message, Prompt, as_messages, as_text, split_pair
from vgf_llm.errors import DataError, ModelError
from vgf_llm.io import shorten
from vgf_llm.rows import Row, read_rows


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


# Encoding ----------------------------------------------------------------------------------------------------------


def encode_prompt(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Encode a prompt up to where the model's response begins.

    With a chat template: a string is one user message, a Human/Assistant dialogue its turns, and the generation prompt
    is added. Without one: text as it is with the tokenizer's own BOS, messages as a Human/Assistant dialogue.

    Args:
        tokenizer: a transformers tokenizer.
        prompt: text or messages.

    Returns:
        Token ids, at least one.

    Raises:
        DataError: the template refuses the messages, or nothing is left to encode.
    """
    if getattr(tokenizer, "chat_template", None):
        messages = as_messages(prompt)
        try:
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        except Exception as error:  # jinja2 and its sandbox raise several types; all mean a refused conversation
            raise DataError(
                f"the chat template refuses the messages {shorten(repr(messages), 200)}: {error}"
            ) from error
    else:
        ids = encode_text(tokenizer, as_text(prompt))
    if not ids:
        raise DataError(f"the prompt {shorten(repr(prompt))} has no tokens")
    return list(ids)


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Encode a text that is to be gone on with, as it stands, with the tokenizer's own BOS and no chat template."""
    ids = list(tokenizer(text)["input_ids"])
    if ids and tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id:
        return ids[:-1]  # some tokenizers close every text; a prompt goes on
    return ids


def encode_response(tokenizer: Any, text: str, eos: bool) -> list[int]:
    """Encode a response as it follows an encoded prompt.

    Under a chat template leading white space is dropped (the template has placed it already).

    Args:
        tokenizer: a transformers tokenizer.
        text: the response.
        eos: close it with the tokenizer's EOS.

    Returns:
        Token ids without BOS.

    Raises:
        ModelError: ``eos`` is asked for and the tokenizer has no EOS token.
    """
    if getattr(tokenizer, "chat_template", None):
        text = text.lstrip()
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if not eos:
        return ids
    if tokenizer.eos_token_id is None:
        raise ModelError("the tokenizer has no EOS token, so a response cannot be closed; set tokenizer.eos_token")
    return [*ids, tokenizer.eos_token_id]


def check_prompt_fits(
    ids: Sequence[int], max_positions: int | None, new_tokens: int, index: int, reserved: int = 0
) -> None:
    """Refuse a prompt that leaves no room for the response.

    Args:
        ids: encoded prompt.
        max_positions: positions of the model (tokens); None where it has no limit.
        new_tokens: longest response (tokens).
        index: position of the prompt in its list, for the message.
        reserved: positions that neither may take; an engine needs one to read what was written.

    Raises:
        DataError: prompt and response together exceed the model's positions.
    """
    if max_positions is not None and len(ids) + new_tokens + reserved > max_positions:
        kept = f" less the {reserved} that an engine needs to read" if reserved else ""
        raise DataError(
            f"prompt {index}: {len(ids)} tokens and up to {new_tokens} new ones exceed the model's {max_positions} "
            f"positions{kept}; shorten it to {max(max_positions - reserved - new_tokens, 0)} tokens or lower "
            "max_new_tokens"
        )
