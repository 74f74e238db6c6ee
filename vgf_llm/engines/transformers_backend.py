"""The backend ``transformers``: the base model in this process, on the value's device."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from vgf_llm.engines.backend import Tokens
from vgf_llm.models.loading import load_causal_lm
from vgf_llm.settings import ModelSettings, SamplingSettings
from vgf_llm.text.reference import TorchReference


class TransformersBackend:
    """Runs the base model in this process; see :class:`vgf_llm.engines.backend.Backend`."""

    def load(self, models: ModelSettings, device: str) -> PreTrainedModel:
        """Return the base model with its weights."""
        return load_causal_lm(
            models.model_name_or_path, dtype=models.dtype, device=device, trust_remote_code=models.trust_remote_code
        )

    def start(
        self,
        base: PreTrainedModel,
        models: ModelSettings,
        sampling: SamplingSettings,
        tokens: Tokens,
        table_VD: Tensor,
    ) -> TorchReference:
        """Return the base model under the sampling law."""
        return TorchReference(base, sampling, tokens.eos_ids, tokens.pad_id, tokens.vocabulary)
