"""Several files and folders that take the place of others together: a kill leaves the old ones or the new ones.

New ones are written into a hidden folder and forced to disk; one rename makes it `.result`, which is the moment from
which the new ones hold. They are then moved to their places one by one; a folder in the way is first renamed into
`.result`, which is deleted at the end. A kill in between leaves `.result`, and whoever writes or reads the folder next
finishes the moves first (`settle`). For readers that know nothing of it, the file without which a folder does not load
is removed first and comes back last.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from vgf_llm.errors import OutputError
from vgf_llm.runs.files import fsync, write_json_atomic

_READY, _PARTIAL, _ORDER = ".result", ".result.partial", "order.json"
_LOCK, _ASIDE = "lock", ".old."
RESULT_NAMES = (
    "adapter_*",
    "model*.safetensors",
    "model.safetensors.index.json",
    "*config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "additional_chat_templates",
    "vgf_base.json",
    "README.md",
    "training_args.bin",
    "reward_statistics.json",
    "value",
    "direction",
)
"""Patterns of the files and folders that a checkpoint and the result of its run have in common."""


@contextlib.contextmanager
def replaced(folder: str | Path, last: str, stale: Callable[[Path], list[str]] = lambda folder: []) -> Iterator[Path]:
    """Yield an empty hidden folder; the files written there are in ``folder`` once the block has ended.

    Called on one process. An error inside the block leaves the folder as it was.

    Args:
        folder: Where the files go; created if missing.
        last: The file without which the folder does not load.
        stale: Given the folder, names files of the old result that have no place in the new one.

    Raises:
        OutputError: The folder refuses a rename or removal.
        FileNotFoundError: ``last`` was not written.
    """
    folder = Path(folder)
    settle(folder)
    partial = folder / _PARTIAL
    with _told(folder):
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
    try:
        yield partial
        names = sorted(path.name for path in partial.iterdir() if path.name != last)
        write_json_atomic(partial / _ORDER, {"names": [*names, last], "stale": stale(folder)})
        with _told(folder):
            for path in [*partial.rglob("*"), partial]:
                fsync(path)
            os.rename(partial, folder / _READY)
            fsync(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    settle(folder)


def copy_result(checkpoint: Path, target: Path) -> None:
    """Copy what a checkpoint and a result have in common (`RESULT_NAMES`) into an empty folder."""
    for path in sorted({path for pattern in RESULT_NAMES for path in checkpoint.glob(pattern)}):
        if path.is_dir():
            shutil.copytree(path, target / path.name)
        else:
            shutil.copy2(path, target / path.name)


def settle(folder: str | Path) -> None:
    """Finish what a kill has left of the moves; costs one look where there is nothing.

    Raises:
        OutputError: The folder refuses it.
    """
    folder = Path(folder)
    ready = folder / _READY
    if not ready.is_dir():
        return
    with _told(folder), _locked(ready):  # two at once would remove what the other has put in place
        try:
            order = json.loads((ready / _ORDER).read_bytes())
        except FileNotFoundError:  # killed while the empty folder was removed, or another process has done it
            order = {"names": [], "stale": []}
        for last in order["names"][-1:]:
            if (ready / last).exists():
                _move(ready, folder, order["names"], order["stale"])
        shutil.rmtree(ready, ignore_errors=True)
    with contextlib.suppress(OSError):  # NFS keeps an open lock under another name until it is closed
        ready.rmdir()


def settle_to_read(folder: str | Path) -> None:
    """Settle a folder that is about to be read, and the one it lies in: a value is a part of its run's result.

    Raises:
        OutputError: One of them refuses it.
    """
    for part in (Path(folder).parent, Path(folder)):
        settle(part)


def _move(ready: Path, folder: Path, names: list[str], stale: list[str]) -> None:
    """Move the files, the last one's old version gone before any other's."""
    for name in [names[-1], *(name for name in stale if name not in names)]:
        _clear(folder / name, ready)
    for name in names:
        source, target = ready / name, folder / name
        if source.exists():  # not moved before a kill
            if source.is_dir() or target.is_dir():
                _clear(target, ready)
            os.replace(source, target)
    fsync(folder)


def _clear(path: Path, ready: Path) -> None:
    """Remove a file; move a folder aside in one step, to be deleted with `.result`."""
    if path.is_dir() and not path.is_symlink():
        aside = ready / f"{_ASIDE}{path.name}"
        if aside.exists():
            shutil.rmtree(aside)
        os.rename(path, aside)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(ready: Path) -> Iterator[None]:
    """Keep other processes of this machine from settling the folder, where the file system can lock.

    A file opened for writing is locked, in the folder of the moves: NFS refuses to lock a folder. Where it cannot be
    opened or locked, as on a read-only mount or one without locks, nothing is.
    """
    with contextlib.ExitStack() as opened:
        while True:
            try:
                descriptor = os.open(ready / _LOCK, os.O_WRONLY | os.O_CREAT, 0o666)
            except OSError:
                break
            opened.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                if os.path.samestat(os.fstat(descriptor), os.stat(ready / _LOCK)):
                    break
            except OSError:  # no locks here, or another process has settled the folder meanwhile
                break
        yield


@contextlib.contextmanager
def _told(folder: Path) -> Iterator[None]:
    """Turn a refusal of the folder into an OutputError."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"the result in '{folder}' cannot be put in place ({error.strerror or error}); make the folder writable "
            "and make room, then run the command again: it finishes what is left"
        ) from error
