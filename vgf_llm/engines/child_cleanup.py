"""Processes that must not outlive this one, however it ends: not after SIGTERM, not after SIGKILL.

A shell of a session of its own waits at a pipe whose other end this process holds. Where the pipe closes without a
word, which is what the kernel does for a process that is gone, the shell kills what it was given.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Sequence

_SHELL = 'read -r word || kill -9 "$@"'


class ChildCleanup:
    """Kills processes when this one is gone.

    Args:
        pids: Their ids; without any, nothing is done.
    """

    def __init__(self, pids: Sequence[int]) -> None:
        self._shell: subprocess.Popen[bytes] | None = None
        if pids:
            self._shell = subprocess.Popen(
                ["sh", "-c", _SHELL, "cleanup", *map(str, pids)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )

    def dismiss(self) -> None:
        """Let the processes be: they have ended, or may stay."""
        if self._shell is not None:
            shell, self._shell = self._shell, None
            with contextlib.suppress(BrokenPipeError):
                shell.communicate(b"done\n")
