"""What is measured on responses, one number each: value, gold, likelihood under the base, text statistics."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vgf_llm.text.protocols import Prefix, Reference
from vgf_llm.text.responses import Responses


def nll_per_token(reference: Reference, prefix: Prefix, responses: Responses) -> Tensor:
    """Return -log p(y | x) / T under the untruncated base at temperature 1, in nats per token, [B, N]."""
    total_BN = -reference.logps(prefix, responses).sum(-1)
    return total_BN / responses.lengths_BN.clamp(min=1)


def repetition(text: str) -> float:
    """Return the share of word bigrams that occurred before in the text, in [0, 1]."""
    words = text.lower().split()
    bigrams = list(zip(words, words[1:], strict=False))
    return 1 - len(set(bigrams)) / len(bigrams) if bigrams else 0.0


def non_ascii(texts: Sequence[str]) -> list[float]:
    """Return the share of characters outside ASCII of each text."""
    return [sum(ord(character) > 127 for character in text) / max(len(text), 1) for text in texts]
