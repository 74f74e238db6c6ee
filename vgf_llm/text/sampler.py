"""Sampling from a reference: Gumbel-max over the truncated distribution, with noise hashed from a seed a row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Protocol

from torch import Tensor

from vgf_llm.console.progress import track
from vgf_llm.text.choosing import Draws
from vgf_llm.text.distribution import Shortlist
from vgf_llm.text.noise import row_seeds
from vgf_llm.text.protocols import Reference
from vgf_llm.text.responses import Responses

_KEPT_COLUMNS = 512  # a longer shortlist is not kept: 12 bytes a column and token
_PROMPTS_A_BATCH = 16


class Sampler(Protocol):
    """Draws responses from the reference distribution."""

    def sample(self, prompts: list[list[int]], seeds_BN: Tensor) -> Responses:
        """Return N responses to each of B prompts.

        Args:
            prompts: B lists of token ids.
            seeds_BN: int64, one seed a response. A response depends on its prompt and its own seed alone, never on
                the batch that it was drawn in.
        """
        ...


class ReferenceSampler:
    """Draws where the reference runs: a model of transformers in this process, or an engine.

    Args:
        reference: The frozen base model and its distribution.
    """

    def __init__(self, reference: Reference) -> None:
        self.reference = reference

    def sample(self, prompts: list[list[int]], seeds_BN: Tensor) -> Responses:
        """Return N responses to each of B prompts, with the distributions of their tokens where these are short.

        See :class:`Sampler`.
        """
        seeds_R = seeds_BN.flatten().to(self.reference.device)
        draws = Draws(self.reference.sampling, seeds_R, kept_columns=_KEPT_COLUMNS)
        written = self.reference.write(self.reference.prefix(prompts), seeds_BN.shape[1], draws)
        distribution, shape = draws.distribution(), (*written.tokens_BNT.shape, -1)
        return (
            written
            if distribution is None
            else replace(written, distribution=Shortlist(distribution.ids.view(shape), distribution.logps.view(shape)))
        )


def sample_in_batches(
    reference: Reference, prompts: Sequence[list[int]], a_prompt: int, seed: int
) -> Iterator[Responses]:
    """Yield the reference's responses to a few prompts at a time; a response depends on seed and prompt number alone.

    Args:
        reference: Base model and distribution.
        prompts: B lists of token ids.
        a_prompt: Responses per prompt, at least 1.
        seed: Of the samples.
    """
    sampler = ReferenceSampler(reference)
    for start in track(
        range(0, len(prompts), _PROMPTS_A_BATCH),
        "sampling the base",
        len(prompts),
        unit="prompts",
        size=lambda start: min(_PROMPTS_A_BATCH, len(prompts) - start),
    ):
        group = list(prompts[start : start + _PROMPTS_A_BATCH])
        yield sampler.sample(group, row_seeds(seed, list(range(start, start + len(group))), a_prompt))
