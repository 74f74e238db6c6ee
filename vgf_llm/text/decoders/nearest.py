"""``nearest``: every moved embedding becomes the token it is closest to.

    y'_t = argmin_v |u_t - e_v|         (VGF, Xu et al. 2026: the literal form of Dec(u))

No language model takes part: below half the distance to the nearest token nothing changes, beyond it fluency is lost.
Kept as an ablation; with one flow step a round (``steps: 1, rounds: L``) it projects after every step. Special tokens
that end or pad a response are no candidates. Cost: 2 V D FLOPs a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vgf_llm.text.protocols import Decoded, Move, Work

_TOKENS_PER_CHUNK = 512


class NearestDecoder:
    """Nearest-token projection.

    Args:
        table_VD: Input embeddings that the particles live in.
        excluded_ids: Token ids that are never chosen (EOS, padding).
        vocabulary: Tokens of the tokenizer; rows of the table from there on are never chosen. None: all are tokens.
    """

    def __init__(self, table_VD: Tensor, excluded_ids: tuple[int, ...], vocabulary: int | None = None) -> None:
        self.table_VD = table_VD
        self.excluded_ids = list(excluded_ids)
        self.vocabulary = vocabulary

    def prepare(self, prompts: list[list[int]]) -> None:
        """Nothing is shared: the prompt plays no part."""

    @torch.no_grad()
    def decode(self, context: None, move: Move) -> Decoded:
        """Project every movable token that was displaced; the others stay."""
        tokens_BNT = move.responses.tokens_BNT
        moved_BNT = move.responses.movable_BNT & (move.displacement_BNTD != 0).any(-1)
        u_XD = self.table_VD[tokens_BNT[moved_BNT]] + move.displacement_BNTD[moved_BNT]
        halved_norms_V = self.table_VD.float().square().sum(-1) / 2
        halved_norms_V[self.excluded_ids] = torch.inf
        if self.vocabulary is not None:
            halved_norms_V[self.vocabulary :] = torch.inf
        nearest = [
            (chunk.float() @ self.table_VD.float().T - halved_norms_V).argmax(-1)
            for chunk in u_XD.split(_TOKENS_PER_CHUNK)
        ]
        result_BNT = tokens_BNT.clone()
        result_BNT[moved_BNT] = torch.cat(nearest) if nearest else tokens_BNT.new_empty(0)
        no_distribution_BN = torch.full(tokens_BNT.shape[:2], torch.nan, device=tokens_BNT.device)
        work = Work.of(moved_BNT.sum(-1), table=1)
        return Decoded(move.responses.with_tokens(result_BNT), no_distribution_BN, work)
