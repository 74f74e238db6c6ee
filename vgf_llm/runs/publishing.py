"""A checkpoint that all processes of a run write, published when the last of them is done.

    with published(output_dir, step, writes=rank == 0, wait=barrier, identity=lambda: ..., limit=2) as staging:
        ...                                     # every process writes below staging / checkpoint-<step>

transformers' Trainer writes into a subfolder of the name that it would have; it is lifted into the staging folder. The
names on disk, and what a kill leaves, are in checkpoint.py.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from vgf_llm.runs.checkpoint import publish, rotate, saving, staging_folder


def _restore_on_cpu(storage: Any, location: str) -> Any:
    """Processes of a CPU group call their device cpu:0, which torch.load does not know by itself."""
    return storage if location.startswith("cpu:") else None


torch.serialization.register_package(16, lambda storage: None, _restore_on_cpu)


@contextlib.contextmanager
def published(
    output_dir: str | Path,
    step: int,
    *,
    writes: bool,
    wait: Callable[[], None],
    identity: Callable[[], dict[str, Any]],
    limit: int | None,
    best: Callable[[], str | None] = lambda: None,
) -> Iterator[Path]:
    """Yield the staging folder of a checkpoint, and publish it when the block has ended on every process.

    Args:
        output_dir: Folder of the run.
        step: Optimiser steps done, at least 0.
        writes: Whether this process makes, publishes and deletes folders: true on one of them.
        wait: Barrier of all processes.
        identity: Returns what must not change silently on resume; asked where `writes` is true.
        limit: Checkpoints to keep, at least 1; None keeps all.
        best: Returns the name of a checkpoint that is kept whatever its age.

    Raises:
        OutputError: Something cannot be written; the staging folder is removed, earlier checkpoints stay.
    """
    output_dir = Path(output_dir)
    if writes:
        staging_folder(output_dir, step)
    wait()
    staging = output_dir / f".checkpoint-{step}.partial"
    with saving(staging):
        yield staging
    wait()
    if writes:
        with saving(staging):
            _lift(staging, staging / f"checkpoint-{step}")
        publish(staging, output_dir, step, identity())
        rotate(output_dir, limit, best())
    wait()


def _lift(target: Path, inner: Path) -> None:
    """Move what the Trainer wrote into its own subfolder up into the staging folder."""
    for path in list(inner.iterdir()):
        os.rename(path, target / path.name)
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(inner)
