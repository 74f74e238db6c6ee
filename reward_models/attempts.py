"""Calls that take long: several at a time, each with a time limit and further attempts, in the order they end.

Calls run on one event loop, in a thread that stays for as long as the process: a client that a module keeps (an HTTP
session) finds the loop that it was made on. A function without ``async`` gets a thread per call. Python cannot stop a
thread, so a late one is left behind and its answer ignored. A coroutine that waits without ``await`` holds up the loop,
and with it the other calls and all time limits: the caller is told where the loop's own clock stands still.
"""

from __future__ import annotations

import asyncio
import json
import os
import queue
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from vgf_llm.errors import VGFError

_FIRST_WAIT_SEC = 1.0
_LONGEST_WAIT_SEC = 60.0
_BEAT_SEC, _POLL_SEC = 0.1, 0.25
_STALL_SEC = 1.0  # without a beat, while calls are waited for
_FAULTS = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError, NotImplementedError,
    SyntaxError, TypeError, ValueError,
)  # fmt: skip
_loops: dict[int, asyncio.AbstractEventLoop] = {}  # by process


class MayPassError(Exception):
    """A call failed for a reason that may pass, such as a busy server.

    Attributes:
        after_sec: Seconds that were asked for before the next attempt; None leaves it to the caller.
    """

    def __init__(self, message: str, after_sec: float | None = None) -> None:
        super().__init__(message)
        self.after_sec = after_sec


class LateError(Exception):
    """A call took longer than its limit."""


@dataclass(frozen=True)
class Ended:
    """The end of a call: what it returned, or what it raised at its last attempt."""

    index: int
    value: Any = None
    error: BaseException | None = None


Done: TypeAlias = "queue.SimpleQueue[tuple[Ended, asyncio.Event] | None]"
"""Calls that ended, each with what is set once it has been taken; None at the end."""


@dataclass(frozen=True)
class Limits:
    """Time and attempts of a call.

    Attributes:
        timeout_sec: Seconds per attempt, None for no limit.
        retries: Further attempts.
        concurrency: Calls under way at a time.
    """

    timeout_sec: float | None = None
    retries: int = 0
    concurrency: int = 1


class _Pulse:
    """The beat of a loop while calls run on it, and how long they were waited for without one.

    Args:
        stalled: Called, once, where that is too long.
    """

    def __init__(self, stalled: Callable[[], None] | None) -> None:
        self.stalled, self.beats, self._seen, self._still_sec = stalled, 0, 0, 0.0

    async def beat(self) -> None:
        """Count for as long as the loop runs."""
        while True:
            self.beats += 1
            await asyncio.sleep(_BEAT_SEC)

    def next_of(self, done: Done) -> tuple[Ended, asyncio.Event] | None:
        """Return the next call that ended, None at the end."""
        while True:
            started = time.monotonic()
            try:
                return done.get(timeout=_POLL_SEC)
            except queue.Empty:
                continue
            finally:
                self._waited(time.monotonic() - started)

    def _waited(self, sec: float) -> None:
        """Take in a wait; a process that was stopped for long counts as one that waited a little."""
        self._still_sec = self._still_sec + min(sec, _POLL_SEC) if self.beats == self._seen else 0.0
        self._seen = self.beats
        if self._still_sec > _STALL_SEC and self.stalled is not None:
            tell, self.stalled = self.stalled, None
            tell()


def may_pass(error: BaseException) -> bool:
    """Return whether another attempt may go better: errors in code and inputs stay what they are."""
    if isinstance(error, json.JSONDecodeError):  # a cut answer
        return True
    return isinstance(error, Exception) and not isinstance(error, (VGFError, *_FAULTS))


def wait_sec(attempt: int, error: BaseException) -> float:
    """Return the seconds between an attempt, from 0, and the next: they double, and a server may ask for more."""
    asked = error.after_sec if isinstance(error, MayPassError) and error.after_sec is not None else 0.0
    return min(max(_FIRST_WAIT_SEC * 2.0**attempt, asked), _LONGEST_WAIT_SEC)


def ended_calls(
    calls: Sequence[Callable[[], Any]],
    limits: Limits,
    is_good: Callable[[Any], bool] = lambda value: True,
    stalled: Callable[[], None] | None = None,
) -> Iterator[Ended]:
    """Make calls, and yield each as it ends.

    A call is begun in the place of another when the caller has come back for more, and so has kept the other's result:
    a process that is killed loses no more calls than were under way. After the first that fails, or
    returns something unusable, no further one is begun; those under way are waited for, since they are paid for.

    Args:
        calls: Functions without arguments; what they return is awaited where it can be.
        limits: Time, attempts and how many at a time.
        is_good: Whether what a call returned can be used.
        stalled: Called, once, where the loop stands still for over a second: a coroutine waits without ``await``.
    """
    if not calls:
        return
    done: Done = queue.SimpleQueue()
    loop, pulse = _loop(), _Pulse(stalled)
    work = asyncio.run_coroutine_threadsafe(_all(calls, limits, is_good, done, pulse), loop)
    try:
        while (item := pulse.next_of(done)) is not None:
            ended, taken = item
            yield ended
            loop.call_soon_threadsafe(taken.set)
    finally:
        work.cancel()


def _loop() -> asyncio.AbstractEventLoop:
    """Return this process's loop; a fork makes its own."""
    pid = os.getpid()
    if pid not in _loops:
        loop = _loops[pid] = asyncio.new_event_loop()
        threading.Thread(target=loop.run_forever, name="rewards", daemon=True).start()
    return _loops[pid]


async def _all(
    calls: Sequence[Callable[[], Any]], limits: Limits, is_good: Callable[[Any], bool], done: Done, pulse: _Pulse
) -> None:
    left, failed = iter(enumerate(calls)), False

    async def work() -> None:
        nonlocal failed
        for index, call in left:
            ended = await _attempts(index, call, limits)
            failed = failed or ended.error is not None or not is_good(ended.value)
            taken = asyncio.Event()
            done.put((ended, taken))
            await taken.wait()
            if failed:
                return

    beat = asyncio.ensure_future(pulse.beat())
    try:
        await asyncio.gather(*(work() for _ in range(min(limits.concurrency, len(calls)))))
    finally:
        beat.cancel()
        done.put(None)


async def _attempts(index: int, call: Callable[[], Any], limits: Limits) -> Ended:
    """Call until an attempt goes well, fails for good, or was the last."""
    for attempt in range(limits.retries + 1):
        try:
            return Ended(index, await _once(call, limits.timeout_sec))
        except BaseException as error:  # the user's code may raise anything; it is raised where it is waited for
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
                raise
            if attempt == limits.retries or not may_pass(error):
                return Ended(index, error=error)
            await asyncio.sleep(wait_sec(attempt, error))
    raise AssertionError("unreachable")


async def _once(call: Callable[[], Any], timeout_sec: float | None) -> Any:
    try:
        async with asyncio.timeout(timeout_sec) as limit:
            return await _started(call)
    except TimeoutError as error:
        if limit.expired():
            raise LateError(f"no answer in {timeout_sec:g} s") from error
        raise


async def _started(call: Callable[[], Any]) -> Any:
    if getattr(call, "is_async", False):
        return await call()
    loop = asyncio.get_running_loop()
    future: asyncio.Future[tuple[Any, BaseException | None]] = loop.create_future()

    def settle(value: Any, error: BaseException | None) -> None:
        if not future.done():  # left behind
            future.set_result((value, error))

    def run() -> None:
        value, raised = None, None
        try:
            value = call()
        except BaseException as error:  # handed to the one who waits
            raised = error
        loop.call_soon_threadsafe(settle, value, raised)

    threading.Thread(target=run, name="reward", daemon=True).start()
    value, raised = await future
    if raised is not None:
        raise raised
    return await value if isinstance(value, Awaitable) else value
