"""The backend ``transformers``: the base model in this process, on the value's device."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vgf_llm.models.base import LoadedBase, load_base
from vgf_llm.settings import ModelSettings, SamplingSettings
from vgf_llm.text.reference import TorchReference


class TransformersBackend:
    """Runs the base model in this process; see :class:`vgf_llm.engines.backend.Backend`."""

    def load(self, models: ModelSettings, tokenizer: PreTrainedTokenizerBase, device: str) -> LoadedBase:
        """Return the base model with its weights."""
        return load_base(models, tokenizer, device)

    def start(
        self, base: LoadedBase, models: ModelSettings, sampling: SamplingSettings, table_VD: Tensor
    ) -> TorchReference:
        """Return the base model under the sampling distribution."""
        return TorchReference(base.lm, sampling, base.eos_ids, base.pad_id, base.vocabulary)
