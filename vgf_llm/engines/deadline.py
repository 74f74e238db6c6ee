"""How long somebody waits for an answer, and whether they still do: what work on it looks at from time to time."""

from __future__ import annotations

import math
import threading
import time

from vgf_llm.errors import VGFError


class AbandonedError(VGFError):
    """Nobody waits for this any more: the caller has left."""


class DeadlineError(VGFError):
    """It took longer than it may."""


class Deadline:
    """The patience of one caller; safe to use from several threads.

    Args:
        seconds: How long the caller waits from now on, above 0; for ever by default.
    """

    def __init__(self, seconds: float = math.inf) -> None:
        self.seconds = seconds
        self._until = time.monotonic() + seconds
        self._left = threading.Event()

    @property
    def left_sec(self) -> float:
        """Seconds until the time is up, at least 0."""
        return max(self._until - time.monotonic(), 0.0)

    def abandon(self) -> None:
        """Say that the caller has left."""
        self._left.set()

    def check(self) -> None:
        """Do nothing while the caller waits.

        Raises:
            AbandonedError: If they have left.
            DeadlineError: If the time is up.
        """
        if self._left.is_set():
            raise AbandonedError("the caller has left")
        if self.left_sec <= 0:
            raise DeadlineError(f"no answer within {self.seconds:g} s")


OPEN = Deadline()
"""Of a caller who waits as long as it takes."""
