"""The tilted distribution along responses that are written again, and the noise that ties them to their drafts.

A draft is a text with the distribution before each of its tokens: an original of the sampler, or a block that was
just drafted. What happens at one token is :mod:`vgf_llm.text.tilted_step`; here is the state of whole responses.
Shared by the decoders ``prior`` (the draft is the original) and ``block`` (the draft is renewed block by block).
"""

from __future__ import annotations

from dataclasses import asdict

import torch
from torch import Tensor
from torch.nn.functional import pad

from vgf_llm.text.distribution import Shortlist, truncate
from vgf_llm.text.plans import RowPlan, distribution_rule
from vgf_llm.text.protocols import Move, Prefix, Reference, Work
from vgf_llm.text.responses import Responses, is_any_of
from vgf_llm.text.tilt import calibrate_multiplier, linear_bonus
from vgf_llm.text.tilted_step import TILT, DraftTokens, TiltedRows, TiltOptions, tilted_token


def distributions_of(reference: Reference, context: Prefix, responses: Responses) -> tuple[Shortlist, Work]:
    """Return the distributions [R, T, K] of responses, and their cost: one forward where the sampler kept none."""
    distribution, work = responses.distribution, Work.none(len(responses.prompts))
    if distribution is None:
        distribution = reference.shortlists(context, responses)
        work = Work.of(responses.lengths_BN, reference=1)
    return Shortlist(distribution.ids.flatten(0, -3), distribution.logps.flatten(0, -3)), work


class TiltedPath:
    """The state of one decode: which rows still equal their draft, and the nats spent so far.

    A :class:`vgf_llm.text.choosing.TokenPicker`. Drafts are padded to the length that may be written, so
    that a position is one column of each.

    Args:
        reference: The frozen base model and its distribution.
        table_VD: Input embeddings that the particles live in.
        move: What is asked for; its responses are the first drafts.
        distribution: Their distributions [R, T, K].
        options: How to tilt and couple; those of ``prior`` by default.
    """

    def __init__(
        self,
        reference: Reference,
        table_VD: Tensor,
        move: Move,
        distribution: Shortlist,
        options: TiltOptions | None = None,
    ) -> None:
        responses, self.options = move.responses, options or TiltOptions()
        longest = max(reference.sampling.max_new_tokens, responses.tokens_BNT.shape[-1])
        missing = longest - responses.tokens_BNT.shape[-1]
        self.sampling, self.eos_ids, self.table_VD = reference.sampling, responses.eos_ids, table_VD
        self.nats, self.max_token_nats = move.nats, move.budget.max_token_nats
        self.tokens_RT = pad(responses.tokens_BNT.flatten(0, 1), (0, missing), value=responses.pad_id)
        self.inside_RT = pad(responses.mask_BNT.flatten(0, 1), (0, missing), value=False)
        self.movable_RT = pad(responses.movable_BNT.flatten(0, 1), (0, missing), value=False)
        self.displacement_RTD = pad(move.displacement_BNTD.flatten(0, 1), (0, 0, 0, missing))
        self.distribution = distribution.padded(longest)
        self.seeds_R = move.seeds_BN.flatten().to(self.tokens_RT.device)
        self.coupled_R = move.coupled_BN.flatten()
        self.unchanged_R = torch.ones_like(self.coupled_R)
        self.done_R = torch.zeros_like(self.coupled_R)
        self.nats_R = torch.zeros(len(self.seeds_R), device=self.tokens_RT.device)
        self.multiplier_R = torch.zeros_like(self.nats_R)

    def calibrate(self, columns: slice, nats: Tensor | float) -> None:
        """Set the multiplier of each row so that it spends ``nats`` (a number or [R]) over the draft's columns."""
        distribution = Shortlist(self.distribution.ids[:, columns], self.distribution.logps[:, columns])
        self.multiplier_R = calibrate_multiplier(
            distribution.logps,
            linear_bonus(
                self.table_VD, self.displacement_RTD[:, columns], self.tokens_RT[:, columns], distribution.ids
            ),
            is_any_of(distribution.ids, self.eos_ids),
            self.movable_RT[:, columns],
            nats,
            self.max_token_nats,
        )

    def __call__(self, logits_RV: Tensor, position: int) -> Tensor:
        """Pick every row's next token: an end by the reference's distribution, else text by the tilted one."""
        return self._step(truncate(logits_RV, self.sampling), position, None)

    def follow(self, distribution: Shortlist, position: int, token_R: Tensor, live_R: Tensor) -> Tensor:
        """Take over what an engine wrote; see :class:`vgf_llm.text.choosing.TokenPicker`."""
        self.done_R = self.done_R | ~live_R
        return self._step(distribution, position, token_R)

    def _step(self, distribution: Shortlist, position: int, given_R: Tensor | None) -> Tensor:
        """Pick a token, and go on from it, or from the one that is given."""
        picked = tilted_token(
            distribution, self._draft(position), self._rows(), position, self.table_VD, self.eos_ids, self.options
        )
        token_R = picked.token_R if given_R is None else given_R
        self.nats_R += picked.nats_R.masked_fill(self.done_R, 0)
        self.done_R = self.done_R | is_any_of(token_R, self.eos_ids)
        same_R = (token_R == self.tokens_RT[:, position]) & self.inside_RT[:, position]
        self.unchanged_R = self.unchanged_R & same_R
        return picked.token_R

    def _draft(self, position: int) -> DraftTokens:
        return DraftTokens(
            self.tokens_RT[:, position],
            self.inside_RT[:, position],
            self.movable_RT[:, position],
            self.displacement_RTD[:, position],
            Shortlist(self.distribution.ids[:, position], self.distribution.logps[:, position]),
        )

    def _rows(self) -> TiltedRows:
        return TiltedRows(
            self.seeds_R,
            self.coupled_R,
            self.unchanged_R,
            self.multiplier_R,
            self.nats - self.nats_R,
            torch.full_like(self.nats_R, self.max_token_nats),
            self.nats / self.movable_RT.sum(-1).clamp(min=1),
        )

    def plans(self, start_R: Tensor, tokens: int) -> list[RowPlan]:
        """Return each row's draft from ``start_R`` on, its displacement, multiplier, noise and nats that are left."""
        rule = {**distribution_rule(self.sampling), "eos_ids": list(self.eos_ids), **asdict(self.options)}
        rows, plans = self._rows(), []
        whole = {"token": self.tokens_RT.int(), "inside": self.inside_RT, "movable": self.movable_RT}
        whole |= {
            "displacement": self.displacement_RTD,
            "distribution_ids": self.distribution.ids.int(),
            "distribution_logps": self.distribution.logps,
        }
        for row, start in enumerate(start_R.tolist()):
            columns = slice(start, start + tokens)
            numbers = (rows.multiplier_R[row], rows.left_R[row], rows.cap_R[row], rows.share_R[row])
            tensors = {name: tensor[row, columns] for name, tensor in whole.items()}
            tensors["seed"], tensors["start"] = self.seeds_R[row], start_R[row].long()
            tensors["coupled"], tensors["unchanged"] = self.coupled_R[row], self.unchanged_R[row]
            tensors["numbers"] = torch.stack([number.float() for number in numbers])
            plans.append(RowPlan(TILT, rule, tensors))
        return plans
