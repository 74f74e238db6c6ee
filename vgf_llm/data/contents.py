"""Digests of what a run reads: a file that changed under a run is not the same run."""

from __future__ import annotations

import hashlib
from pathlib import Path

from vgf_llm.data.sources import local_files


def contents(prompts: str, reward_model: str | None, base_model: str | None = None) -> dict[str, str]:
    """Return the SHA-256 of the local files that decide every number: prompts, reward model and base model."""
    from vgf_llm.runs.provenance import folder_mark

    read = local_files(prompts, "train")
    files = [] if read is None else list(read.paths)
    if reward_model is not None:
        folder = Path(reward_model)
        files += sorted([*folder.glob("*.safetensors"), *folder.glob("imported.json")])
    found = {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.is_file()}
    base = None if base_model is None else folder_mark(base_model)
    return found if base is None else found | {str(base_model): base}


def scorer_contents(name: str) -> str:
    """Return a reward function's name, or the SHA-256 of a model folder's weights, configuration and pointer."""
    folder = Path(name)
    if not folder.is_dir():
        return name
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*config.json"), *folder.glob("imported.json")]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
