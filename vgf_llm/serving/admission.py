"""A bounded number of requests is worked on, a bounded number waits, and the next one is told when to come again."""

from __future__ import annotations

import asyncio
import math
import time

from vgf_llm.engines.deadline import Deadline
from vgf_llm.serving.errors import RequestError

_LOOK_SEC = 0.1
_LONGEST_RETRY_SEC = 60
_MEMORY = 0.2  # weight of the newest request in the mean that Retry-After is made of


class Admission:
    """Places for requests, first come first served; used from the event loop alone.

    Args:
        running: Requests that are worked on at once.
        waiting: Requests that may wait.
    """

    def __init__(self, running: int, waiting: int) -> None:
        self.most_running, self.most_waiting = running, waiting
        self.running = self.waiting = 0
        self._slots = asyncio.Semaphore(running)
        self._mean_sec = 1.0

    def enter(self, deadline: Deadline) -> Place:
        """Return a place to run or to wait; it must be used as a context.

        Raises:
            RequestError: 429 with Retry-After, where all are taken.
        """
        if self.running + self.waiting >= self.most_running + self.most_waiting:
            raise RequestError(
                429,
                f"{self.running} requests are worked on and {self.waiting} wait, which is all there is room for; "
                "come again later",
                code="queue_full",
                retry_sec=self.retry_sec,
            )
        self.waiting += 1
        return Place(self, deadline)

    @property
    def retry_sec(self) -> int:
        """Seconds until a place is likely to be free."""
        rounds = (self.waiting + 1) / self.most_running
        return max(1, min(math.ceil(rounds * self._mean_sec), _LONGEST_RETRY_SEC))

    def finished(self, seconds: float) -> None:
        """Note how long a request took."""
        self._mean_sec += _MEMORY * (seconds - self._mean_sec)


class Place:
    """A place of one request: ``async with place as waited_sec`` goes on once it may run.

    Raises:
        DeadlineError: If the time is up before.
        AbandonedError: If the caller has left before.
    """

    def __init__(self, admission: Admission, deadline: Deadline) -> None:
        self._admission, self._deadline = admission, deadline
        self._since = time.monotonic()

    async def __aenter__(self) -> float:
        slot = asyncio.ensure_future(self._admission._slots.acquire())
        try:
            while not slot.done():
                await asyncio.wait({slot}, timeout=_LOOK_SEC)
                self._deadline.check()
        except BaseException:
            if slot.done():
                self._admission._slots.release()
            slot.cancel()
            raise
        finally:
            self._admission.waiting -= 1
        self._admission.running += 1
        waited_sec, self._since = time.monotonic() - self._since, time.monotonic()
        return waited_sec

    async def __aexit__(self, *_: object) -> None:
        self._admission.running -= 1
        self._admission.finished(time.monotonic() - self._since)
        self._admission._slots.release()
