"""The backend ``vllm``: the base model in an engine that is started here, or in a server that runs already."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from vgf_llm.engines.backend import Tokens
from vgf_llm.engines.engine_reference import EngineReference, check_truncated
from vgf_llm.engines.start import adapter_of, start_engine
from vgf_llm.models.loading import load_skeleton
from vgf_llm.settings import EngineSettings, ModelSettings, SamplingSettings


class VLLMBackend:
    """Runs the base model in a vLLM engine; see :class:`vgf_llm.engines.backend.Backend`.

    Args:
        settings: The engine.
    """

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings

    def load(self, models: ModelSettings, device: str) -> PreTrainedModel:
        """Return the base model's shape; the engine reads the weights."""
        return load_skeleton(models.model_name_or_path, trust_remote_code=models.trust_remote_code)

    def start(
        self,
        base: PreTrainedModel,
        models: ModelSettings,
        sampling: SamplingSettings,
        tokens: Tokens,
        table_VD: Tensor,
    ) -> EngineReference:
        """Start the engine and return the base model under the sampling law."""
        check_truncated(sampling)
        adapter = adapter_of(models) if self.settings.url is None else None  # a server's is its served_model
        return EngineReference(
            start_engine(models, sampling, self.settings, table_VD),
            base,
            sampling,
            tokens.eos_ids,
            tokens.pad_id,
            table_VD.device,
            adapter,
            vocabulary=tokens.vocabulary,
        )
