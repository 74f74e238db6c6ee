"""Sampling with transformers: Gumbel-max over the truncated law, with noise hashed from a seed a row."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vgf_llm.text.law import Shortlist, truncate
from vgf_llm.text.noise import gumbel_noise
from vgf_llm.text.reference import Reference
from vgf_llm.text.responses import Responses

_KEPT_COLUMNS = 512  # a longer shortlist is not kept: 12 bytes a column and token


class TransformersSampler:
    """The protocol's in-process backend; any device, any causal language model of transformers.

    Args:
        reference: The frozen base model and its law.
    """

    def __init__(self, reference: Reference) -> None:
        self.reference = reference

    def sample(self, prompts: list[list[int]], seeds_BN: Tensor) -> Responses:
        """Return N responses to each of B prompts, with the laws of their tokens where these are short.

        See :class:`vgf_llm.sampling.protocol.Sampler`.
        """
        seeds_R = seeds_BN.flatten().to(self.reference.device)
        laws: list[Shortlist] = []

        def choose(logits_RV: Tensor, position: int) -> Tensor:
            law = truncate(logits_RV, self.reference.sampling)
            if law.ids.shape[-1] <= _KEPT_COLUMNS:
                laws.append(law)
            winner_R1 = (law.logps + gumbel_noise(seeds_R, position, law.ids)).argmax(-1, keepdim=True)
            return law.ids.gather(-1, winner_R1).squeeze(-1)

        written = self.reference.write(self.reference.prefix(prompts), seeds_BN.shape[1], choose)
        if not laws:
            return written
        shape = (*written.tokens_BNT.shape, -1)
        ids = torch.stack([law.ids for law in laws], 1).view(shape)
        return replace(written, law=Shortlist(ids, torch.stack([law.logps for law in laws], 1).view(shape)))
