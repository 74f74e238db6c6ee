"""The output folder of a training: what an earlier run left in it goes before weights of a new run come.

A folder is read by what lies in it (an adapter_config.json makes it a LoRA, the card speaks for the weights), so that
remains of two runs would be taken for one model. config.json goes first and comes back last: without it the folder does
not load.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from reward_models.card import CARD_NAME
from vgf_llm.errors import OutputError

_WEIGHTS = ("adapter_*", "model*.safetensors", "model.safetensors.index.json")
LAST_NAME = "config.json"
"""Without it a folder does not load."""
_BESIDE = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "additional_chat_templates",
    CARD_NAME,
    "secant.json",
    "secant.safetensors",
    "directions",
)
_MODEL_TYPE = "vgf_reward"  # of RewardModelConfig
METRICS_NAME = "metrics.jsonl"


def check_is_ours(folder: str | Path) -> None:
    """Refuse an output folder that holds another kind of model, whose files a training would take away.

    Raises:
        OutputError: its config.json is not of a reward model.
    """
    try:
        model_type = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError):  # none, or torn: nothing that could be loaded
        return
    if model_type != _MODEL_TYPE:
        raise OutputError(f"output_dir '{folder}' holds a model of type {model_type!r}; name another folder")


def stale_names(folder: Path) -> list[str]:
    """Return the files of an earlier run's result, config.json first."""
    patterns = [LAST_NAME, *_WEIGHTS, *_BESIDE]
    if (folder / CARD_NAME).is_file():
        patterns.insert(1, "README.md")  # the card's other half; any other README.md is not ours to remove
    return [path.name for pattern in patterns for path in sorted(folder.glob(pattern))]


def clear_earlier_run(folder: str | Path) -> None:
    """Remove weights, tokenizer, card and log of an earlier run.

    Args:
        folder: output folder of a training; it holds no checkpoints, or is refused before.

    Raises:
        OutputError: a file cannot be removed.
    """
    folder = Path(folder)
    try:
        for name in [*stale_names(folder), METRICS_NAME]:
            path = folder / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"output_dir '{folder}': an earlier run cannot be cleared away ({error})") from error
