"""The thread that owns an engine: many callers' requests share its batch, and nobody waits for one that is gone.

The thread takes what callers bring, lets the engine do a step, hands every caller their texts when the last of them is
finished, and so on. Each caller looks every second at when the thread last got anywhere and whether the engine's
processes live: an engine whose process died raises within that second, one that hangs after ``timeout_sec`` without a
step; what is left of either is killed, and it is not used again. A caller who gives up (Ctrl-C, a deadline) has their
requests taken out of the engine; a request that it refuses fails its own caller only.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Protocol

from vgf_llm.engines.deadline import OPEN, Deadline
from vgf_llm.engines.engine import EngineError, RequestRefusedError

_LOOK_SEC, _LOOK_AT_DEADLINE_SEC = 1.0, 0.1
_CLOSING_SEC = 10.0
_ADDED_AT_ONCE = 16  # requests between two steps: each takes up to some milliseconds in which nothing is written


class Batch(Protocol):
    """A running batch of an engine, to which requests are added between steps; used from one thread."""

    def add(self, name: str, request: Any) -> None:
        """Take a request in.

        Raises:
            RequestRefusedError: If the engine refuses it, and is what it was before.
        """
        ...

    def step(self) -> Iterable[tuple[str, Any]]:
        """Write a token of every request; returns the names of those that are finished with what came of them."""
        ...

    def abort(self, names: Sequence[str]) -> None:
        """Take requests out."""
        ...

    def wake(self) -> None:
        """Let a step that waits for a process that is gone end with an error; called from any thread."""
        ...


class _Call:
    """What one caller waits for: a job, or texts.

    Attributes:
        done: Gets (result, None) or (None, error) once.
        abandoned: Set where the caller waits no longer.
    """

    def __init__(self) -> None:
        self.done: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        self.abandoned = threading.Event()


class _Job(_Call):
    def __init__(self, run: Callable[[Callable[[], None]], Any]) -> None:
        super().__init__()
        self.run = run


class _Texts(_Call):
    def __init__(self, requests: Sequence[Any]) -> None:
        super().__init__()
        self.number = len(requests)
        self.left = deque(enumerate(requests))
        self.found: dict[int, Any] = {}

    def put(self, index: int, text: Any) -> None:
        self.found[index] = text
        if len(self.found) == self.number:
            self.done.put(([self.found[i] for i in range(self.number)], None))


class EngineThread:
    """Drives one engine for any number of callers.

    Args:
        name: What errors call the engine.

    Attributes:
        processes: What must be alive while it works.
        batch: The engine's batch, once there is one.
        broken: Why it is not used again; empty while it is.
    """

    def __init__(self, name: str) -> None:
        self.name, self.broken = name, ""
        self.processes: list[Any] = []
        self.batch: Batch | None = None
        self._inbox: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._arriving: deque[_Texts] = deque()  # with requests that are not in the batch yet
        self._waiting: dict[str, tuple[_Texts, int]] = {}
        self._names = map(str, itertools.count())
        self._idle, self._last = True, time.monotonic()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def call(
        self, job: Callable[[Callable[[], None]], Any], timeout_sec: float, deadline: Deadline | None = None
    ) -> Any:
        """Run ``job`` on the engine's thread between two steps and return what it returns.

        It is given a function to call whenever it has got somewhere.

        Raises:
            EngineError: If it raised what is no error of the caller's, or got nowhere for ``timeout_sec``.
            AbandonedError: If ``deadline`` says that the caller has left.
            DeadlineError: If it has passed.
        """
        return self._result(_Job(job), timeout_sec, deadline or OPEN)

    def run(self, requests: Sequence[Any], timeout_sec: float, deadline: Deadline | None = None) -> list[Any]:
        """Return what came of each request, written beside those of other callers.

        Raises:
            RequestRefusedError: If the engine refuses a request.
            EngineError: If it died, or gave no sign of life for ``timeout_sec``.
            AbandonedError: If ``deadline`` says that the caller has left; the requests are taken out.
            DeadlineError: If it has passed, likewise.
        """
        return self._result(_Texts(requests), timeout_sec, deadline or OPEN) if requests else []

    @property
    def unfinished(self) -> int:
        """Requests that are being written or wait to be."""
        return len(self._waiting) + sum(len(texts.left) for texts in list(self._arriving))

    def check(self, timeout_sec: float) -> None:
        """Do nothing while the engine can be used.

        Raises:
            EngineError: If a process of it ended, or it was busy without getting anywhere for ``timeout_sec``.
        """
        if self.broken:
            raise EngineError(f"the {self.name} is not used again: {self.broken}")
        for process in self.processes:
            if not process.is_alive():
                self.give_up(f"its process {process.pid} ended with exit code {process.exitcode}")
                raise EngineError(f"the {self.name} died: {self.broken}")
        silent_sec = 0.0 if self._idle else time.monotonic() - self._last
        if silent_sec > timeout_sec:
            self.give_up(f"it gave no sign of life for {silent_sec:.0f} s")
            raise EngineError(f"the {self.name} hangs: {self.broken}; see its log, or give it longer (timeout_sec)")

    def give_up(self, reason: str) -> None:
        """Use the engine no more, and leave nothing of it running."""
        self.broken = reason
        for process in self.processes:
            process.kill()
        if self.batch is not None:
            self.batch.wake()

    def stop(self, last: Callable[[], None] | None = None) -> None:
        """Let the thread do a last thing and end; then kill what is left of the processes."""
        self.broken = self.broken or "it was closed"
        if last is not None:
            self._inbox.put(_Job(lambda tick: last()))
        self._inbox.put(None)
        self._thread.join(_CLOSING_SEC)
        for process in self.processes:
            process.join(0 if self._thread.is_alive() else _CLOSING_SEC)
            process.kill()
        self.batch = None  # and with it what vLLM keeps in this process

    # The caller's side ---------------------------------------------------------------------------------------------

    def _result(self, call: _Call, timeout_sec: float, deadline: Deadline) -> Any:
        self.check(timeout_sec)
        self._inbox.put(call)
        try:
            result, error = self._wait(call, timeout_sec, deadline)
        except BaseException:  # nobody waits for it any more: it ends where it next gets somewhere
            call.abandoned.set()
            raise
        if error is None:
            return result
        raise (error if isinstance(call, _Job) else _likewise(error)) from error

    def _wait(self, call: _Call, timeout_sec: float, deadline: Deadline) -> tuple[Any, BaseException | None]:
        look_sec = _LOOK_SEC if deadline is OPEN else _LOOK_AT_DEADLINE_SEC
        looked = time.monotonic()
        while True:
            try:
                return call.done.get(timeout=min(look_sec, timeout_sec))
            except queue.Empty:
                deadline.check()
                if time.monotonic() - looked >= min(_LOOK_SEC, timeout_sec):
                    looked = time.monotonic()
                    self.check(timeout_sec)

    # The thread's side ---------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while self._take_in():
            self._drop_abandoned()
            self._add_some()
            if self._waiting:
                self._step()

    def _take_in(self) -> bool:
        """Do what callers brought since the last step, and wait for them where there is nothing to write."""
        while True:
            try:
                nothing = not self._waiting and not self._arriving
                self._idle = nothing and self._inbox.empty()
                call = self._inbox.get(block=nothing)
            except queue.Empty:
                return True
            self._last, self._idle = time.monotonic(), False
            if call is None:
                self._fail_all(EngineError(f"the {self.name} was closed"))
                return False
            if isinstance(call, _Job):
                self._do(call)
            elif isinstance(call, _Texts):
                self._arriving.append(call)

    def _do(self, job: _Job) -> None:
        try:
            job.done.put((job.run(partial(self._tick, job)), None))
        except BaseException as error:  # handed to the one who waits
            job.done.put((None, self._named(error)))

    def _tick(self, job: _Job) -> None:
        self._last = time.monotonic()
        if job.abandoned.is_set():
            raise EngineError(f"the {self.name} was interrupted")

    def _add_some(self) -> None:
        """Add requests of the callers in turn, and not so many that those that are written have to wait for long."""
        for _ in range(_ADDED_AT_ONCE):
            if not self._arriving:
                return
            texts = self._arriving.popleft()
            if self._add(texts, *texts.left.popleft()) and texts.left:
                self._arriving.append(texts)

    def _add(self, texts: _Texts, index: int, request: Any) -> bool:
        """Add a request; returns whether its caller still waits for all of theirs."""
        name = next(self._names)
        try:
            self._running.add(name, request)
        except RequestRefusedError as error:
            self._take_out([other for other, (owner, _) in self._waiting.items() if owner is texts])
            texts.done.put((None, RequestRefusedError(f"the {self.name} refuses request {index}: {error}")))
            return False
        except BaseException as error:  # the engine is no more
            texts.done.put((None, self._named(error)))
            self._fail_all(self._named(error))
            return False
        self._waiting[name] = (texts, index)
        self._last = time.monotonic()
        return True

    @property
    def _running(self) -> Batch:
        if self.batch is None:
            raise EngineError(f"the {self.name} has no batch: it did not start, or was closed")
        return self.batch

    def _step(self) -> None:
        try:
            for name, text in self._running.step():
                if (found := self._waiting.pop(name, None)) is not None:
                    texts, index = found
                    texts.put(index, text)
        except BaseException as error:
            self._fail_all(self._named(error))
        self._last = time.monotonic()

    def _drop_abandoned(self) -> None:
        self._arriving = deque(texts for texts in self._arriving if not texts.abandoned.is_set())
        self._take_out([name for name, (texts, _) in self._waiting.items() if texts.abandoned.is_set()])

    def _take_out(self, names: list[str]) -> None:
        for name in names:
            self._waiting.pop(name, None)
        if names:
            with contextlib.suppress(Exception):  # an engine that cannot is noticed at its next step
                self._running.abort(names)

    def _fail_all(self, error: BaseException) -> None:
        for texts in {*self._arriving, *(texts for texts, _ in self._waiting.values())}:
            texts.done.put((None, error))
        self._arriving.clear()
        self._waiting.clear()

    def _named(self, error: BaseException) -> EngineError:
        if isinstance(error, EngineError):
            return error
        message = f"{type(error).__name__}: {first_line(error)}"
        self.give_up(self.broken or message)
        return EngineError(f"the {self.name} died: {self.broken}")


def _likewise(error: BaseException) -> EngineError:
    """Return another of the kind, so that callers who share one do not share its traceback."""
    return RequestRefusedError(str(error)) if isinstance(error, RequestRefusedError) else EngineError(str(error))


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says."""
    return str(error).strip().partition("\n")[0]
