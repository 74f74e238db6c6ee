"""Rows of a data file or hub dataset as dictionaries; a malformed row is an error that names it."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from vgf_llm.errors import DataError
from vgf_llm.io import shorten

Row: TypeAlias = Mapping[str, Any]

_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt")


def read_rows(source: str, split: str = "train", limit: int | None = None) -> list[tuple[int, Row]]:
    """Read the rows of a local file or a hub dataset as dictionaries, each with its number.

    Args:
        source: a .jsonl, .json, .csv or .txt file (one prompt a line), each also as .gz, a .parquet file, or a hub
            dataset as ``owner/name`` or ``owner/name/data_dir``, either with ``:split`` at its end.
        split: split of a hub dataset whose name does not state one; a file has none.
        limit: only the first so many rows (count, > 0).

    Returns:
        (number, row), at least one; the number is the line of a .jsonl or .txt file, blank lines counted, and otherwise
        the place among the rows, from 1.

    Raises:
        DataError: the source is missing, malformed or empty; a malformed row is named.
    """
    if limit is not None and limit <= 0:
        raise DataError(f"'{source}': limit must be > 0, got {limit}; num_prompts of a command is such a limit")
    path = Path(source)
    kind = Path(source.removesuffix(".gz")).suffix.lower()
    if path.is_file():
        if kind not in _SUFFIXES:
            raise DataError(f"'{source}': unknown file type '{kind}'; expected one of {', '.join(_SUFFIXES)}")
        rows = _read_file(path, kind)
    elif kind in _SUFFIXES or source.startswith((".", "/", "~")) or path.exists():
        what = "is a folder, name a file in it" if path.is_dir() else "does not exist"
        raise DataError(f"'{source}' {what} (current folder: {Path.cwd()})")
    else:
        rows = list(enumerate(_read_hub(source, split, limit), 1))
    if not rows:
        raise DataError(f"'{source}' holds no rows")
    return rows[:limit]


def _read_file(path: Path, kind: str) -> list[tuple[int, Row]]:
    readers: dict[str, Callable[[Any, Path], list[tuple[int, Row]]]] = {
        ".jsonl": _jsonl,
        ".json": _json,
        ".csv": _csv,
        ".txt": _txt,
    }
    try:
        if kind == ".parquet":
            import pyarrow.parquet

            return list(enumerate(pyarrow.parquet.read_table(path).to_pylist(), 1))
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8-sig", newline="") as handle:
            return readers[kind](handle, path)
    except (OSError, EOFError, ValueError, zlib.error, csv.Error) as error:
        raise DataError(f"'{path}' cannot be read ({error})") from error


def _jsonl(handle: Any, path: Path) -> list[tuple[int, Row]]:
    lines = enumerate(handle, 1)
    return [(number, _object(line, f"{path}, row {number}")) for number, line in lines if line.strip()]


def _object(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({error}): {shorten(line)}") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object, got {type(row).__name__}: {shorten(line)}")
    return row


def _json(handle: Any, path: Path) -> list[tuple[int, Row]]:
    try:
        rows = json.load(handle)
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}); a file of one object a line is named .jsonl") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path}: expected a list of objects, got {type(rows).__name__}")
    return list(enumerate(rows, 1))


def _csv(handle: Any, path: Path) -> list[tuple[int, Row]]:
    return list(enumerate(csv.DictReader(handle), 1))


def _txt(handle: Any, path: Path) -> list[tuple[int, Row]]:
    return [(number, {"prompt": line.rstrip("\r\n")}) for number, line in enumerate(handle, 1) if line.strip()]


def _read_hub(source: str, split: str, limit: int | None) -> list[Row]:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"'{source}' is no local file, and hub datasets need the package 'datasets': install vgf-llm[train]"
        ) from error
    name, _, stated = source.partition(":")
    split = stated or split
    owner_name, data_dir = "/".join(name.split("/")[:2]), "/".join(name.split("/")[2:]) or None
    try:
        data = datasets.load_dataset(owner_name, data_dir=data_dir, split=split)
    except Exception as error:  # the library raises a dozen types; all mean that this source is not to be had
        raise DataError(
            f"'{source}' is no local file and could not be loaded from the hub as split '{split}' "
            f"({type(error).__name__}: {shorten(str(error), 300)})"
        ) from error
    return list(data if limit is None else data.select(range(min(limit, len(data)))))
