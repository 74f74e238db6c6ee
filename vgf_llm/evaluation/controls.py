"""Directions that a transport is held against: the gradient turned round, noise of the same size, and none at all.

Each takes the place of another source of directions (:class:`vgf_llm.text.particles.GradientSource`), so that
everything else of an arm, the KL that its decoder spends and its cost among it, stays the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vgf_llm.flow.trajectory import ValueGradient
from vgf_llm.text.particles import GradientSource, exact_gradient
from vgf_llm.text.protocols import Value
from vgf_llm.text.responses import Responses


def flipped_gradient(of: GradientSource = exact_gradient) -> GradientSource:
    """Return a source times -1."""

    def source(value: Value, prefix: Any, responses: Responses) -> ValueGradient:
        climb = of(value, prefix, responses)

        def fall(u_BNTD: Tensor) -> tuple[Tensor, Tensor]:
            values_BN, gradients_BNTD = climb(u_BNTD)
            return values_BN, -gradients_BNTD

        return fall

    return GradientSource(source, of.passes)


def random_gradient(seed: int, of: GradientSource = exact_gradient) -> GradientSource:
    """Return a source of Gaussian directions with another source's norm at every token.

    A prompt's noise depends on the seed and the prompt alone, not on the batch.
    """

    def source(value: Value, prefix: Any, responses: Responses) -> ValueGradient:
        climb = of(value, prefix, responses)

        def wander(u_BNTD: Tensor) -> tuple[Tensor, Tensor]:
            values_BN, gradients_BNTD = climb(u_BNTD)
            noise_BNTD = torch.stack([_noise(seed, prompt, u_BNTD[0]) for prompt in responses.prompts])
            unit_BNTD = noise_BNTD / noise_BNTD.norm(dim=-1, keepdim=True)
            return values_BN, unit_BNTD * gradients_BNTD.norm(dim=-1, keepdim=True)

        return wander

    return GradientSource(source, of.passes)


def no_gradient(of: GradientSource = exact_gradient) -> GradientSource:
    """Return a source whose values are right and whose directions are zero: decoding alone."""

    def source(value: Value, prefix: Any, responses: Responses) -> ValueGradient:
        climb = of(value, prefix, responses)

        def stay(u_BNTD: Tensor) -> tuple[Tensor, Tensor]:
            values_BN, gradients_BNTD = climb(u_BNTD)
            return values_BN, torch.zeros_like(gradients_BNTD)

        return stay

    return GradientSource(source, of.passes)


def _noise(seed: int, prompt: list[int], like_NTD: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(hash((seed, tuple(prompt))) & (2**63 - 1))
    # Drawn with tokens first, so that a longer padding leaves the noise of the real tokens as it is.
    n, t, d = like_NTD.shape
    return torch.randn(t, n, d, generator=generator).transpose(0, 1).to(like_NTD)
