"""Files that survive a kill: atomic JSON, append-only JSONL with fsync, and a write test before the work starts."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vgf_llm.console.screen import say
from vgf_llm.errors import DataError, OutputError


def check_writable(folder: str | Path) -> Path:
    """Create a folder and prove that a file can be written in it.

    Args:
        folder: path of the output folder; parents are created.

    Returns:
        The folder as a Path.

    Raises:
        OutputError: the path is a file, cannot be created, or refuses a write (read-only or full disk).
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # unbuffered: on a full disk a buffer would be written again when the file is closed, and fail again
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".write_test_", buffering=0) as handle:
            handle.write(b"ok")
    except FileExistsError as error:
        raise OutputError(f"output folder '{folder}' is a file; name another folder") from error
    except OSError as error:
        raise OutputError(
            f"output folder '{folder}' cannot be written ({error.strerror or error}); name another folder or make this "
            "one writable"
        ) from error
    return folder


def write_text_atomic(path: str | Path, text: str) -> None:
    """Write a text file so that a reader sees the old content or the new, never a half.

    Args:
        path: file to write; its folder must exist.
        text: whole content (UTF-8).

    Raises:
        OutputError: the file cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OutputError(f"'{path}' cannot be written ({error.strerror or error})") from error


def write_json_atomic(path: str | Path, obj: Any) -> None:
    """Write an object as indented JSON, atomically.

    Args:
        path: file to write; its folder must exist.
        obj: what ``json.dumps`` accepts.

    Raises:
        OutputError: the file cannot be written.
    """
    write_text_atomic(path, json.dumps(obj, indent=2, ensure_ascii=False) + "\n")


def fsync(path: str | Path) -> None:
    """Force a file's content, or a folder's list of names, to disk.

    Raises:
        OSError: it cannot be opened or written.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append_jsonl(path: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    """Append rows to a JSONL file and force them to disk before returning.

    A torn last line that a kill left behind is cut off first, so that the file stays readable.

    Args:
        path: file to append to; created if missing, its folder must exist.
        rows: one JSON object per line.

    Raises:
        OutputError: the file cannot be written.
    """
    path = Path(path)
    block = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8")
    try:
        with open(path, "a+b") as handle:
            _cut_torn_tail(handle)
            handle.write(block)
            handle.flush()
            os.fsync(handle.fileno())
    except OSError as error:
        raise OutputError(f"'{path}' cannot be written ({error.strerror or error})") from error


def _cut_torn_tail(handle: Any) -> None:
    """Cut what follows the last newline; a complete row without its newline gets one instead."""
    size = handle.seek(0, os.SEEK_END)
    if size == 0:
        return
    tail = b""
    position = size
    while position > 0 and b"\n" not in tail:
        start = max(0, position - 65536)
        handle.seek(start)
        tail = handle.read(position - start) + tail
        position = start
    torn = tail.rpartition(b"\n")[2]
    if not torn:
        return
    try:
        json.loads(torn)
    except ValueError:
        handle.truncate(size - len(torn))
        handle.seek(0, os.SEEK_END)
    else:
        handle.seek(0, os.SEEK_END)
        handle.write(b"\n")


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Read a JSONL file; a torn last line, as a kill leaves it, is dropped and reported on standard error.

    Args:
        path: file of one JSON object per line; empty lines are skipped.

    Returns:
        The rows in file order; an empty list for an empty file.

    Raises:
        DataError: the file is missing, or a line other than the last is not a JSON object (file and row are named).
    """
    path = Path(path)
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError as error:
        raise DataError(f"'{path}' does not exist") from error
    except OSError as error:
        raise DataError(f"'{path}' cannot be read ({error.strerror or error})") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines):  # no newline after it: the write was cut
                say(f"{path}: dropped a torn last line (row {number}, {len(line)} bytes)")
                continue
            raise DataError(f"{path}, row {number}: not JSON ({error}): {shorten(line)}") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, row {number}: expected a JSON object, got {type(row).__name__}: {shorten(line)}")
        rows.append(row)
    return rows


def shorten(text: str | bytes, limit: int = 80) -> str:
    """Cut a text for a message.

    Args:
        text: anything; bytes are read as UTF-8.
        limit: longest result (characters, > 3).

    Returns:
        The text, or its start and three dots.
    """
    text = text.decode("utf-8", errors="replace") if isinstance(text, bytes) else text
    return text if len(text) <= limit else text[: limit - 3] + "..."
