"""The backend ``vllm``: the base model in an engine that is started here, or in a server that runs already."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vgf_llm.engines.engine_reference import EngineReference, check_truncated
from vgf_llm.engines.start import adapter_of, start_engine
from vgf_llm.models.base import LoadedBase, base_without_weights
from vgf_llm.settings import EngineSettings, ModelSettings, SamplingSettings


class VLLMBackend:
    """Runs the base model in a vLLM engine; see :class:`vgf_llm.engines.backend.Backend`.

    Args:
        settings: The engine.
    """

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings

    def load(self, models: ModelSettings, tokenizer: PreTrainedTokenizerBase, device: str) -> LoadedBase:
        """Return the base model's shape; the engine reads the weights."""
        return base_without_weights(models, tokenizer)

    def start(
        self, base: LoadedBase, models: ModelSettings, sampling: SamplingSettings, table_VD: Tensor
    ) -> EngineReference:
        """Start the engine and return the base model under the sampling distribution."""
        check_truncated(sampling)
        adapter = adapter_of(models) if self.settings.url is None else None  # a server's is its served_model
        return EngineReference(
            start_engine(models, sampling, self.settings, table_VD),
            base.lm,
            sampling,
            base.eos_ids,
            base.pad_id,
            table_VD.device,
            adapter,
            vocabulary=base.vocabulary,
        )
