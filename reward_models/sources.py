"""Reward models that lie elsewhere: a folder that points to the weights, and names on the hub.

`vgf-llm import-reward` writes imported.json beside a copy of the small files (configuration, tokenizer), and leaves the
weights where they are. It holds a mark of the source, so that a change there is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vgf_llm.errors import ModelError
from vgf_llm.runs.files import write_json_atomic

POINTER_NAME = "imported.json"
_OURS = "outputs"  # where recipes write to: a folder there was mistyped
_HUB_PART = re.compile(r"\w[\w.-]*")
_WANTED = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]


def is_hub_name(name: str) -> bool:
    """Return whether a name can be one of the hub: ``owner/model``, and no folder that was mistyped."""
    parts = name.split("/")
    allowed = all(_HUB_PART.fullmatch(part) for part in parts)
    return len(parts) == 2 and allowed and parts[0] != _OURS and not Path(parts[0]).exists()


def local_folder(name: str) -> str:
    """Return the folder of a reward model: the name itself, or that of transformers' cache for a name on the hub.

    Raises:
        ModelError: The hub has no such model or cannot be reached, and the cache does not hold it.
    """
    if Path(name).is_dir() or not is_hub_name(name):
        return name
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return str(snapshot_download(name, allow_patterns=_WANTED, etag_timeout=5))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, httpx.HTTPError, OSError) as error:
        raise ModelError(
            f"reward model {name!r} is not a folder, not in the cache of the hub, and cannot be downloaded "
            f"({type(error).__name__}: the hub is out of reach or has no such model); give a folder, or download it "
            f"where the hub can be reached: hf download {name}"
        ) from error


def shown_name(folder: str | Path) -> str:
    """Return what a reward model is called in logs, cards and metrics: one of the hub's cache by its name there."""
    parts = Path(folder).parts
    if len(parts) < 3 or parts[-2] != "snapshots" or not parts[-3].startswith("models--"):
        return str(folder)
    return parts[-3].removeprefix("models--").replace("--", "/")


def write_pointer(folder: Path, source: str, outputs: Mapping[str, float]) -> None:
    """Write imported.json, which names the source of the weights and its mark."""
    write_json_atomic(folder / POINTER_NAME, {"source": source, "mark": _mark(source), "outputs": dict(outputs)})


def _mark(source: str) -> str:
    """Return the mark of a folder, and of an adapter's base where that is a folder."""
    from vgf_llm.runs.provenance import folder_mark

    try:
        named = json.loads((Path(source) / "adapter_config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        named = {}
    return ":".join(filter(None, (folder_mark(source), folder_mark(str(named.get("base_model_name_or_path"))))))


def _pointer(folder: str | Path) -> dict[str, Any]:
    path = Path(folder) / POINTER_NAME
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        str(found["source"]), found["mark"], dict(found["outputs"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"'{path}' cannot be read ({error!r}); import the model again") from error
    return dict(found)


def weights_folder(folder: str | Path) -> Path:
    """Return the folder that holds a reward model's weights: the source of an imported one, else the folder itself.

    Raises:
        ModelError: The source is gone, or is not what was imported.
    """
    pointer = _pointer(folder)
    if not pointer:
        return Path(folder)
    source = Path(pointer["source"])
    if not source.is_dir():
        raise ModelError(
            f"'{folder}' was imported from '{source}', which is gone; put it back, or run `vgf-llm import-reward` again"
        )
    if _mark(str(source)) != pointer["mark"]:
        raise ModelError(
            f"'{folder}' was imported from '{source}', which has changed since; its card and secant head are of "
            "another model: run `vgf-llm import-reward` again"
        )
    return source


def imported_outputs(folder: str | Path) -> dict[str, float]:
    """Return the weights of a classifier's outputs that were given when it was imported; empty where none were."""
    return {str(name): float(weight) for name, weight in _pointer(folder).get("outputs", {}).items()}
