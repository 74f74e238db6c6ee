"""``vgf-llm serve`` as a process of its own, for benchmarks and tests: started, watched, and told to end."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from vgf_llm.engines.vllm_env import ERRORS_ALONE, IN_OWN_PROCESS

_ENVIRONMENT = {**ERRORS_ALONE, **IN_OWN_PROCESS}  # whose memory is read beside the server's
_ROOT = Path(__file__).parents[1]
_START_SEC, _END_SEC = 600, 60
_LISTENS = r"at (http://\S+)/v1"


@dataclass
class ServerProcess:
    """A running server.

    Attributes:
        process: Of the command.
        said: Lines that it wrote to standard error so far.
        url: Where it listens.
    """

    process: subprocess.Popen[str]
    said: list[str] = field(default_factory=list)
    url: str = ""

    def wait_for(self, pattern: str, seconds: float = _START_SEC) -> re.Match[str]:
        """Wait until it has said something.

        Raises:
            RuntimeError: If it ended before, or did not say it in time; with the last of what it said.
        """
        until = time.monotonic() + seconds
        while (found := re.search(pattern, "".join(self.said))) is None:
            if self.process.poll() is not None or time.monotonic() > until:
                end = "".join(self.said)[-3000:]
                raise RuntimeError(f"the server did not say {pattern!r} (exit code {self.process.returncode}):\n{end}")
            time.sleep(0.1)
        return found

    def family(self) -> list[psutil.Process]:
        """Return the processes that it started, the engine's among them."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def engine(self) -> psutil.Process:
        """Return the process that holds the engine."""
        (engine,) = [one for one in self.family() if "EngineCore" in " ".join(one.cmdline())]
        return engine


@contextmanager
def served(flags: Sequence[str], environment: dict[str, str] | None = None) -> Iterator[ServerProcess]:
    """Run the command on a free port; yields once it listens, and ends it afterwards.

    Raises:
        RuntimeError: If it does not start.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "vgf_llm.cli", "serve", "--port", "0", *flags],
        env={**os.environ, **_ENVIRONMENT, "PYTHONPATH": str(_ROOT), **(environment or {})},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    server = ServerProcess(process)
    threading.Thread(target=lambda: server.said.extend(process.stderr), daemon=True).start()
    try:
        server.url = server.wait_for(_LISTENS).group(1)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(_END_SEC)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
