"""``edit_greedy``: the best of several single-token edits, if it raises value and likelihood together.

With Delta = eps grad R / alpha of one flow step and

    l(t, v) = <Delta_t, e_v - e_{y_t}> + log p(v | y_<t) - log p(y_t | y_<t),      v in the reference's top k, not EOS,

a round draws ``proposals`` pairs (t, v) of each response without replacement from softmax l over all positions and
tokens, scores all of them by the value and the ``checked`` most promising (exact change of R / alpha plus the local
change of log p) by the reference, and replaces y by the best if R(y) / alpha + log p(y | x) rises. It climbs to a mode
of what ``edit`` samples from: more value for the same number of rounds, and no distribution.

Source: filter-then-check as in greedy coordinate gradient (Zou et al. 2023), with the reference's conditionals in the
filter and its likelihood in the check.

Cost a response and round, for m proposals, c checked, P_ref and P_val parameters and T tokens:
2 P_val T m + 2 P_ref T c + 4 P_val T FLOPs; the first round 2 P_ref T more where the sampler did not keep the
distributions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vgf_llm.text.noise import gumbel_noise
from vgf_llm.text.path import chosen, edit_scores, is_on_list, path_of, with_token
from vgf_llm.text.protocols import Decoded, Move, Prefix, Reference, Work


class EditGreedyDecoder:
    """Single-token edits that only climb.

    Args:
        reference: The frozen base model and its distribution.
        table_VD: Input embeddings that the particles live in.
        proposals: Edits a response and round that the value scores, at least 1.
        checked: How many of them the reference scores, from 1 to ``proposals``.
    """

    def __init__(self, reference: Reference, table_VD: Tensor, *, proposals: int = 8, checked: int = 1) -> None:
        if not 1 <= checked <= proposals:
            raise ValueError(f"checked must be from 1 to proposals ({proposals}), got {checked}")
        self.reference = reference
        self.table_VD = table_VD
        self.proposals = proposals
        self.checked = checked

    def prepare(self, prompts: list[list[int]]) -> Prefix:
        """Run the prompts through the reference once."""
        return self.reference.prefix(prompts)

    @torch.no_grad()
    def decode(self, context: Prefix, move: Move) -> Decoded:
        """Propose, score, check, and keep the best edit of each response if it is one."""
        responses, path, work = move.responses, move.state, Work.none(len(move.responses.prompts))
        if path is None:
            path, work = path_of(self.reference, context, responses)
        b, n, _, k = path.distribution.ids.shape
        scores_BNX = edit_scores(self.table_VD, path, responses, move.displacement_BNTD).flatten(2)
        m = min(self.proposals, scores_BNX.shape[-1])
        c = min(self.checked, m)
        pair_BNm = _draw(scores_BNX, move.seeds_BN.to(scores_BNX.device), m)
        possible_BNm = ~torch.isinf(scores_BNX.gather(-1, pair_BNm))
        local_BNm = path.distribution.logps.flatten(2).gather(-1, pair_BNm) - path.own_BNT.gather(-1, pair_BNm // k)
        origin_BM = torch.arange(n, device=pair_BNm.device).repeat_interleave(m).expand(b, -1)
        token_BNm = path.distribution.ids.flatten(2).gather(-1, pair_BNm)
        edits = with_token(responses.take(origin_BM), (pair_BNm // k).flatten(1), token_BNm.flatten(1))
        gain_BNm = move.score(edits).view(b, n, m) - move.moved.values_BN.unsqueeze(-1)
        promise_BNm = (gain_BNm / move.budget.temperature + local_BNm).masked_fill(~possible_BNm, -torch.inf)
        best_BNc = promise_BNm.topk(c, dim=-1).indices
        tried = edits.take((best_BNc + m * torch.arange(n, device=best_BNc.device)[:, None]).flatten(1))
        tried_path, _ = path_of(self.reference, context, tried)
        on_list_BNc = is_on_list(tried_path.distribution, tried).view(b, n, c) & possible_BNm.gather(-1, best_BNc)
        likelier_BNc = tried_path.total_BN.view(b, n, c) - path.total_BN.unsqueeze(-1)
        rise_BNc = gain_BNm.gather(-1, best_BNc) / move.budget.temperature + likelier_BNc
        rise_BN, winner_BN = rise_BNc.masked_fill(~on_list_BNc, -torch.inf).max(-1)
        winner_BN = winner_BN + c * torch.arange(n, device=winner_BN.device)
        kept_BN = rise_BN > 0
        result = chosen(kept_BN, tried.take(winner_BN), responses)
        there = move.flow(result)
        work += Work.of(responses.lengths_BN, reference=c, value=m + move.flow_passes)
        return Decoded(
            responses=result,
            nats_BN=torch.full(kept_BN.shape, torch.nan, device=kept_BN.device),
            work=work,
            values_BN=there.values_BN,
            moved=there,
            state=path.where(kept_BN, tried_path.take(winner_BN)),
        )


def _draw(scores_BNX: Tensor, seeds_BN: Tensor, m: int) -> Tensor:
    """Draw m columns of each response from softmax of the scores, without replacement (Gumbel-top-m); [B, N, m]."""
    columns_RX = torch.arange(scores_BNX.shape[-1], device=seeds_BN.device).expand(seeds_BN.numel(), -1)
    noise_RX = gumbel_noise(seeds_BN.flatten(), 0, columns_RX)
    return (scores_BNX + noise_RX.view(scores_BNX.shape)).topk(m, dim=-1).indices
