"""The protocol of a backend: it loads the base model, or its shape, and puts a reference in front of it."""

from __future__ import annotations

from typing import Protocol, TypeVar

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vgf_llm.models.base import LoadedBase
from vgf_llm.settings import ModelSettings, SamplingSettings
from vgf_llm.text.protocols import Reference

R_co = TypeVar("R_co", bound=Reference, covariant=True)


class Backend(Protocol[R_co]):
    """Runs the base model.

    Two calls, so that faults of the models are found before anything slow is started.
    """

    def load(self, models: ModelSettings, tokenizer: PreTrainedTokenizerBase, device: str) -> LoadedBase:
        """Return the base model, or its shape without weights where this process does not need them.

        Args:
            models: Names the base model; its dtype is decided.
            tokenizer: Its tokenizer.
            device: Torch device of the value.

        Raises:
            ModelError: If it cannot be loaded.
        """
        ...

    def start(self, base: LoadedBase, models: ModelSettings, sampling: SamplingSettings, table_VD: Tensor) -> R_co:
        """Return the base model under the sampling distribution, running; the reference's ``close`` ends it.

        Args:
            base: As :meth:`load` returned it, with no id beyond the value's table.
            models: As there.
            sampling: The distribution.
            table_VD: Input embeddings that particles live in, on the value's device.

        Raises:
            VGFError: If the backend cannot run this distribution, or does not start.
        """
        ...
