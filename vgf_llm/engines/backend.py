"""The protocol of a backend: it loads the base model, or its shape, and puts a reference in front of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeVar

from torch import Tensor
from transformers import PreTrainedModel

from vgf_llm.settings import ModelSettings, SamplingSettings
from vgf_llm.text.protocols import Reference

R_co = TypeVar("R_co", bound=Reference, covariant=True)


@dataclass(frozen=True)
class Tokens:
    """What tokenizer, base model and value have in common.

    Attributes:
        eos_ids: Every id that ends a response.
        pad_id: Id for padding.
        vocabulary: Tokens that can be drawn; rows of the model's table from there on are padding of the table.
    """

    eos_ids: tuple[int, ...]
    pad_id: int
    vocabulary: int


class Backend(Protocol[R_co]):
    """Runs the base model.

    Two calls, so that whatever is wrong with the models is found before anything slow is started.
    """

    def load(self, models: ModelSettings, device: str) -> PreTrainedModel:
        """Return the base model, or its shape without weights where they are not needed in this process.

        Args:
            models: Names the base model; its dtype is decided.
            device: Where the value lives.

        Raises:
            ModelError: If it cannot be loaded.
        """
        ...

    def start(
        self,
        base: PreTrainedModel,
        models: ModelSettings,
        sampling: SamplingSettings,
        tokens: Tokens,
        table_VD: Tensor,
    ) -> R_co:
        """Return the base model under the sampling law, running; the reference's ``close`` ends it.

        Args:
            base: As :meth:`load` returned it.
            models: As there.
            sampling: The law.
            tokens: EOS, padding and vocabulary.
            table_VD: Input embeddings that particles live in, on the value's device.

        Raises:
            VGFError: If the backend cannot run this law, or does not start.
        """
        ...
