"""Sends what other libraries print into a log, whatever they print it with.

While `library_output` is open, file descriptors 1 and 2 lead into the log. Whatever another library prints, warns, logs
or draws, from Python or from C, here or in a child process, ends up there without its cooperation.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from vgf_llm.console import screen
from vgf_llm.console.progress import alive as alive_signs
from vgf_llm.errors import OutputError

LOG_NAME = "log.txt"

_open = False


@contextlib.contextmanager
def library_output(folder: str | Path | None, alive: bool = True) -> Iterator[None]:
    """Send what other libraries write to ``<folder>/log.txt`` for as long as the context is open.

    Without a folder the log is a temporary file, which is kept only if the command fails. Does nothing inside another
    such context, or where the standard streams are not the process's own (a test that captures them, a notebook).
    If an error ends the context, a line names the log. Until the end there is a sign of life every ten seconds.

    Args:
        folder: Of the log.
        alive: Whether to give signs of life where nothing else does; off for a command that waits for others.

    Raises:
        OutputError: The log cannot be written.
    """
    if _open or not _are_own_streams():
        yield
        return
    path, is_new = _open_log(folder)
    saved = _lead_into(path)
    if folder is not None:
        screen.say(f"output in '{folder}'; what other libraries print is in its {LOG_NAME}")
    size = path.stat().st_size
    failed = False
    try:
        with alive_signs() if alive else contextlib.nullcontext():
            yield
    except Exception as error:
        failed = not isinstance(error, BrokenPipeError)  # a reader that has seen enough, such as head
        raise
    finally:
        _lead_back(saved)
        wrote = path.stat().st_size > size
        if failed and wrote:
            screen.say(f"the output of other libraries is in '{path}'")
        elif folder is None or (is_new and not wrote and "RANK" not in os.environ):  # others may write into it still
            path.unlink(missing_ok=True)


def _are_own_streams() -> bool:
    try:
        return (
            sys.stdout is sys.__stdout__
            and sys.stderr is sys.__stderr__
            and sys.stdout is not None
            and sys.stderr is not None
            and (sys.stdout.fileno(), sys.stderr.fileno()) == (1, 2)
        )
    except (AttributeError, OSError, ValueError):  # closed, or none at all
        return False


def _open_log(folder: str | Path | None) -> tuple[Path, bool]:
    """Return the log, begun with a line on this run, and whether it was not there before."""
    try:
        if folder is None:
            handle, name = tempfile.mkstemp(prefix="vgf-llm-", suffix=".log")
            os.close(handle)
            return Path(name), True
        path = Path(folder) / LOG_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not path.exists()
        with path.open("a", encoding="utf-8", errors="replace") as log:
            if screen.is_first():
                log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(sys.argv)}\n")
    except FileExistsError as error:
        raise OutputError(f"output folder '{folder}' is a file; name another folder") from error
    except OSError as error:
        raise OutputError(
            f"'{LOG_NAME}' in '{folder}' cannot be written ({error.strerror or error}); name another output folder"
        ) from error
    return path, is_new


def _lead_into(path: Path) -> tuple[TextIO, TextIO]:
    """Let file descriptors 1 and 2 lead into the log; returns streams that reach where they led before."""
    global _open
    sys.stdout.flush()
    sys.stderr.flush()
    data = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors, buffering=1)
    people = os.fdopen(os.dup(2), "w", encoding=sys.stderr.encoding, errors=sys.stderr.errors, buffering=1)
    log = os.open(path, os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    screen.set_streams(people, data)
    _open = True
    return data, people


def _lead_back(saved: tuple[TextIO, TextIO]) -> None:
    global _open
    for number, (own, stream) in enumerate(zip((sys.stdout, sys.stderr), saved, strict=True), 1):
        with contextlib.suppress(OSError, ValueError):  # a full disk, or a reader that has left
            own.flush()
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
        os.dup2(stream.fileno(), number)
    screen.set_streams(None, None)
    _open = False
    for stream in saved:
        with contextlib.suppress(OSError):
            stream.close()
