"""Progress on standard error: a Rich bar on a terminal, a plain line every ten seconds without one.

`track` and `Bar` count, `working` shows that a call which cannot be counted is alive. All of them tick from a thread,
so that a long step is no silence. Of several that are open at once the innermost prints the lines.
"""

from __future__ import annotations

import collections
import importlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any, TypeVar

from vgf_llm.console import screen

Item = TypeVar("Item")

_EVERY_SEC = 10.0  # between two signs of life in a log
_LOOK_SEC = 0.25
_RATE_SEC = 60.0  # the rate is that of the last minute
_ROUND_FROM_SEC = 90.0


def duration(seconds: float) -> str:
    """Return a time span in words: "40 s", "3 min", "1 h 20 min"."""
    if seconds < _ROUND_FROM_SEC:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


_plans: list[list[int]] = []  # [stages begun, stages in all] of the commands that run inside one another


@contextmanager
def stages(total: int) -> Iterator[None]:
    """Number the stages that begin while the context is open; those of a command inside another are not numbered."""
    _plans.append([0, total])
    try:
        yield
    finally:
        _plans.pop()


def stage(title: str, expected_sec: float | None = None) -> None:
    """Print the title of a stage, with the time that it is expected to take.

    Args:
        title: A few words.
        expected_sec: Seconds; None where nothing is known yet.
    """
    if len(_plans) == 1:
        _plans[0][0] += 1
        title = f"{_plans[0][0]}/{_plans[0][1]} {title}"
    screen.say(title if expected_sec is None else f"{title}, about {_roughly(expected_sec)}")


def _roughly(seconds: float) -> str:
    """Return an expected time no finer than it can be known."""
    if seconds < 45:
        return f"{max(5, round(seconds / 5) * 5)} seconds"
    if seconds < 90:
        return "a minute"
    minutes = round(seconds / 60)
    return f"{minutes} minutes" if minutes < 90 else f"{minutes / 60:.1f} hours"


class Bar:
    """Work that is counted, from `with` to its end.

    Args:
        description: A few words.
        total: Units of work; None where that is not known.
        unit: What is counted, in the plural.
        aside: Has no last line in a log.
        fills_gaps: Shows only while no other bar is open.
    """

    def __init__(
        self,
        description: str,
        total: int | None = None,
        unit: str = "",
        aside: bool = False,
        fills_gaps: bool = False,
    ) -> None:
        self.description, self.total, self.unit = description, total, unit
        self.aside, self.fills_gaps = aside, fills_gaps
        self.done = 0
        self.figures: dict[str, str] = {}
        self.started = time.monotonic()
        self._seen: collections.deque[tuple[float, int]] = collections.deque([(self.started, 0)])

    def __enter__(self) -> Bar:
        self.started = time.monotonic()
        self._seen = collections.deque([(self.started, self.done)])
        _display.open(self)
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        _display.close(self, failed=kind is not None)

    def advance(self, count: int = 1, **figures: Any) -> None:
        """Count units, and replace figures that are shown behind the time left."""
        self.move_to(self.done + count, **figures)

    def move_to(self, done: int, **figures: Any) -> None:
        """Set the count."""
        now = time.monotonic()
        self.done = done
        self._seen.append((now, done))
        while len(self._seen) > 2 and now - self._seen[1][0] > _RATE_SEC:
            self._seen.popleft()
        self.figures |= {name: _figure(value) for name, value in figures.items()}

    def start_at(self, done: int) -> None:
        """Set the count that a resumed run begins with; it is not part of the rate."""
        self.done = done
        self._seen = collections.deque([(time.monotonic(), done)])

    @property
    def rate(self) -> float:
        """Units per second over the last minute; 0 before the first."""
        (since, before), (_, done) = self._seen[0], self._seen[-1]
        elapsed = (self._seen[-1][0] if done > before else time.monotonic()) - since
        return (done - before) / elapsed if elapsed > 0 and done > before else 0.0

    @property
    def left_sec(self) -> float | None:
        """Expected seconds to the end; None where nothing is known."""
        rate = self.rate
        return (self.total - self.done) / rate if self.total is not None and rate else None

    def status(self) -> str:
        """Return rate, time left and figures, as far as there are any."""
        parts = []
        if rate := self.rate:
            one = self.unit.removesuffix("s") or "each"
            parts.append(f"{rate:.3g} {self.unit or 'items'}/s" if rate >= 1 else f"{1 / rate:.3g} s/{one}")
        if (left := self.left_sec) is not None:
            parts.append(f"{duration(left)} left")
        return ", ".join([*parts, *(f"{name} {text}" for name, text in self.figures.items())])

    def line(self) -> str:
        """Return the whole state as a line."""
        if self.fills_gaps:
            return f"{self.description}, {duration(time.monotonic() - screen.news_at())}"
        elapsed = duration(time.monotonic() - self.started)
        if self.total is None and not self.done:
            return f"{self.description}, {elapsed}"
        of_total = "" if self.total is None else f"/{self.total}"
        status = self.status() or f"{elapsed} so far"
        return f"{self.description}: {self.done}{of_total}{' ' + self.unit if self.unit else ''}, {status}"


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def track(
    iterable: Iterable[Item],
    description: str,
    total: int | None = None,
    *,
    unit: str = "",
    size: Callable[[Item], int] | None = None,
) -> Iterator[Item]:
    """Yield the items of an iterable and show how far the work is.

    Args:
        iterable: what is worked through.
        description: a few words shown before the count.
        total: number of units; taken from the iterable where it has a length.
        unit: what is counted, in the plural.
        size: units that an item stands for, such as the prompts of a batch; 1 when not given.

    Returns:
        An iterator over the same items.
    """
    if total is None and isinstance(iterable, Sized):
        total = len(iterable) if size is None else sum(size(item) for item in iterable)
    with Bar(description, total, unit) as bar:
        for item in iterable:
            yield item
            bar.advance(1 if size is None else size(item))


def load_libraries(*modules: str) -> None:
    """Import modules that bring torch and transformers along, under a sign of life: it takes seconds to a minute."""
    missing = [name for name in modules if name not in sys.modules]
    if missing:
        with working("loading torch and transformers"):
            for name in missing:
                importlib.import_module(name)


@contextmanager
def alive() -> Iterator[None]:
    """Give a sign of life every ten seconds in which nothing else appears."""
    with Bar("still working", aside=True, fills_gaps=True):
        yield


@contextmanager
def working(description: str) -> Iterator[Bar]:
    """Show that a call which cannot be counted is alive: its name at once, then every ten seconds."""
    screen.say(description)
    with Bar(description, aside=True) as bar:
        yield bar


class _Display:
    """Draws the open bars: all of them on a terminal, the innermost in a log."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._bars: list[Bar] = []
        self._tasks: dict[int, Any] = {}
        self._progress: Any = None
        self._thread: threading.Thread | None = None
        self._over = threading.Event()

    def open(self, bar: Bar) -> None:
        if not screen.is_first():
            return
        with self._lock:
            self._bars.append(bar)
            if len(self._bars) > 1:
                if self._progress is not None:
                    self._add(bar)
                return
            if screen.people().isatty() and os.environ.get("TERM") not in ("dumb", "unknown"):
                self._progress = _rich_progress()
                self._add(bar)
                self._progress.start()
                screen.set_live(self._progress)
            self._over = threading.Event()
            self._thread = threading.Thread(target=self._tick, args=(self._over,), name="progress", daemon=True)
            self._thread.start()

    def close(self, bar: Bar, failed: bool = False) -> None:
        with self._lock:
            if bar not in self._bars:
                return
            self._bars.remove(bar)
            if self._progress is not None:
                self._progress.remove_task(self._tasks.pop(id(bar)))
            last, progress = not self._bars, self._progress
            if last:
                self._over.set()
                self._progress = None
        if last and progress is not None:
            screen.set_live(None)
            progress.stop()
        elapsed = time.monotonic() - bar.started
        if not bar.aside and not failed and elapsed >= _EVERY_SEC:
            figures = "".join(f", {name} {text}" for name, text in bar.figures.items())
            unit = f" {bar.unit.removesuffix('s') if bar.done == 1 else bar.unit}" if bar.unit else ""
            screen.say(f"{bar.description}: {bar.done}{unit} done in {duration(elapsed)}{figures}")

    def _add(self, bar: Bar) -> None:

        self._tasks[id(bar)] = self._progress.add_task(
            bar.description, total=bar.total, completed=bar.done, status="", count=_count(bar)
        )

    def _tick(self, over: threading.Event) -> None:
        while not over.wait(_LOOK_SEC):
            with self._lock:
                if over.is_set():
                    return
                if self._progress is not None:
                    for bar in self._bars:
                        self._progress.update(
                            self._tasks[id(bar)],
                            completed=bar.done,
                            total=bar.total,
                            status=bar.status(),
                            count=_count(bar),
                            visible=not bar.fills_gaps or len(self._bars) == 1,
                        )
                    continue
                innermost = self._bars[-1]
            if time.monotonic() - screen.said_at() >= _EVERY_SEC:
                screen.say(innermost.line(), news=False)


def _count(bar: Bar) -> str:
    if bar.total is None:
        return str(bar.done) if bar.done else ""
    return f"{bar.done}/{bar.total} {bar.unit}".strip()


def _rich_progress() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[count]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("{task.fields[status]}", markup=False),
        console=Console(file=screen.people()),
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )


_display = _Display()
