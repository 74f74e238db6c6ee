"""Keeps an engine running: notices within a second that it died, and starts another or gives up."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable

from vgf_llm.console.screen import people, say
from vgf_llm.engines.deadline import AbandonedError, Deadline
from vgf_llm.engines.engine import Engine
from vgf_llm.errors import VGFError
from vgf_llm.serving.errors import RequestError

_LOOK_SEC = 1.0
_TRIES = 3  # starts that may fail, or end in an engine that dies again, before it has been well for a while
_HEALTHY_SEC = 300.0
_PAUSE_SEC, _LONGEST_PAUSE_SEC = 1.0, 60.0  # before the second start, and before any


class EngineSupervisor:
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
        self._tries, self._since = 0, time.monotonic()
        self._closing, self._patience = threading.Event(), Deadline()
        self._thread = threading.Thread(target=self._watch, name="engine supervisor", daemon=True)
        self._thread.start()

    def engine(self) -> Engine:
        """Return the engine that is running.

        Raises:
            RequestError: 503 where there is none, with when to come again.
        """
        engine = self._engine
        if engine is None:
            said = "the server is stopping" if self._closing.is_set() else "the engine died"
            again = "" if self._start is None or self._closing.is_set() else "; another one starts"
            raise RequestError(503, f"{said}{again}", code="engine_unavailable", retry_sec=10)
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
        self._drop()

    def _watch(self) -> None:
        try:
            self._keep()
        except Exception as error:  # ours to mend: a server without anybody who watches must not go on
            traceback.print_exception(error, file=people())
        finally:
            if not self._closing.is_set():
                self._drop()
                self._on_end()

    def _keep(self) -> None:
        """Return once there is no engine any more and there will be none."""
        while not self._closing.wait(_LOOK_SEC):
            if time.monotonic() - self._since > _HEALTHY_SEC:
                self._tries = 0
            try:
                self.engine().check()
            except Exception as error:
                _say("the engine died", error)
                self._drop()
                if not self._another():
                    return

    def _drop(self) -> None:
        dead, self._engine = self._engine, None
        if dead is not None:
            try:
                dead.close()
            except Exception as error:
                _say("the engine did not close", error)

    def _another(self) -> bool:
        """Start another engine; returns whether there is one."""
        while self._start is not None and self._tries < _TRIES:
            pause_sec = 0.0 if self._tries == 0 else min(_PAUSE_SEC * 2 ** (self._tries - 1), _LONGEST_PAUSE_SEC)
            if self._closing.wait(pause_sec):
                return False
            self._tries += 1
            try:
                self._engine = self._start(self._patience)
            except AbandonedError:
                return False
            except Exception as error:
                _say(f"start {self._tries} of {_TRIES} failed", error)
                continue
            self._since = time.monotonic()
            say("vgf-llm serve: another engine runs")
            self._on_restart()
            return True
        return False


def _say(what: str, error: Exception) -> None:
    say(f"vgf-llm serve: {what}: {error}")
    if not isinstance(error, VGFError):
        traceback.print_exception(error, file=people())
