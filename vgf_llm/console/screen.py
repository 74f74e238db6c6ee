"""The streams of a command: people read standard error, programs read standard output.

`say`, `show` and `emit` reach the streams that the command was started with, also while
:mod:`vgf_llm.console.library_log` leads the file descriptors into a log.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import Any, TextIO

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


def set_streams(people_stream: TextIO | None, data_stream: TextIO | None) -> None:
    """Speak to these streams from now on; None for the process's own."""
    global _people, _data
    with _lock:
        _people, _data = people_stream, data_stream


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
