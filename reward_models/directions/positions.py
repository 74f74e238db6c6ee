"""Responses with what the reference knows before each of their tokens: its distribution and its hidden state.

A hidden state is what the reference's output layer reads, caught at that layer's input. It is the state from which
the token's logits come, so that one-pass decoding has it at hand when the token is still to be chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vgf_llm.console.progress import track
from vgf_llm.models.hidden import hidden_shown
from vgf_llm.text.bonus import BonusSource
from vgf_llm.text.distribution import Shortlist
from vgf_llm.text.reference import TorchReference
from vgf_llm.text.responses import Responses, is_any_of, join_padded, join_prompts
from vgf_llm.text.sampler import sample_in_batches

_ROWS_AT_ONCE = 64  # texts that a source with a cache follows together


@dataclass(frozen=True)
class Positions:
    """N responses to each of B prompts, and what stands before each token.

    Attributes:
        responses: The responses.
        distribution: The reference's shortlist [B, N, T, K + 1] under its own temperature and nucleus; the response's
            own token is on it.
        hidden_BNTD: What the output layer read there, float32.
    """

    responses: Responses
    distribution: Shortlist
    hidden_BNTD: Tensor

    def some(self, prompts: slice) -> Positions:
        """Return the positions of some prompts."""
        own = self.responses
        responses = Responses(
            own.prompts[prompts], own.tokens_BNT[prompts], own.mask_BNT[prompts], own.eos_ids, own.pad_id
        )
        distribution = Shortlist(self.distribution.ids[prompts], self.distribution.logps[prompts])
        return Positions(responses, distribution, self.hidden_BNTD[prompts])

    @property
    def candidates_BNTK(self) -> Tensor:
        """Tokens that may be put in each place: the shortlist, with the response's own token where there is none.

        An EOS is neither replaced nor put in.
        """
        ids, own_BNT1 = self.distribution.ids, self.responses.tokens_BNT.unsqueeze(-1)
        barred = self.distribution.logps.isinf() | is_any_of(ids, self.responses.eos_ids)
        return torch.where(barred | ~self.responses.movable_BNT.unsqueeze(-1), own_BNT1, ids)

    @property
    def text_distribution(self) -> Shortlist:
        """The distribution given that the response goes on: columns that would end it are ``-inf``."""
        ids, logps = self.distribution.ids, self.distribution.logps
        logps = logps.masked_fill(is_any_of(ids, self.responses.eos_ids), -torch.inf)
        total = logps.logsumexp(-1, keepdim=True)
        return Shortlist(ids, torch.where(total.isinf(), -torch.inf, logps - total))


def sample_positions(
    reference: TorchReference, prompts: Sequence[list[int]], a_prompt: int, shortlist: int, seed: int
) -> Positions:
    """Sample responses of the reference and look up what stands before their tokens.

    Args:
        reference: Base model and distribution.
        prompts: B lists of token ids.
        a_prompt: Responses per prompt, at least 1.
        shortlist: K, likeliest tokens per position; fewer where the vocabulary is smaller.
        seed: Of the samples.
    """
    parts = [
        read_positions(reference, responses, shortlist)
        for responses in sample_in_batches(reference, prompts, a_prompt, seed)
    ]
    return join_positions(parts)


@torch.no_grad()
def read_positions(reference: TorchReference, responses: Responses, shortlist: int) -> Positions:
    """Look up the distributions and hidden states along given responses: one forward of the reference."""
    k = min(shortlist, reference.vocabulary or reference.model.get_output_embeddings().weight.shape[0])
    seen: list[Tensor] = []
    with hidden_shown(reference.model, seen.append):
        found = reference.shortlists(
            reference.prefix(responses.prompts), responses, replace(reference.sampling, top_k=k)
        )
    shape = (*responses.tokens_BNT.shape, -1)
    distribution = Shortlist(found.ids.view(shape), found.logps.view(shape))
    return Positions(responses, distribution, torch.cat(seen).float().view(shape))


def join_positions(parts: Sequence[Positions]) -> Positions:
    """Join responses to different prompts, as many to each."""
    return Positions(
        join_prompts([part.responses for part in parts]),
        Shortlist(
            join_padded([part.distribution.ids for part in parts], 0),
            join_padded([part.distribution.logps for part in parts], -torch.inf),
        ),
        join_padded([part.hidden_BNTD for part in parts], 0.0),
    )


@torch.no_grad()
def bonuses_along(source: BonusSource, positions: Positions) -> Tensor:
    """Ask a source for its bonuses at every position of given responses, in order: [B, N, T, K + 1], float32.

    Columns of ``-inf`` in the distribution have a bonus of 0.

    Args:
        source: Any source; one that reads hidden states is shown them.
        positions: B x N responses.
    """
    B, N = positions.responses.tokens_BNT.shape[:2]
    at_once = max(1, _ROWS_AT_ONCE // N)
    groups = range(0, B, at_once)
    followed = track(groups, "following the texts", B, unit="prompts", size=lambda start: min(at_once, B - start))
    parts = [_bonuses_of(source, positions.some(slice(start, start + at_once))) for start in followed]
    return torch.cat(parts)


def _bonuses_of(source: BonusSource, positions: Positions) -> Tensor:
    responses, shape = positions.responses, positions.distribution.ids.shape
    bonus = source.begin(responses.prompts, shape[1])
    ids_RTK, logps_RTK = positions.distribution.ids.flatten(0, 1), positions.distribution.logps.flatten(0, 1)
    logps_RTK = logps_RTK.masked_fill(is_any_of(ids_RTK, responses.eos_ids), -torch.inf)  # as decoding asks
    tokens_RT = responses.tokens_BNT.masked_fill(~responses.movable_BNT, -1).flatten(0, 1)
    hidden_RTD = positions.hidden_BNTD.flatten(0, 1)
    found = []
    for t in range(shape[2]):
        hidden_RD = hidden_RTD[:, t] if source.reads_hidden else None
        last_R = tokens_RT[:, t - 1] if t else None
        found.append(bonus(Shortlist(ids_RTK[:, t], logps_RTK[:, t]), hidden_RD, last_R).float())
    return torch.stack(found, 1).masked_fill(logps_RTK.isinf(), 0.0).view(shape)
