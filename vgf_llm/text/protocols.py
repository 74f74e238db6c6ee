"""The seams of the text pipeline: what a value and a decoder must offer, and what passes between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from vgf_llm.text.responses import Responses


class Value(Protocol):
    """Anything that scores responses and is differentiable in their embeddings (a reward model, an ensemble)."""

    @property
    def embedding_table_VD(self) -> Tensor:
        """The input embeddings that particles live in."""
        ...

    def prefix(self, prompts: list[list[int]]) -> Any:
        """Run B prompts once; the result is handed back to :meth:`score`."""
        ...

    def embed(self, tokens: Tensor) -> Tensor:
        """Look tokens [...] up in the table; [..., D]."""
        ...

    def score(self, prefix: Any, responses: Tensor, mask_BNT: Tensor) -> Tensor:
        """Return values [B, N] of token ids [B, N, T] or of embeddings [B, N, T, D]."""
        ...


@dataclass(frozen=True)
class Move:
    """What a decoder is asked to turn into text.

    Attributes:
        responses: Where the particles started: B x N responses.
        displacement_BNTD: How far the flow moved each token's embedding; 0 on EOS and padding.
        nats: KL budget of each response for this decode, at least 0.
        max_token_nats: Cap on the KL of one token.
        seeds_BN: int64, one seed a response, for the decoder's own noise.
    """

    responses: Responses
    displacement_BNTD: Tensor
    nats: float
    max_token_nats: float
    seeds_BN: Tensor


@dataclass(frozen=True)
class Decoded:
    """What came of a move.

    Attributes:
        responses: The new texts, N a prompt, in the same order.
        nats_BN: KL between the decoder's law and the reference's, summed along the path that was written; NaN where
            the decoder has no law (``nearest``).
    """

    responses: Responses
    nats_BN: Tensor


class Decoder(Protocol):
    """Turns moved particles into tokens."""

    def prepare(self, prompts: list[list[int]]) -> Any:
        """Compute once per prompt what all rounds and particles share."""
        ...

    def decode(self, context: Any, move: Move) -> Decoded:
        """Write the moved responses; a zero displacement gives them back token for token."""
        ...
