"""One cell of a row to text or messages, whatever the file made of it.

Messages come as lists of ``{"role", "content"}`` (OpenAI, TRL) or ``{"from", "value"}`` (ShareGPT), as one such object,
as the JSON of either in a text cell, or as what pandas writes for them in a CSV file. What would change the prompt and
is not passed to the chat template (tools, calls of them, images, a model's hidden reasoning) is refused by name.
"""

from __future__ import annotations

import ast
import io
import json
import math
import tokenize
from collections.abc import Mapping, Sequence
from typing import Any

from vgf_llm.data.dialogue import Message, check_characters
from vgf_llm.data.rows import Place, Row
from vgf_llm.errors import DataError
from vgf_llm.runs.files import shorten

_ROLES = {
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "function": "tool",
    "ipython": "tool",
}
_REFUSED_IN_MESSAGES = (
    "tool_calls",
    "function_call",
    "tools",
    "functions",
    "reasoning_content",
    "reasoning",
    "thinking",
)
_REFUSED_COLUMNS = ("tools", "functions", "chat_template_kwargs", "images", "image", "videos", "audio")


def refuse_columns(row: Row, source: str, number: Place, used: Sequence[str]) -> None:
    """Refuse a row whose further columns would change its prompt and are not read.

    Args:
        row: the row.
        source: where it is from.
        number: its place there.
        used: columns that are read.

    Raises:
        DataError: naming the column.
    """
    for column in _REFUSED_COLUMNS:
        if column not in used and column in row and not _is_empty(row[column]):
            raise DataError(
                f"{source}, row {number}, column '{column}': {shorten(repr(row[column]))} would change the prompt and "
                "is not passed to the chat template; write it into the system turn, or remove the column"
            )


def _is_empty(value: Any) -> bool:
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}", "null", "None")
    return value is None or (isinstance(value, float) and math.isnan(value)) or value == [] or value == {}


def missing_column(row: Row, column: str, source: str, number: Place, option: str | None) -> DataError:
    """Return the error for a row without a column: it lists the columns that are there and the option that renames."""
    advice = f"; name another with --{option}" if option else ""
    return DataError(f"{source}, row {number}: no column '{column}'; columns: {', '.join(map(str, row))}{advice}")


def check_named(rows: Sequence[tuple[Place, Row]], source: str, option: str, column: str, default: str) -> None:
    """Refuse an optional column that was named and that no row has; under its default name it may be missing.

    Raises:
        DataError: listing the columns of the first row.
    """
    if column != default and not any(column in row for _, row in rows):
        there = ", ".join(map(str, rows[0][1]))
        raise DataError(f"{source}: no row has the column '{column}' that --{option} names; columns: {there}")


def read_cell(
    row: Row, column: str, source: str, number: Place, empty_ok: bool = False, option: str | None = None
) -> Any:
    """Return a row's text or checked messages.

    Args:
        row: the row.
        column: one of its columns.
        source: where it is from, for messages.
        number: its place there.
        empty_ok: whether an empty cell, or null, is returned as "".
        option: the option that names this column, for messages.

    Raises:
        DataError: the column is missing, malformed or empty.
    """
    where = f"{source}, row {number}"
    if column not in row:
        raise missing_column(row, column, source, number, option)
    value, where = row[column], f"{where}, column '{column}'"
    if hasattr(value, "tolist"):  # a numpy array, or a number of its own type
        value = value.tolist()
    if empty_ok and (value is None or (isinstance(value, float) and math.isnan(value))):
        return ""
    if isinstance(value, str):
        value = _from_text(value, where)
    if isinstance(value, Mapping):
        value = [value]
    value = _unwrapped(value)
    if value is None or not isinstance(value, str | Sequence):
        raise DataError(f"{where}: expected text or messages, got {shorten(repr(value))}")
    if not empty_ok and (not value or isinstance(value, str) and not value.strip()):
        raise DataError(f"{where}: empty; remove the row or fill it")
    return check_characters(value, where) if isinstance(value, str) else messages_of(value, where)


def _from_text(text: str, where: str) -> Any:
    """Return the messages that a text cell holds as JSON or as a Python list, or the text."""
    stripped = text.strip()
    if not stripped.startswith(_STARTS) or not any(mark in text.replace("\\", "") for mark in _MARKS):
        return text
    for parse in (json.loads, ast.literal_eval, _literal_without_commas):
        try:
            found = parse(stripped)
        except (ValueError, SyntaxError, tokenize.TokenError, RecursionError, MemoryError):
            continue
        if isinstance(found, str):  # JSON in JSON
            inner = _from_text(found, where)
            return text if inner is found else inner
        found = [found] if isinstance(found, Mapping) else found
        is_messages = isinstance(found, list) and found and all(isinstance(one, Mapping) for one in found)
        return found if is_messages and all(_HOLDERS & set(one) for one in found) else text
    if stripped.startswith(("[{", "array([{")) and stripped.endswith(("]", ")")):
        raise DataError(
            f"{where}: looks like a list of messages and cannot be read as JSON or Python: {shorten(text)}; save the "
            "file as .jsonl or .parquet, which keep lists"
        )
    return text


_STARTS = ("{", "[", '"{', '"[', "array([")
_LISTS = ("messages", "conversations", "conversation")  # of an object that wraps messages
_HOLDERS = {"role", "from", *_LISTS}
_MARKS = ('"role"', "'role'", '"from"', "'from'")


def _literal_without_commas(text: str) -> Any:
    """Read what numpy prints of an array of dictionaries: a list without commas between them."""
    words, last = [], ""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.string == "{" and last == "}":
            words.append(",")
        if token.string:
            words.append(token.string)
        last = token.string.strip() or last
    return ast.literal_eval(" ".join(word for word in words if word.strip()))


def _unwrapped(value: Any) -> Any:
    """Return the messages of ``{"messages": [...]}``, and anything else as it is."""
    if not isinstance(value, Sequence) or len(value) != 1 or not isinstance(value[0], Mapping) or len(value[0]) != 1:
        return value
    name, inner = next(iter(value[0].items()))
    return inner if name in _LISTS and isinstance(inner, Sequence) else value


def messages_of(value: Sequence[Any], where: str) -> list[Message]:
    """Return checked messages with the roles that chat templates know.

    Raises:
        DataError: one is not a message, has an unknown role, or holds something that is not read.
    """
    return [_message(message, f"{where}, message {index}") for index, message in enumerate(value)]


def _message(message: Any, where: str) -> Message:
    if isinstance(message, str):
        raise DataError(f"{where}: expected an object with 'role' and 'content', got {shorten(repr(message))}; a "
                        "list of texts needs one row per text")  # fmt: skip
    if isinstance(message, Mapping) and "role" not in message and {"from", "value"} <= set(message):
        message = {"role": message["from"], "content": message["value"]}
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
        raise DataError(f"{where}: expected an object with 'role' and 'content', got {shorten(repr(message))}")
    for key in _REFUSED_IN_MESSAGES:
        if not _is_empty(message.get(key)):
            raise DataError(
                f"{where}: '{key}' ({shorten(repr(message[key]))}) is not passed to the chat template; write it into "
                "'content', or remove the row"
            )
    role = _ROLES.get(message["role"].strip().lower())
    if role is None:
        known = ", ".join(dict.fromkeys(_ROLES.values()))
        raise DataError(f"{where}: the role {message['role']!r} is not known; it must be one of {known}")
    return {"role": role, "content": _content(message["content"], where)}


def _content(content: Any, where: str) -> str:
    if hasattr(content, "tolist"):
        content = content.tolist()
    if content is None:
        return ""
    if isinstance(content, str):
        return check_characters(content, where)
    parts = content if isinstance(content, Sequence) else [content]
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
        if not isinstance(part, Mapping) or kind not in ("text", "input_text") or not isinstance(part.get("text"), str):
            raise DataError(
                f"{where}: expected an object with 'role' and 'content' as text, got a part of type {kind!r} "
                f"({shorten(repr(part))}); only parts of text are read"
            )
    return check_characters("".join(part["text"] for part in parts), where)


def read_number(value: Any, source: str, number: Place, column: str) -> float | None:
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


def read_difference(row: Row, column: str, source: str, number: Place, unrated: bool = False) -> float | None:
    """Return a column's number, or that of two columns as ``left-right``: left less right; None where one is empty.

    Args:
        row: the row.
        column: one of its columns, or two.
        source: where it is from.
        number: its place there.
        unrated: whether NaN and what annotators write for it ("N/A") is empty.

    Raises:
        DataError: a cell is neither empty nor a finite number.
    """
    sides = (None if column in row else _sides(column, row)) or (column,)
    cells = [None if unrated and _is_unrated(row.get(side)) else row.get(side) for side in sides]
    found = [read_number(cell, source, number, side) for cell, side in zip(cells, sides, strict=True)]
    if found[0] is None or found[-1] is None:
        return None
    return found[0] if len(found) == 1 else found[0] - found[1]  # type: ignore[operator]


def _is_unrated(value: Any) -> bool:
    if isinstance(value, str):
        return value.strip().lower() in ("", "n/a", "na", "nan", "null", "none")
    try:
        return bool(math.isnan(value))
    except TypeError:
        return False


def check_difference(
    rows: Sequence[tuple[Place, Row]], source: str, option: str, column: str, default: str = ""
) -> None:
    """Refuse a column of differences, or two as ``left-right``, that no row has; see :func:`check_named`."""
    if not any(column in row or _sides(column, row) for _, row in rows):
        check_named(rows, source, option, column, default)


def _sides(column: str, row: Row) -> tuple[str, str] | None:
    """Return the columns of ``left-right`` where the row has both, whichever dash divides them."""
    for dash in (place for place, sign in enumerate(column) if sign == "-"):
        left, right = column[:dash].strip(), column[dash + 1 :].strip()
        if left in row and right in row:
            return left, right
    return None
