"""Checkpoints that are whole or absent: staged, listed in a manifest, renamed, and checked before they are used.

All ranks write into a hidden staging folder. When every one of them is done (the caller's barrier), rank 0 publishes
it: each file's size and SHA-256 go into manifest.json, everything is forced to disk, and one rename makes it
``checkpoint-<step>``. A kill at any moment therefore leaves a hidden folder, which nothing reads, beside checkpoints
that are whole; a file that was cut or changed later is found before training goes on from it (manifest.py).

Names in output_dir:

    checkpoint-<step>             published
    .checkpoint-<step>.partial    being written
    .checkpoint-<step>.replaced   what checkpoint-<step> was, while a re-save of the same step takes its place
    .checkpoint-<step>.superseded set aside when the run went on from an earlier one; deleted once it has come as far
    .checkpoint-<step>.trash      being deleted
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from vgf_llm.console.screen import say
from vgf_llm.errors import CheckpointError, ConfigError, OutputError
from vgf_llm.runs.files import fsync
from vgf_llm.runs.manifest import MANIFEST_NAME, verify
from vgf_llm.runs.manifest import write as write_manifest

# How libraries word a failed write that is not an OSError: torch.save on a full disk says only that its position in
# the file is not where it should be; distributed checkpoints carry the traceback of the rank as text.
_WRITE_FAILURES = ("unexpected pos", "iostream error", "PytorchStreamWriter failed")


def staging_folder(output_dir: str | Path, step: int) -> Path:
    """Make the empty folder that a checkpoint is written into, and clear away what killed saves left behind.

    Called on one rank, before the others write.

    Args:
        output_dir: folder of the run; created if missing.
        step: optimiser steps done (>= 0).

    Returns:
        ``<output_dir>/.checkpoint-<step>.partial``, empty.

    Raises:
        OutputError: it cannot be created.
    """
    output_dir = Path(output_dir)
    staging = output_dir / f".checkpoint-{step}.partial"
    with saving(staging):
        output_dir.mkdir(parents=True, exist_ok=True)
        _restore_replaced(output_dir)
        for ending in ("partial", "replaced", "trash"):
            for remains in _hidden(output_dir, ending):
                shutil.rmtree(remains)
        staging.mkdir()
    return staging


@contextlib.contextmanager
def saving(staging: str | Path) -> Iterator[None]:
    """Turn a failed write inside the block into one OutputError, and remove the staging folder.

    It recognises OSError, safetensors' error and the RuntimeErrors that torch raises on a full disk; everything else
    passes unchanged. Earlier checkpoints are not touched. Every rank wraps its own writes; the first one to fail ends
    the run.

    Args:
        staging: folder that is being written.

    Raises:
        OutputError: something could not be written; names the folder, the reason and what to do.
    """
    staging = Path(staging)
    advice = (
        "earlier checkpoints are untouched: free some space (or keep fewer with --save_total_limit) and resume from "
        "the last one"
    )
    try:
        with writing(f"checkpoint '{staging}'", staging.parent, advice):
            yield
    except OutputError:
        shutil.rmtree(staging, ignore_errors=True)
        raise


@contextlib.contextmanager
def writing(what: str, folder: Path, advice: str) -> Iterator[None]:
    """Turn a failed write inside the block into one OutputError; what was written so far stays.

    Args:
        what: is written, for the message.
        folder: where; its free space is named.
        advice: what to do.

    Raises:
        OutputError: something could not be written.
    """
    try:
        yield
    except BaseException as error:  # a distributed checkpoint's error is no Exception
        reason = _write_failure(error)
        if reason is None:
            raise
        raise OutputError(f"{what} cannot be written: {reason}{_free_space(folder)}; {advice}") from error


def publish(staging: str | Path, output_dir: str | Path, step: int, identity: dict[str, Any]) -> Path:
    """Turn a fully written staging folder into ``checkpoint-<step>``: manifest, fsync, one rename.

    Called on one rank, after all ranks have written (a barrier of the caller's). A checkpoint of the same step steps
    aside first and is put back by the next ``staging_folder`` or ``newest_whole`` if a kill comes between the two.

    Args:
        staging: folder of ``staging_folder``, on the same filesystem as output_dir.
        output_dir: folder of the run.
        step: optimiser steps done (>= 0).
        identity: JSON-like; what must not change silently on resume.

    Returns:
        ``<output_dir>/checkpoint-<step>``.

    Raises:
        OutputError: the disk refuses; the staging folder is removed, earlier checkpoints stay.
    """
    staging, output_dir = Path(staging), Path(output_dir)
    target, aside = output_dir / f"checkpoint-{step}", output_dir / f".checkpoint-{step}.replaced"
    with saving(staging):
        write_manifest(staging, step, identity)
        for path in [*staging.rglob("*"), staging]:
            fsync(path)
        if target.exists():
            os.rename(target, aside)
        try:
            os.rename(staging, target)
        except OSError:
            _restore_replaced(output_dir)
            raise
        fsync(output_dir)
        if aside.exists():
            shutil.rmtree(aside)
        for remains in _hidden(output_dir, "superseded"):
            if _step(remains) <= step:
                shutil.rmtree(remains)
    return target


def beyond(output_dir: str | Path, step: int) -> list[Path]:
    """Return the checkpoints of later steps than one, oldest first; ``rotate`` would take them for the newest."""
    return [folder for folder in published(output_dir) if _step(folder) > step]


def supersede(folders: list[Path]) -> None:
    """Set checkpoints aside that a run leaves behind by going on from an earlier one; called on one rank.

    They become ``.checkpoint-<step>.superseded`` and are deleted when the run publishes a checkpoint as late.

    Raises:
        OutputError: one of them cannot be renamed.
    """
    for folder in folders:
        aside = folder.parent / f".{folder.name}.superseded"
        try:
            if aside.exists():
                shutil.rmtree(aside)
            os.rename(folder, aside)
            fsync(folder.parent)
        except OSError as error:
            raise OutputError(
                f"checkpoint '{folder}' cannot be set aside ({error.strerror or error}); make '{folder.parent}' "
                "writable, or name another output_dir"
            ) from error


def newest_whole(output_dir: str | Path) -> Path | None:
    """Find the newest checkpoint that verifies; newer ones that do not are named on standard error and left alone.

    It reads every byte of what it checks: call it on one rank and hand the answer to the others.

    Args:
        output_dir: folder of the run; may be missing.

    Returns:
        The folder, or None where no checkpoint is whole.
    """
    output_dir = Path(output_dir)
    _restore_replaced(output_dir)
    for folder in reversed(published(output_dir)):
        try:
            verify(folder)
        except CheckpointError as error:
            say(f"{folder.name} is skipped: {error}")
        else:
            return folder
    return None


def rotate(output_dir: str | Path, limit: int | None, spare: str | None = None) -> list[Path]:
    """Delete the oldest published checkpoints beyond a limit, after the newer one is published.

    A folder without a manifest was not published here and is left alone. Where none of the kept ones verifies, the
    newest older one that does is kept as well. Each is renamed before it is deleted, so that a kill in between leaves
    nothing that looks whole. Costs one reading of the newest checkpoint.

    Args:
        output_dir: folder of the run.
        limit: checkpoints to keep (>= 1); None keeps all.
        spare: name of one that is kept whatever its age, as one of ``limit`` where that is above 1.

    Returns:
        The checkpoints that were deleted, oldest first.

    Raises:
        ConfigError: limit is below 1.
        OutputError: one of them cannot be deleted.
    """
    if limit is None:
        return []
    if limit < 1:
        raise ConfigError(f"save_total_limit {limit} is not in range; at least 1, or null to keep all")
    output_dir = Path(output_dir)
    ours = [folder for folder in published(output_dir) if (folder / MANIFEST_NAME).exists()]
    spared_old = any(folder.name == spare for folder in ours[:-limit])
    room = limit - 1 if spared_old and limit > 1 else limit
    doomed, kept = [folder for folder in ours[:-room] if folder.name != spare], ours[-room:]
    if doomed and not any(_is_whole(folder) for folder in reversed(kept)):
        spared = next((folder for folder in reversed(doomed) if _is_whole(folder)), None)
        doomed = [folder for folder in doomed if folder != spared]
    for folder in doomed:
        trash = output_dir / f".{folder.name}.trash"
        try:
            if trash.exists():
                shutil.rmtree(trash)
            os.rename(folder, trash)
            fsync(output_dir)
            shutil.rmtree(trash)
        except OSError as error:
            raise OutputError(
                f"old checkpoint '{folder}' cannot be deleted ({error.strerror or error}); make '{output_dir}' "
                "writable or set save_total_limit to null"
            ) from error
    return doomed


def _is_whole(folder: Path) -> bool:
    try:
        verify(folder)
    except CheckpointError:
        return False
    return True


def published(output_dir: str | Path) -> list[Path]:
    """Return the folders named checkpoint-<step>, oldest first; they are not looked into."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted((path for path in found if path.is_dir()), key=_step)


def _step(folder: Path) -> int:
    """Return the step in a name of the list above."""
    return int(folder.name.strip(".").split(".")[0].removeprefix("checkpoint-"))


def _hidden(output_dir: Path, ending: str) -> list[Path]:
    """Folders named .checkpoint-<step>.<ending>."""
    found = output_dir.glob(f".checkpoint-*.{ending}")
    return [path for path in found if path.is_dir() and re.fullmatch(r"\.checkpoint-\d+\.\w+", path.name)]


def _restore_replaced(output_dir: Path) -> None:
    """Put back a checkpoint that stepped aside for a re-save that was never published."""
    for aside in _hidden(output_dir, "replaced"):
        target = output_dir / aside.name.removeprefix(".").removesuffix(".replaced")
        if not target.exists():
            with contextlib.suppress(FileNotFoundError):  # another rank was faster
                os.rename(aside, target)


def _write_failure(error: BaseException) -> str | None:
    """Say why a write failed, or None where the error is another one."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OutputError):
            return str(cause)
        if isinstance(cause, OSError):
            return cause.strerror or str(cause)
        cause = cause.__cause__
    if isinstance(error, (KeyboardInterrupt, SystemExit)):
        return None
    text = str(error)
    for code in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO, errno.EROFS):
        if os.strerror(code) in text:
            return os.strerror(code)
    if isinstance(error, SafetensorError) or any(words in text for words in _WRITE_FAILURES):
        return f"a file was not written whole ({text.splitlines()[0]})"
    return None


def _free_space(folder: Path) -> str:
    try:
        return f" ({shutil.disk_usage(folder).free / 1e9:.2f} GB are free there)"
    except OSError:
        return ""
