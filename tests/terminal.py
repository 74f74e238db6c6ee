"""Runs commands in processes whose standard streams are a pseudo-terminal, a file, or both.

    python -m tests.terminal < jobs.json

A job is {"command": module, "argv": [...], "terminal": ["out", "err"]}; streams that are not named go into files. The
model stack is imported once and every job runs in a fork of this process, so that a job costs what its work costs.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import json
import os
import pty
import struct
import sys
import tempfile
import termios
from typing import Any

_NOT_ASKED_FOR = ("deepspeed", "trl", "vllm")
_COLUMNS = 60  # narrower than any line of JSON


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """Run a job in a fork; returns its code, what each stream and the terminal got, and what was imported."""
    terminal, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, _COLUMNS, 0, 0))
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, tempfile.TemporaryFile() as report:
        child = os.fork()
        if child == 0:
            os.environ["TERM"] = "xterm-256color"
            for number, name, file in ((1, "out", out), (2, "err", err)):
                os.dup2(slave if name in job["terminal"] else file.fileno(), number)
            from vgf_llm.cli import run_main

            code = 1
            try:
                code = run_main(importlib.import_module(job["command"]).main, job["argv"])
            finally:
                with contextlib.suppress(OSError, ValueError):
                    sys.stdout.flush()
                os.write(report.fileno(), json.dumps([name for name in _NOT_ASKED_FOR if name in sys.modules]).encode())
                os._exit(code)
        os.close(slave)
        shown = _read(terminal)
        _, status = os.waitpid(child, 0)
        report.seek(0)
        imported = json.loads(report.read())
        found = {"imported": imported, "code": os.waitstatus_to_exitcode(status), "terminal": shown}
        for name, file in (("out", out), ("err", err)):
            file.seek(0)
            found[name] = file.read().decode()
    return found


def _read(terminal: int) -> str:
    """Return all that is written to a terminal until nobody has it open."""
    parts = []
    with contextlib.suppress(OSError):  # what Linux says when the last writer is gone
        while part := os.read(terminal, 65536):
            parts.append(part)
    os.close(terminal)
    return b"".join(parts).decode()


def main() -> None:
    """Read jobs from standard input and write what came of them."""
    import vgf_llm.evaluation.runner
    import vgf_llm.training.trainer  # noqa: F401

    json.dump([run_job(job) for job in json.load(sys.stdin)], sys.stdout)


if __name__ == "__main__":
    main()
