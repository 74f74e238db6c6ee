"""Keeps an engine running: notices within a second that it died, and starts another or gives up."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable

from vgf_llm.errors import VGFError
from vgf_llm.sampling.deadline import AbandonedError, Deadline
from vgf_llm.sampling.engine import Engine, EngineError
from vgf_llm.serving.errors import RequestError

_LOOK_SEC = 1.0
_TRIES = 3  # starts in a row that may fail


class EngineKeeper:
    """One engine, or none while another one starts.

    Args:
        engine: Runs already.
        start: Starts another one, once the first is closed, as long as somebody waits for it; None to give up instead.
        on_restart: Called when another one runs.
        on_end: Called once when there will be none any more.
    """

    def __init__(
        self,
        engine: Engine,
        start: Callable[[Deadline], Engine] | None,
        on_restart: Callable[[], None],
        on_end: Callable[[], None],
    ) -> None:
        self._engine: Engine | None = engine
        self._start, self._on_restart, self._on_end = start, on_restart, on_end
        self._reason = ""
        self._closing, self._patience = threading.Event(), Deadline()
        self._thread = threading.Thread(target=self._watch, name="engine keeper", daemon=True)
        self._thread.start()

    def engine(self) -> Engine:
        """Return the engine that is running.

        Raises:
            RequestError: 503 where there is none, with why and when to come again.
        """
        engine = self._engine
        if engine is None:
            again = "" if self._start is None else "; another one starts"
            raise RequestError(503, f"{self._reason}{again}", code="engine_unavailable", retry_sec=10)
        return engine

    @property
    def is_up(self) -> bool:
        """Whether an engine runs."""
        return self._engine is not None

    def close(self) -> None:
        """Watch no longer and close the engine; a start that is under way is broken off."""
        self._closing.set()
        self._patience.abandon()
        self._thread.join()
        if self._engine is not None:
            self._engine.close()
            self._engine, self._reason = None, "the server is stopping"

    def _watch(self) -> None:
        while not self._closing.wait(_LOOK_SEC):
            try:
                self._engine.check()
            except EngineError as error:
                dead, self._engine, self._reason = self._engine, None, str(error)
                print(f"vgf-llm serve: {error}", file=sys.stderr, flush=True)
                dead.close()
                if not self._another():
                    if not self._closing.is_set():
                        self._on_end()
                    return

    def _another(self) -> bool:
        """Start another engine; returns whether there is one."""
        for number in range(1, _TRIES + 1):
            if self._start is None or self._closing.is_set():
                return False
            try:
                self._engine = self._start(self._patience)
            except AbandonedError:
                return False
            except VGFError as error:
                print(f"vgf-llm serve: start {number} of {_TRIES} failed: {error}", file=sys.stderr, flush=True)
                continue
            print("vgf-llm serve: another engine runs", file=sys.stderr, flush=True)
            self._on_restart()
            return True
        return False
