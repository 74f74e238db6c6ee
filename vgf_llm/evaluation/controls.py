"""Directions that a transport is held against: the gradient turned round, and noise of the same size.

Both take the exact gradient's place (:data:`vgf_llm.text.particles.GradientSource`), so that everything else of an arm,
the KL that its decoder spends among it, stays the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vgf_llm.flow.trajectory import ValueGradient
from vgf_llm.text.particles import GradientSource, exact_gradient
from vgf_llm.text.protocols import Value
from vgf_llm.text.responses import Responses


def flipped_gradient(value: Value, prefix: Any, responses: Responses) -> ValueGradient:
    """Return the value's gradient times -1."""
    climb = exact_gradient(value, prefix, responses)

    def fall(u_BNTD: Tensor) -> tuple[Tensor, Tensor]:
        values_BN, gradients_BNTD = climb(u_BNTD)
        return values_BN, -gradients_BNTD

    return fall


def random_gradient(seed: int) -> GradientSource:
    """Return a source of Gaussian directions with the exact gradient's norm at every token.

    A prompt's noise depends on the seed and the prompt alone, not on the batch.
    """

    def source(value: Value, prefix: Any, responses: Responses) -> ValueGradient:
        climb = exact_gradient(value, prefix, responses)

        def wander(u_BNTD: Tensor) -> tuple[Tensor, Tensor]:
            values_BN, gradients_BNTD = climb(u_BNTD)
            noise_BNTD = torch.stack([_noise(seed, prompt, u_BNTD[0]) for prompt in responses.prompts])
            unit_BNTD = noise_BNTD / noise_BNTD.norm(dim=-1, keepdim=True)
            return values_BN, unit_BNTD * gradients_BNTD.norm(dim=-1, keepdim=True)

        return wander

    return source


def _noise(seed: int, prompt: list[int], like_NTD: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(hash((seed, tuple(prompt))) & (2**63 - 1))
    # Drawn with tokens first, so that a longer padding leaves the noise of the real tokens as it is.
    n, t, d = like_NTD.shape
    return torch.randn(t, n, d, generator=generator).transpose(0, 1).to(like_NTD)
