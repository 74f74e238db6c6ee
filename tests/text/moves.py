"""What a decoder is given, built by hand."""

import torch

from vgf_llm.flow.budget import TransportBudget
from vgf_llm.text import Move, Moved


def make_move(value, responses, displacement_BNTD, *, nats, seeds_BN, max_token_nats=1.0, coupled=True):
    """A move of the given displacement; ``value`` may be None for decoders that do not ask it."""
    zeros_BN = torch.zeros(responses.tokens_BNT.shape[:2])

    def score(other):
        return value.score(value.prefix(other.prompts), other.tokens_BNT, other.mask_BNT)

    return Move(
        responses=responses,
        moved=Moved(displacement_BNTD, zeros_BN if value is None else score(responses), zeros_BN),
        budget=TransportBudget(nats=nats, max_token_nats=max_token_nats),
        nats=nats,
        seeds_BN=seeds_BN,
        coupled_BN=torch.full(zeros_BN.shape, coupled),
        flow=lambda other: Moved(
            torch.zeros(*other.tokens_BNT.shape, displacement_BNTD.shape[-1]), score(other), zeros_BN
        ),
        flow_passes=2,
        score=score,
    )
