"""A tiny reference, its samples, and rewards whose effect of a token is known."""

from __future__ import annotations

import torch

from reward_models.directions.positions import Positions, sample_positions
from reward_models.fidelity import exact_changes
from vgf_llm.settings import SamplingSettings
from vgf_llm.text.reference import TorchReference

EOS, PAD = 2, 0


def reference_of(lm, length=6, top_k=12) -> TorchReference:
    """The reference of a tiny model."""
    return TorchReference(lm, SamplingSettings(max_new_tokens=length, top_k=top_k), (EOS,), PAD)


def prompts_of(count, first=(10, 11), seed=0) -> list[list[int]]:
    """Prompts that start with one of a few tokens, in turn, and go on at random."""
    generator = torch.Generator().manual_seed(seed)
    return [[first[i % len(first)], *torch.randint(12, 50, (3,), generator=generator).tolist()] for i in range(count)]


def sampled(lm, prompts, a_prompt=4, seed=0, shortlist=12) -> Positions:
    """Samples of the tiny reference."""
    return sample_positions(reference_of(lm), prompts, a_prompt, shortlist, seed)


class Planted:
    """A reward that adds `effects_V` of its tokens, times the sign of the prompt's first token where there is one."""

    def __init__(self, effects_V, signs=None):
        self.effects_V, self.signs, self.calls = effects_V, signs, 0

    def prefix(self, prompts):
        return _Rows([list(prompt) for prompt in prompts])

    def score(self, prefix, tokens_BNT, mask_BNT):
        self.calls += tokens_BNT.shape[0] * tokens_BNT.shape[1]
        sums_BN = (self.effects_V[tokens_BNT] * mask_BNT).sum(-1)
        signs_B = torch.tensor([1.0 if self.signs is None else self.signs[prompt[0]] for prompt in prefix.prompts])
        return sums_BN * signs_B.unsqueeze(-1)


class _Rows:
    def __init__(self, prompts):
        self.prompts = prompts

    def select(self, rows):
        return _Rows([self.prompts[row] for row in rows.tolist()])


def linear_effects(lm, seed=0):
    """Effects <g, e_v> of a random direction g; returns both."""
    table_VD = lm.get_input_embeddings().weight.detach()
    g_D = torch.randn(table_VD.shape[1], generator=torch.Generator().manual_seed(seed))
    return g_D, table_VD @ g_D


def changes_of(reward, positions, substitutions=24, seed=0):
    """Exact changes of sampled substitutions."""
    responses = positions.responses
    return exact_changes(
        reward,
        responses.prompts,
        responses.tokens_BNT,
        responses.mask_BNT,
        positions.candidates_BNTK,
        substitutions=substitutions,
        seed=seed,
        eos_ids=responses.eos_ids,
    )
