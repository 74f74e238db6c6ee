"""Starts the engine that the settings name: vLLM in this process's charge, or the server at a URL."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vgf_llm.engines.deadline import Deadline
from vgf_llm.engines.engine import TakesWeights
from vgf_llm.engines.engine_reference import MOST_SPARE
from vgf_llm.engines.vllm_engine import VLLMEngine
from vgf_llm.engines.vllm_server import VLLMServer
from vgf_llm.models.loading import ADAPTER_NAME, base_model_name, resolved_name
from vgf_llm.settings import EngineSettings, ModelSettings, SamplingSettings


def start_engine(
    models: ModelSettings,
    sampling: SamplingSettings,
    settings: EngineSettings,
    table_VD: Tensor | None,
    *,
    pushed: Mapping[str, Any] | None = None,
    max_length: int | None = None,
    deadline: Deadline | None = None,
) -> TakesWeights:
    """Return an engine of the base model: the server at ``settings.url``, or one that is started here.

    Where the base model is a PEFT adapter's folder, the engine runs its base and knows the adapter by that folder.

    Args:
        models: Names the base model.
        sampling: The distribution; the engine reports the top k of it.
        settings: The engine.
        table_VD: Input embeddings that particles live in.
        pushed: PEFT configuration of the LoRAs that will be pushed to an engine that is started here.
        max_length: Most tokens of a prompt and its response there; the model's own limit when not given.
        deadline: Of whoever waits for the start; nobody leaves when not given.

    Raises:
        EngineError: If the server does not answer or the engine does not start.
        AbandonedError: If ``deadline`` says that nobody waits for it any more.
    """
    if settings.url is not None:
        return VLLMServer(settings)
    adapter = adapter_of(models)
    return VLLMEngine(
        resolved_name(base_model_name(models.model_name_or_path)),
        settings,
        table_VD=table_VD,
        adapters=() if adapter is None else (adapter,),
        pushed=pushed,
        dtype=models.dtype,
        max_length=max_length,
        most_logprobs=max(sampling.top_k, 1) + MOST_SPARE,
        trust_remote_code=models.trust_remote_code,
        deadline=deadline,
    )


def adapter_of(models: ModelSettings) -> str | None:
    """Return the folder of the PEFT adapter that the base model is, or None."""
    name = models.model_name_or_path
    return name if (Path(name) / ADAPTER_NAME).is_file() else None
