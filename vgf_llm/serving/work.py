"""From a question to its answer in the background: a place, a thread, and an end where nobody waits any more."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor

from vgf_llm.sampling.deadline import AbandonedError, Deadline
from vgf_llm.serving.admission import Admission, Place
from vgf_llm.serving.metrics import Metrics
from vgf_llm.serving.question import Question
from vgf_llm.serving.service import Answer, Service

_LOOK_SEC = 0.1


class Worker:
    """Works on a bounded number of questions at once.

    Args:
        service: Answers.
        running: Questions that are worked on at once.
        waiting: Questions that may wait.
        metrics: Told of every answer.
    """

    def __init__(self, service: Service, running: int, waiting: int, metrics: Metrics) -> None:
        self.service, self.metrics = service, metrics
        self.admission = Admission(running, waiting)
        metrics.watch(self.admission)
        self._threads = ThreadPoolExecutor(running, thread_name_prefix="answering")
        self._deadlines: dict[asyncio.Task[Answer], Deadline] = {}

    def start(self, question: Question, deadline: Deadline) -> asyncio.Task[Answer]:
        """Begin with a question and return its task, which is abandoned by its deadline and never cancelled.

        Raises:
            RequestError: 429, where there is no place.
        """
        # The place is given back by the task alone, so nothing may come between the two.
        task = asyncio.create_task(self._work(self.admission.enter(deadline), question, deadline))
        self._deadlines[task] = deadline
        task.add_done_callback(self._ended)
        return task

    def close(self) -> None:
        """Abandon everything that is worked on."""
        for deadline in self._deadlines.values():
            deadline.abandon()
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _work(self, place: Place, question: Question, deadline: Deadline) -> Answer:
        async with place as waited_sec:
            loop = asyncio.get_running_loop()
            answer = await loop.run_in_executor(self._threads, self.service.answer, question, deadline, waited_sec)
        self.metrics.answered(answer)
        return answer

    def _ended(self, task: asyncio.Task[Answer]) -> None:
        del self._deadlines[task]
        if not task.cancelled():
            task.exception()  # looked at, so that an error that nobody waits for is no warning


async def until_done(
    task: asyncio.Task[Answer],
    deadline: Deadline,
    has_left: Callable[[], Awaitable[bool]],
    most_sec: float | None = None,
) -> bool:
    """Wait for a task and watch whether its caller is still there; returns whether it is done.

    Args:
        task: From :meth:`Worker.start`.
        deadline: Its own; abandoned where the caller has left.
        has_left: Asks the connection.
        most_sec: Longest wait.

    Raises:
        AbandonedError: If the caller has left.
    """
    until = None if most_sec is None else asyncio.get_running_loop().time() + most_sec
    while not task.done():
        await asyncio.wait({task}, timeout=_LOOK_SEC)
        if not task.done() and await has_left():
            deadline.abandon()
            raise AbandonedError("the caller has left")
        if until is not None and asyncio.get_running_loop().time() >= until:
            break
    return task.done()
