"""The list of a checkpoint's files with their sizes and SHA-256, and what its run must have in common with the next.

manifest.json is written last, when every other file is there, and carries a digest of itself: no byte of a checkpoint
can change unseen, the recorded budget included.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vgf_llm.errors import CheckpointError, ConfigError
from vgf_llm.runs.files import write_json_atomic

MANIFEST_NAME = "manifest.json"
FORMAT = 1


@dataclass(frozen=True)
class Manifest:
    """What a published checkpoint says of itself.

    Args:
        step: optimiser steps done (>= 0).
        identity: what must not change silently between the run that wrote it and the one that resumes.
        files: size in bytes and SHA-256 (hex) of every file, by path relative to the folder.
    """

    step: int
    identity: dict[str, Any]
    files: dict[str, tuple[int, str]]


def write(folder: Path, step: int, identity: dict[str, Any]) -> None:
    """Write the manifest over everything that lies in a folder, subfolders included.

    Args:
        folder: holds all files of the checkpoint.
        step: optimiser steps done (>= 0).
        identity: JSON-like; what must not change silently on resume.

    Raises:
        OSError, OutputError: a file cannot be read or the manifest not written.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST_NAME)
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": _sha256(path)} for path in paths
    }
    content = {"format": FORMAT, "step": step, "identity": identity, "files": files}
    write_json_atomic(folder / MANIFEST_NAME, content | {"sha256": _own_digest(content)})


def verify(folder: str | Path) -> Manifest:
    """Check every file of a checkpoint against its manifest; files that the manifest does not list are ignored.

    Args:
        folder: a published checkpoint.

    Returns:
        The manifest.

    Raises:
        CheckpointError: names the first file that is missing, cut or changed, or says that there is no manifest.
    """
    folder = Path(folder)
    manifest = _read(folder)
    for name, (size, digest) in manifest.files.items():
        path = folder / name
        try:
            actual = path.stat().st_size
            same = actual == size and _sha256(path) == digest
        except FileNotFoundError:
            raise CheckpointError(f"checkpoint '{folder}': {name} is missing; use another checkpoint") from None
        except OSError as error:
            raise CheckpointError(
                f"checkpoint '{folder}': {name} cannot be read ({error.strerror or error})"
            ) from error
        if not same:
            if actual == size:
                fault = "SHA-256 differs from the manifest's: its content was changed"
            else:
                fault = f"size {actual} instead of {size} bytes: {'truncated' if actual < size else 'changed'}"
            raise CheckpointError(f"checkpoint '{folder}': {name}: {fault}; use another checkpoint")
    return manifest


def check_identity(
    manifest: Manifest, identity: dict[str, Any], allow: Collection[str] = (), free: Collection[str] = ()
) -> list[str]:
    """Refuse to resume a run whose identity changed, unless each change is allowed by name.

    Args:
        manifest: of the checkpoint to resume from.
        identity: of the run that resumes, same form as given to ``publish``.
        allow: names that may change: a leaf's dotted key (``budget.nats``) or any parent of it (``budget``).
        free: dotted keys that need no permission.

    Returns:
        One line for each change that was allowed (``budget.nats 2.0 -> 4.0``), to be logged.

    Raises:
        ConfigError: a key changed that is not allowed (all are named with both values), or a name in allow is no key.
    """
    old, new = _leaves(manifest.identity), _leaves(json.loads(json.dumps(identity)))
    keys = sorted(old.keys() | new.keys())
    known = {".".join(key.split(".")[: depth + 1]) for key in keys for depth in range(key.count(".") + 1)}
    for name in allow:
        if name not in known:
            raise ConfigError(f"allow_changes: no key '{name}'; choose from {', '.join(sorted(known))}")
    allowed: list[str] = []
    refused: dict[str, str] = {}
    for key in keys:
        before, after = old.get(key, "(absent)"), new.get(key, "(absent)")
        if before == after or (
            before == "(absent)" and after in ({}, [], "", None)
        ):  # a setting newer than the checkpoint
            continue
        change = f"{key} {before} -> {after}"
        if key in free or any(key == name or key.startswith(f"{name}.") for name in allow):
            allowed.append(change)
        else:
            refused[key] = change
    if refused:
        raise ConfigError(
            f"the checkpoint at step {manifest.step} belongs to another run: {'; '.join(refused.values())}; set them "
            f"back, or allow the change with --allow_changes '{json.dumps(list(refused))}'"
        )
    return allowed


def _read(folder: Path) -> Manifest:
    path = folder / MANIFEST_NAME
    try:
        content = json.loads(path.read_bytes())
        digest = content.pop("sha256")
        intact = digest == _own_digest(content)
        if intact and content["format"] == FORMAT:
            files = {name: (record["size"], record["sha256"]) for name, record in content["files"].items()}
            return Manifest(content["step"], content["identity"], files)
    except FileNotFoundError:
        what = "half-written or not by vgf_llm" if folder.is_dir() else "there is no such folder"
        raise CheckpointError(f"checkpoint '{folder}' has no {MANIFEST_NAME}: {what}; use another checkpoint") from None
    except OSError as error:
        raise CheckpointError(f"checkpoint '{folder}': {MANIFEST_NAME} cannot be read ({error})") from error
    except (ValueError, KeyError, TypeError, AttributeError):
        intact = False
    if intact:
        raise CheckpointError(
            f"checkpoint '{folder}': {MANIFEST_NAME} has format {content['format']}, this version reads {FORMAT}; "
            "resume with the version that wrote it"
        )
    raise CheckpointError(f"checkpoint '{folder}': {MANIFEST_NAME} was changed or cut; use another checkpoint")


def _own_digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested dictionaries to dotted keys; an empty one is a leaf."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree} if prefix else {}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    return flat
