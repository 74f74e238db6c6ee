"""Processes of one run: what the first has found, told to all, and the end of one of several."""

from __future__ import annotations

import sys
import time
from typing import Any

_SETTLE_SECONDS = 0.2


def in_process_group() -> bool:
    """Return whether torch's default process group is open."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def leave_process_group() -> None:
    """Close torch's default process group, if one is open, and let its threads finish; for the end of a command.

    A thread of gloo takes Python's lock to let go of the last collective. Where the interpreter is going down by then,
    the thread is ended instead, and with it the process: "terminate called without an active exception", exit code 134
    after all work is done (seen at one exit in eight of a bare DDP process under torch 2.13). Sleeping gives it the
    lock.
    """
    if not in_process_group():
        return
    sys.modules["torch.distributed"].destroy_process_group()
    time.sleep(_SETTLE_SECONDS)


def of_first(found: Any) -> Any:
    """Return what the first process found, on every process; called by all of them.

    Without a process group the answer is the process's own, and accelerate is not needed.
    """
    if not in_process_group():
        return found
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([found])[0]


def of_all(found: Any) -> list[Any]:
    """Return what every process found, in the order of their ranks, on every process; called by all of them."""
    if not in_process_group():
        return [found]
    from accelerate.utils import gather_object

    gathered: list[Any] = gather_object([found])
    return gathered
