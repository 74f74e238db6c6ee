"""Progress on standard error: a Rich bar on a terminal, one plain line now and then in a log.

Standard output stays free for results.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")

_QUIET_SEC = 5.0  # work shorter than this prints nothing in a log
_EVERY_SEC = 30.0  # a plain line at most this often


def track(iterable: Iterable[Item], description: str, total: int | None = None) -> Iterator[Item]:
    """Yield the items of an iterable and show how far the work is.

    Args:
        iterable: what is worked through.
        description: a few words shown before the count.
        total: number of items; taken from ``len`` where the iterable has one.

    Returns:
        An iterator over the same items.
    """
    if total is None and hasattr(iterable, "__len__"):
        total = len(iterable)
    return _bar(iterable, description, total) if sys.stderr.isatty() else _lines(iterable, description, total)


def _bar(iterable: Iterable[Item], description: str, total: int | None) -> Iterator[Item]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(description, total=total)
        for item in iterable:
            yield item
            progress.advance(task)


def _lines(iterable: Iterable[Item], description: str, total: int | None) -> Iterator[Item]:
    start = time.monotonic()
    last = start - _EVERY_SEC + _QUIET_SEC
    of_total = "" if total is None else f"/{total}"
    done = 0
    for item in iterable:
        yield item
        done += 1
        now = time.monotonic()
        if now - last >= _EVERY_SEC:
            last = now
            print(f"{description}: {done}{of_total} after {now - start:.0f} s", file=sys.stderr, flush=True)
    if time.monotonic() - start >= _QUIET_SEC:
        print(f"{description}: {done} done in {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
