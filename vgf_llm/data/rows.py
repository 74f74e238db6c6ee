"""Rows of data files or hub datasets as dictionaries; a malformed row is an error that names it."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from vgf_llm.data.sources import SUFFIXES, file_kind, local_files
from vgf_llm.errors import DataError
from vgf_llm.runs.files import shorten

Row: TypeAlias = Mapping[str, Any]
Place: TypeAlias = int | str
"""A row's number, from 1; "3 of part-2.jsonl" where a source has several files."""

_LONGEST_CELL = 2**30  # characters; Python's default of 131,072 is less than a long conversation


def read_rows(source: str, split: str = "train", limit: int | None = None) -> list[tuple[Place, Row]]:
    """Read the rows of local files or a hub dataset as dictionaries, each with its number.

    Args:
        source: a .jsonl, .ndjson, .json, .csv, .tsv or .txt file (one prompt per line), each also as .gz, a .parquet or
            .arrow file; a glob of such files; a folder of them, or one that ``save_to_disk`` wrote; or a hub dataset as
            ``owner/name`` or ``owner/name/data_dir``. Folders and hub datasets take ``:split`` at their end.
        split: split of a hub dataset or folder whose name does not state one; a file has none.
        limit: only the first so many rows (count, > 0).

    Returns:
        (number, row), at least one; the number is the line of a .jsonl or .txt file, blank lines counted, and otherwise
        the place among the rows, from 1.

    Raises:
        DataError: the source is missing, malformed or empty; a malformed row is named.
    """
    if limit is not None and limit <= 0:
        raise DataError(f"'{source}': limit must be > 0, got {limit}; num_prompts of a command is such a limit")
    files = local_files(source, split)
    rows: list[tuple[Place, Row]] = []
    if files is None:
        rows = list(enumerate(_read_hub(source, split, limit), 1))
    else:
        for path in files.paths:
            found = _read_file(path)
            rows += [(f"{number} of {path.name}", row) for number, row in found] if files.many else found
            if limit is not None and len(rows) >= limit:
                break
    if not rows:
        raise DataError(f"'{source}' holds no rows")
    return rows[:limit]


def _read_file(path: Path) -> list[tuple[int, Row]]:
    kind = file_kind(path.name)
    if kind not in SUFFIXES:
        raise DataError(f"'{path}': unknown file type '{kind}'; expected one of {', '.join(SUFFIXES)}")
    readers: dict[str, Callable[[Any, Path], list[tuple[int, Row]]]] = {
        ".jsonl": _jsonl,
        ".ndjson": _jsonl,
        ".json": _json,
        ".csv": _csv,
        ".tsv": _tsv,
        ".txt": _txt,
    }
    try:
        if kind in (".parquet", ".arrow"):
            return list(enumerate(_table(path, kind), 1))
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8-sig", newline="") as handle:
            return readers[kind](handle, path)
    except UnicodeDecodeError as error:
        raise DataError(f"'{path}' is not UTF-8 text ({error}); save it as UTF-8") from error
    except (OSError, EOFError, ValueError, zlib.error, csv.Error) as error:
        raise DataError(f"'{path}' cannot be read ({error})") from error


def _table(path: Path, kind: str) -> list[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"'{path}' needs the package 'pyarrow': install vgf-llm[train]") from error
    if kind == ".parquet":
        table = pyarrow.parquet.read_table(path)
        return list(table.to_pylist())
    with path.open("rb") as handle:  # datasets writes streams, pyarrow and pandas files
        is_file = handle.read(6) == b"ARROW1"
    with pyarrow.memory_map(str(path)) as source:
        opened = pyarrow.ipc.open_file(source) if is_file else pyarrow.ipc.open_stream(source)
        return list(opened.read_all().to_pylist())


def _jsonl(handle: Any, path: Path) -> list[tuple[int, Row]]:
    lines = enumerate(handle, 1)
    return [(number, _object(line, f"{path}, row {number}")) for number, line in lines if line.strip()]


def _object(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error}): {shorten(line)}") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object, got {type(row).__name__}: {shorten(line)}")
    return row


def _json(handle: Any, path: Path) -> list[tuple[int, Row]]:
    """Read a list of objects, an object that holds one such list, or (as often on the hub) one object per line."""
    text = handle.read()
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("{") and "\n" in text.strip() and "Extra data" in str(error):
            return _jsonl(text.split("\n"), path)
        raise DataError(f"{path}: not JSON ({error}); a file of one object per line is named .jsonl") from error
    if isinstance(found, dict):
        lists = {key: value for key, value in found.items() if _is_rows(value)}
        if len(lists) == 1:
            return list(enumerate(next(iter(lists.values())), 1))
        if lists:
            raise DataError(f"{path}: holds several lists of rows ({', '.join(lists)}); save the one to be read alone")
        raise DataError(
            f"{path}: expected a list of objects, got dict with the keys {', '.join(map(str, list(found)[:8]))}; save "
            "rows as a list or one per line (pandas: to_json(orient='records'))"
        )
    if found != [] and not _is_rows(found):
        raise DataError(f"{path}: expected a list of objects, got {type(found).__name__}")
    return list(enumerate(found, 1))


def _is_rows(value: Any) -> bool:
    """Whether it is a list of rows; a list of messages is one cell of a row."""
    if not isinstance(value, list) or not value or not all(isinstance(one, dict) for one in value):
        return False
    return not any({"role", "from"} & set(one) for one in value)


def _csv(handle: Any, path: Path) -> list[tuple[int, Row]]:
    return _separated(handle, path, ",")


def _tsv(handle: Any, path: Path) -> list[tuple[int, Row]]:
    return _separated(handle, path, "\t")


def _separated(handle: Iterable[str], path: Path, delimiter: str) -> list[tuple[int, Row]]:
    csv.field_size_limit(_LONGEST_CELL)
    reader = csv.DictReader(handle, delimiter=delimiter)
    names = list(reader.fieldnames or ())
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{path}: the column {twice!r} stands twice in the first line; rename one of them")
    rows: list[tuple[int, Any]] = list(enumerate(reader, 1))
    for number, row in rows:
        if None in row:
            cells = len(names) + len(row[None])
            raise DataError(
                f"{path}, row {number}: {cells} cells under {len(names)} columns ({', '.join(names)}), the first "
                f"{shorten(repr(row[names[0]]))}; put cells that hold {delimiter!r} in double quotes"
            )
    return rows


def _txt(handle: Any, path: Path) -> list[tuple[int, Row]]:
    return [(number, {"prompt": line.rstrip("\r\n")}) for number, line in enumerate(handle, 1) if line.strip()]


def _read_hub(source: str, split: str, limit: int | None) -> list[Row]:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"'{source}' is not a local file, and hub datasets need the package 'datasets': install vgf-llm[train]"
        ) from error
    name, _, stated = source.partition(":")
    split = stated or split
    owner_name, data_dir = "/".join(name.split("/")[:2]), "/".join(name.split("/")[2:]) or None
    try:
        data = datasets.load_dataset(owner_name, data_dir=data_dir, split=split)
    except Exception as error:  # the library raises a dozen types; all mean that this source is not to be had
        raise DataError(
            f"'{source}' is not a local file and could not be loaded from the hub as split '{split}' "
            f"({type(error).__name__}: {shorten(str(error), 300)})"
        ) from error
    return list(data if limit is None else data.select(range(min(limit, len(data)))))
