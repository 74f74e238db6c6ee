"""``block``: draft, transport and rewrite segment by segment, so that no displacement meets a context of another text.

For each block of ``block_tokens`` positions after the text w that has been written so far:

    draft       d ~ p(. | x, w), the original's own tokens while w is still its beginning
    transport   Delta of the partial response w d, at its prefix value R(x, w d)
    rewrite     q_t(v) ∝ p_t(v) exp(s <Delta_t, e_v - e_{d_t}>),        t in the block,

with one multiplier s a block, calibrated on the draft's contexts to the block's share of the budget (nats * tokens of
the block / tokens of the original), a cap a token, and no more than what is left of the budget on the path. The draft's
own Gumbel noise, drawn from its posterior, picks the tokens, so a zero displacement gives the original back token for
token, and a block that covers the whole response is ``prior`` (:mod:`vgf_llm.text.tilted_path` is shared). Within a
block the displacement still outlives the first change by up to ``block_tokens`` - 1 positions. As in ``prior`` a draft
ends where the reference ends it, and EOS is never pushed. Of a response that is to be drawn afresh (``coupled_BN``
false) the first draft is the reference's already.

Source: blockwise controlled decoding (Mudgal et al. 2024) selects the best of K drafted blocks by a prefix scorer; here
one draft is moved by the scorer's gradient. The value must score unfinished responses, which few are trained for.

Cost a response, for P_ref and P_val parameters, T tokens and blocks of m: 2 P_ref T to rewrite, up to 2 P_ref T to
draft (nothing while the original still stands), and 4 P_val T (T / m + 1) / 2 for the flows at all partial responses
but one that is the whole original, whose displacement is given; 2 P_ref T more where the sampler did not keep the
distributions.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from vgf_llm.text.choosing import Draws
from vgf_llm.text.distribution import Shortlist
from vgf_llm.text.noise import combine_seeds
from vgf_llm.text.protocols import Decoded, Move, Prefix, Reference, Work
from vgf_llm.text.responses import Responses, is_any_of, mask_after_eos
from vgf_llm.text.tilted_path import TiltedPath, distributions_of

_DRAFT_STREAM = 0xD4AF7


class BlockDecoder:
    """Blockwise drafting, transport and rewriting.

    Args:
        reference: The frozen base model and its distribution.
        table_VD: Input embeddings that the particles live in.
        block_tokens: Positions of a block, at least 1.
    """

    def __init__(self, reference: Reference, table_VD: Tensor, *, block_tokens: int = 8) -> None:
        if block_tokens < 1:
            raise ValueError(f"block_tokens must be at least 1, got {block_tokens}")
        self.reference = reference
        self.table_VD = table_VD
        self.block_tokens = block_tokens

    def prepare(self, prompts: list[list[int]]) -> Prefix:
        """Run the prompts through the reference once."""
        return self.reference.prefix(prompts)

    @torch.no_grad()
    def decode(self, context: Prefix, move: Move) -> Decoded:
        """Write every response again, a block at a time."""
        n, longest = move.responses.tokens_BNT.shape[1], self.reference.sampling.max_new_tokens
        distribution, work = distributions_of(self.reference, context, move.responses)
        text = _Text(self, move, distribution)
        rows = context.select(torch.arange(len(text.written_RT), device=text.written_RT.device) // n)
        for start in range(0, longest, self.block_tokens):
            block = range(start, min(start + self.block_tokens, longest))
            text.draft(rows, block)
            text.transport(block)
            done_R = text.path.done_R
            tokens_RT, rows = self.reference.extend(rows, block, text.path, done_R)
            text.keep(tokens_RT, done_R, block)
            if bool(text.path.done_R.all()):
                break
        written = text.responses(block.start + tokens_RT.shape[1])
        work += text.work + Work.of(written.lengths_BN, reference=1)
        return Decoded(written, text.path.nats_R.view(-1, n), work)


class _Text:
    """What has been written so far, and the draft of the block that is written next.

    The drafts are columns of ``path``: those of the originals to begin with, replaced a block at a time.
    """

    def __init__(self, decoder: BlockDecoder, move: Move, distribution: Shortlist) -> None:
        self.decoder, self.move = decoder, move
        self.path = TiltedPath(decoder.reference, decoder.table_VD, move, distribution)
        self.written_RT = torch.full_like(self.path.tokens_RT, move.responses.pad_id)
        self.mask_RT = torch.zeros_like(self.path.inside_RT)
        self.lengths_R = move.responses.lengths_BN.flatten()
        self.movable_R = move.responses.movable_BNT.sum(-1).flatten()
        self.as_original_R = move.coupled_BN.flatten()
        self.work = Work.none(len(move.responses.prompts))

    def draft(self, rows: Prefix, block: range) -> None:
        """Let the reference draft the block of rows that are no longer their original; the others keep theirs."""
        path, columns = self.path, slice(block.start, block.stop)
        path.inside_RT[path.done_R, columns] = False
        path.movable_RT[path.done_R, columns] = False
        rows_X = (~path.done_R & ~(self.as_original_R & path.inside_RT[:, block.start])).nonzero().squeeze(-1)
        path.coupled_R = path.unchanged_R = torch.ones_like(path.done_R)
        if len(rows_X) == 0:
            return
        seeds_X = combine_seeds(path.seeds_R[rows_X], _DRAFT_STREAM)
        draws = Draws(path.sampling, seeds_X, ends_first=path.eos_ids, kept_columns=path.distribution.ids.shape[-1])
        tokens_XT, _ = self.decoder.reference.extend(rows.select(rows_X), block, draws)
        inside_XT = mask_after_eos(tokens_XT, path.eos_ids)
        missing = len(block) - tokens_XT.shape[1]
        distribution = draws.distribution()
        assert distribution is not None  # one is kept that is as long as the drafts'
        columns_missing = path.distribution.ids.shape[-1] - distribution.ids.shape[-1]
        path.distribution.ids[rows_X, columns] = pad(distribution.ids, (0, columns_missing, 0, missing))
        path.distribution.logps[rows_X, columns] = pad(
            distribution.logps, (0, columns_missing, 0, missing), value=-torch.inf
        )
        path.tokens_RT[rows_X, columns] = pad(tokens_XT, (0, missing), value=self.move.responses.pad_id)
        path.inside_RT[rows_X, columns] = pad(inside_XT, (0, missing), value=False)
        path.movable_RT[rows_X, columns] = pad(inside_XT & ~is_any_of(tokens_XT, path.eos_ids), (0, missing))
        drafted_R = torch.zeros_like(self.lengths_R).index_copy(0, rows_X, inside_XT.sum(-1))
        self.work += Work.of(self._by_prompt(drafted_R), reference=1)

    def transport(self, block: range) -> None:
        """Move the partial responses, and calibrate the multipliers to the block's share of the nats."""
        path, columns = self.path, slice(block.start, block.stop)
        is_whole_R = self.as_original_R & (self.lengths_R <= block.stop)  # the original, whose flow is known
        flows_R = ~path.done_R & ~is_whole_R
        if bool(flows_R.any()):
            self._put(path.tokens_RT[:, columns], path.inside_RT[:, columns], columns)
            partial = self.responses(block.stop)
            moved_RmD = self.move.flow(partial).displacement_BNTD.flatten(0, 1)[:, columns]
            given_RmD = path.displacement_RTD[:, columns]
            path.displacement_RTD[:, columns] = torch.where(is_whole_R[:, None, None], given_RmD, moved_RmD)
            self.work += Work.of(partial.lengths_BN * self._by_prompt(flows_R), value=self.move.flow_passes)
        of_block_R = path.movable_RT[:, columns].sum(-1)
        share_R = of_block_R / torch.maximum(self.movable_R, of_block_R).clamp(min=1)
        path.calibrate(columns, path.nats * share_R)

    def keep(self, tokens_RT: Tensor, done_R: Tensor, block: range) -> None:
        """Take over what was written in the block; ``done_R`` had ended before it."""
        missing = len(block) - tokens_RT.shape[1]
        inside_RT = mask_after_eos(tokens_RT, self.path.eos_ids) & ~done_R.unsqueeze(-1)
        self._put(pad(tokens_RT, (0, missing)), pad(inside_RT, (0, missing)), slice(block.start, block.stop))
        self.as_original_R = self.as_original_R & self.path.unchanged_R

    def responses(self, length: int) -> Responses:
        """Return the first ``length`` tokens of the text."""
        like, shape = self.move.responses, self.move.coupled_BN.shape
        tokens_BNT, mask_BNT = (x[:, :length].reshape(*shape, length).clone() for x in (self.written_RT, self.mask_RT))
        return Responses(like.prompts, tokens_BNT, mask_BNT, like.eos_ids, like.pad_id)

    def _put(self, tokens_RT: Tensor, inside_RT: Tensor, columns: slice) -> None:
        self.written_RT[:, columns] = tokens_RT.masked_fill(~inside_RT, self.move.responses.pad_id)
        self.mask_RT[:, columns] = inside_RT

    def _by_prompt(self, values_R: Tensor) -> Tensor:
        return values_R.view(self.move.coupled_BN.shape)
