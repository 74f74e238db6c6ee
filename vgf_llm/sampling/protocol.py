"""What every sampling backend offers."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from vgf_llm.text.responses import Responses


class Sampler(Protocol):
    """Draws responses from the reference law."""

    def sample(self, prompts: list[list[int]], seeds_BN: Tensor) -> Responses:
        """Return N responses to each of B prompts.

        Args:
            prompts: B lists of token ids.
            seeds_BN: int64, one seed a response. A response depends on its prompt and its own seed alone, never on
                the batch that it was drawn in.
        """
        ...
