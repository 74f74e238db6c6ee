"""The streams of a command: people read standard error, programs read standard output, libraries write into a log.

While `library_output` is open, file descriptors 1 and 2 lead into the log. Whatever another library prints, warns, logs
or draws, from Python or from C, here or in a child process, ends up there without its cooperation. `say` and `emit`
reach the streams that the command was started with.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from vgf_llm.errors import OutputError

LOG_NAME = "log.txt"
_LOG_COLUMNS = 120  # of a table that no terminal limits

_lock = threading.RLock()
_people: TextIO | None = None
_data: TextIO | None = None
_live: Any = None  # the rich Progress that is on the terminal now
_said_at = _news_at = time.monotonic()


def people() -> TextIO:
    """Return the stream for people: standard error, also while file descriptor 2 leads into a log."""
    return _people or sys.stderr


def data() -> TextIO:
    """Return the stream for data: standard output, also while file descriptor 1 leads into a log."""
    return _data or sys.stdout


def is_first() -> bool:
    """Return whether this is the first process of a launch, the only one that speaks."""
    return os.environ.get("RANK", "0") == "0"


def said_at() -> float:
    """Return when a line last appeared, by `time.monotonic`."""
    return _said_at


def news_at() -> float:
    """Return when a line last appeared that was not a mere sign of life, by `time.monotonic`."""
    return _news_at


def say(text: str, news: bool = True) -> None:
    """Print a line for people, above the bar if there is one; processes other than the first stay silent.

    Args:
        text: The line.
        news: Whether it is more than a sign of life.
    """
    global _said_at, _news_at
    if not is_first():
        return
    with _lock:
        _said_at = time.monotonic()
        if news:
            _news_at = _said_at
        if _live is not None:
            _live.console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)
        else:
            print(text, file=people(), flush=True)


def emit(line: str) -> None:
    """Write a line of data to standard output, exactly as it is and at once, in UTF-8 whatever the locale."""
    with _lock:
        stream = data()
        if (getattr(stream, "encoding", None) or "utf-8").lower().replace("-", "") != "utf8":
            stream.reconfigure(encoding="utf-8")  # type: ignore[attr-defined]
        live = _live if data().isatty() else None  # the bar would be drawn into the line
        if live is not None:
            live.stop()
        try:
            data().write(line + "\n")
            data().flush()
        finally:
            if live is not None:
                live.start()


def show(table: Any) -> None:
    """Print a Rich table, or any Rich renderable, for people; as wide as the terminal, in a log as wide as a page."""
    from rich.console import Console

    global _said_at
    if not is_first():
        return
    with _lock:
        _said_at = time.monotonic()
        wide = None if people().isatty() else _LOG_COLUMNS
        (Console(file=people(), width=wide) if _live is None else _live.console).print(table)


def set_live(progress: Any) -> None:
    """Tell which Rich Progress is drawn from now on; None for none."""
    global _live
    with _lock:
        _live = progress


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
    if _people is not None or not _are_own_streams():
        yield
        return
    from vgf_llm import progress

    path, is_new = _open_log(folder)
    saved = _lead_into(path)
    if folder is not None:
        say(f"output in '{folder}'; what other libraries print is in its {LOG_NAME}")
    size = path.stat().st_size
    failed = False
    try:
        with progress.alive() if alive else contextlib.nullcontext():
            yield
    except Exception as error:
        failed = not isinstance(error, BrokenPipeError)  # a reader that has seen enough, such as head
        raise
    finally:
        _lead_back(saved)
        wrote = path.stat().st_size > size
        if failed and wrote:
            say(f"the output of other libraries is in '{path}'")
        elif folder is None or (is_new and not wrote and "RANK" not in os.environ):  # others may write into it still
            path.unlink(missing_ok=True)


def _are_own_streams() -> bool:
    try:
        return (
            sys.stdout is sys.__stdout__
            and sys.stderr is sys.__stderr__
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
            if is_first():
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
    global _people, _data
    sys.stdout.flush()
    sys.stderr.flush()
    _data = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors, buffering=1)
    _people = os.fdopen(os.dup(2), "w", encoding=sys.stderr.encoding, errors=sys.stderr.errors, buffering=1)
    log = os.open(path, os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    return _data, _people


def _lead_back(saved: tuple[TextIO, TextIO]) -> None:
    global _people, _data
    with _lock:
        for number, (own, stream) in enumerate(zip((sys.stdout, sys.stderr), saved, strict=True), 1):
            with contextlib.suppress(OSError, ValueError):  # a full disk, or a reader that has left
                own.flush()
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
            os.dup2(stream.fileno(), number)
        _people = _data = None
    for stream in saved:
        with contextlib.suppress(OSError):
            stream.close()
