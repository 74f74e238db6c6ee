"""Backends by name."""

from __future__ import annotations

from collections.abc import Callable

from vgf_llm.engines.backend import Backend
from vgf_llm.engines.transformers_backend import TransformersBackend
from vgf_llm.engines.vllm_backend import VLLMBackend
from vgf_llm.settings import BackendName, EngineSettings
from vgf_llm.text.protocols import Reference

_MAKERS: dict[BackendName, Callable[[EngineSettings], Backend[Reference]]] = {
    "transformers": lambda engine: TransformersBackend(),
    "vllm": VLLMBackend,
}


def backend_named(name: BackendName, engine: EngineSettings) -> Backend[Reference]:
    """Return the backend of that name.

    Args:
        name: Of the settings.
        engine: Settings of an engine, for backends that have one.
    """
    return _MAKERS[name](engine)
