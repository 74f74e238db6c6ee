"""From a question to its answer in the background: a place, a thread, and an end where nobody waits any more."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from vgf_llm.engines.deadline import AbandonedError, Deadline
from vgf_llm.serving.admission import Admission, Place
from vgf_llm.serving.metrics import Metrics
from vgf_llm.serving.request import AnswerRequest
from vgf_llm.serving.service import Answer, Service

_LOOK_SEC = 0.1
_LAST_LOOK_SEC = 0.3  # after the end of the time: most jobs notice it themselves and free their place


class RequestDeadline(Deadline):
    """A request's patience, counted from its arrival; what its body says of it is known later."""

    def limit(self, seconds: float) -> None:
        """Set how long the caller waits in all."""
        self._until += seconds - self.seconds
        self.seconds = seconds


@dataclass(frozen=True)
class Job:
    """A question that is worked on.

    Attributes:
        task: Ends in the answer; it is abandoned by its deadline and never cancelled.
        begun: Done once the question has its place and its prompt is found good, or the task has ended.
        deadline: The caller's patience.
    """

    task: asyncio.Task[Answer]
    begun: asyncio.Future[None]
    deadline: Deadline


class Worker:
    """Works on a bounded number of questions at once.

    Args:
        service: Answers.
        running: RequestReader that are worked on at once.
        waiting: RequestReader that may wait.
        metrics: Told of every answer.
    """

    def __init__(self, service: Service, running: int, waiting: int, metrics: Metrics) -> None:
        self.service, self.metrics = service, metrics
        self.admission = Admission(running, waiting)
        metrics.watch(self.admission)
        self._threads = ThreadPoolExecutor(running, thread_name_prefix="answering")
        self._deadlines: dict[asyncio.Task[Answer], Deadline] = {}

    def start(self, question: AnswerRequest, deadline: Deadline) -> Job:
        """Begin with a question whose prompt is not encoded yet.

        Raises:
            RequestError: 429, where there is no place.
        """
        begun = asyncio.get_running_loop().create_future()
        # The place is given back by the task alone, so nothing may come between the two.
        task = asyncio.create_task(self._work(self.admission.enter(deadline), question, deadline, begun))
        self._deadlines[task] = deadline
        task.add_done_callback(self._ended)
        task.add_done_callback(lambda _: None if begun.done() else begun.set_result(None))
        return Job(task, begun, deadline)

    def close(self) -> None:
        """Abandon everything that is worked on."""
        for deadline in self._deadlines.values():
            deadline.abandon()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _work(
        self, place: Place, question: AnswerRequest, deadline: Deadline, begun: asyncio.Future[None]
    ) -> Answer:
        async with place as waited_sec:
            in_thread, service = asyncio.get_running_loop().run_in_executor, self.service
            question = await in_thread(self._threads, service.encoded, question, deadline)
            begun.set_result(None)
            answer = await in_thread(self._threads, service.answer, question, deadline, waited_sec)
        self.metrics.answered(answer)
        return answer

    def _ended(self, task: asyncio.Task[Answer]) -> None:
        del self._deadlines[task]
        if not task.cancelled():
            task.exception()  # looked at, so that an error that nobody waits for is no warning


async def until_done(
    end: asyncio.Future[Any],
    deadline: Deadline,
    has_left: Callable[[], Awaitable[bool]],
    most_sec: float = math.inf,
) -> bool:
    """Wait for a part of a job and watch whether its caller is still there; returns whether it is done.

    Args:
        end: A future of :class:`Job`.
        deadline: Its own; abandoned where the caller has left.
        has_left: Asks the connection.
        most_sec: Longest wait.

    Raises:
        AbandonedError: If the caller has left.
        DeadlineError: If their time is up; the job winds down by itself and keeps its place until then.
    """
    until = time.monotonic() + most_sec
    while not end.done() and time.monotonic() < until:
        is_late = deadline.left_sec <= 0
        await asyncio.wait({end}, timeout=_LAST_LOOK_SEC if is_late else min(_LOOK_SEC, deadline.left_sec))
        if end.done():
            break
        if is_late:
            deadline.check()
        if await has_left():
            deadline.abandon()
            raise AbandonedError("the caller has left")
    return end.done()
