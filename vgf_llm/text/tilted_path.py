"""The tilted law along responses that are written again, token by token, and the noise that ties them to their drafts.

A draft is a text with the law before each of its tokens: an original of the sampler, or a block that was just drafted.
At position t, over the draft's shortlist (plus y_t while nothing has changed),

    b_t(v) = <Delta_t, e_v - e_{y_t}>,        q_t(v) ∝ p_t(v) exp(s b_t(v)),

and the token is argmax_v(log q_t(v) + g_t(v)) with the draft's own Gumbel noise, drawn from its posterior given y
(or coupled maximally: :mod:`vgf_llm.text.coupling`).
Shared by the decoders ``prior`` (the draft is the original) and ``block`` (the draft is renewed block by block).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args, get_type_hints

import torch
from torch import Tensor
from torch.nn.functional import pad

from vgf_llm.text.coupling import draft_noise, maximally_coupled
from vgf_llm.text.law import Shortlist, truncate
from vgf_llm.text.noise import gumbel_noise
from vgf_llm.text.protocols import Move, Work
from vgf_llm.text.reference import Reference, ReferencePrefix
from vgf_llm.text.responses import Responses, is_any_of
from vgf_llm.text.tilt import calibrate_multiplier, capped_multiplier, kl_divergence, linear_bonus, tilt

_ENDS, _GOES_ON = -1, -2  # the noise of "does it end here", beside that of the tokens
_LARGEST_TILT = 2.0**20  # nats between two tokens; more than any law leaves room for


@dataclass(frozen=True)
class TiltOptions:
    """How a law is tilted and how its draws are coupled; :class:`vgf_llm.text.PriorDecoder` says what is what.

    Attributes:
        multiplier: One a ``response``, or one a ``token``.
        coupling: ``gumbel`` or ``maximal`` (:mod:`vgf_llm.text.coupling`).
        after_change: Whether a row that no longer equals its draft is to ``keep`` its tilt or ``drop`` it.
    """

    multiplier: Literal["response", "token"] = "response"
    coupling: Literal["gumbel", "maximal"] = "gumbel"
    after_change: Literal["keep", "drop"] = "keep"

    def __post_init__(self) -> None:
        """Validate the names.

        Raises:
            ValueError: Naming the option and the value seen.
        """
        for name, hint in get_type_hints(TiltOptions).items():
            if getattr(self, name) not in get_args(hint):
                raise ValueError(f"{name} must be {' or '.join(get_args(hint))}, got {getattr(self, name)!r}")


def laws_of(reference: Reference, context: ReferencePrefix, responses: Responses) -> tuple[Shortlist, Work]:
    """Return the laws [R, T, K] of responses and what they cost: one parallel forward where the sampler kept none."""
    law, work = responses.law, Work.none(len(responses.prompts))
    if law is None:
        law = reference.shortlists(context, responses)
        work = Work.of(responses.lengths_BN, reference=1)
    return Shortlist(law.ids.flatten(0, -3), law.logps.flatten(0, -3)), work


def ends_here(law: Shortlist, is_eos_RK: Tensor, seeds_R: Tensor, position: int) -> Tensor:
    """Decide by fresh noise, with the reference's probability of EOS, whether a row ends here; bool [R]."""
    noise_R2 = gumbel_noise(seeds_R, position, seeds_R.new_tensor([_ENDS, _GOES_ON]).expand(len(seeds_R), 2))
    end_R = law.logps.masked_fill(~is_eos_RK, -torch.inf).logsumexp(-1) + noise_R2[:, 0]
    go_on_R = law.logps.masked_fill(is_eos_RK, -torch.inf).logsumexp(-1) + noise_R2[:, 1]
    return end_R > go_on_R


class TiltedPath:
    """The state of one decode: which rows still equal their draft, and the nats spent so far.

    Everything of the drafts is padded to the length that may be written, so that a position is one column of each.

    Args:
        reference: The frozen base model and its law.
        table_VD: Input embeddings that the particles live in.
        move: What is asked for; its responses are the first drafts.
        law: Their laws [R, T, K].
        options: How to tilt and couple; those of ``prior`` by default.
    """

    def __init__(
        self, reference: Reference, table_VD: Tensor, move: Move, law: Shortlist, options: TiltOptions | None = None
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
        self.law = law.padded(longest)
        self.seeds_R = move.seeds_BN.flatten().to(self.tokens_RT.device)
        self.coupled_R = move.coupled_BN.flatten()
        self.unchanged_R = torch.ones_like(self.coupled_R)
        self.done_R = torch.zeros_like(self.coupled_R)
        self.nats_R = torch.zeros(len(self.seeds_R), device=self.tokens_RT.device)
        self.multiplier_R = torch.zeros_like(self.nats_R)

    def calibrate(self, columns: slice, nats: Tensor | float) -> None:
        """Set the multiplier of each row so that it spends ``nats`` (a number or [R]) over the draft's columns."""
        law = Shortlist(self.law.ids[:, columns], self.law.logps[:, columns])
        self.multiplier_R = calibrate_multiplier(
            law.logps,
            linear_bonus(self.table_VD, self.displacement_RTD[:, columns], self.tokens_RT[:, columns], law.ids),
            self._is_eos(law.ids),
            self.movable_RT[:, columns],
            nats,
            self.max_token_nats,
        )

    def choose(self, logits_RV: Tensor, position: int) -> Tensor:
        """Pick the next token of every row: whether it ends by the reference's law, else text by the tilted law."""
        as_draft_R = self.unchanged_R & self.coupled_R & self.inside_RT[:, position]
        law = self._law_here(logits_RV, as_draft_R, position)
        is_eos_RK = self._is_eos(law.ids)
        logq_RK, nats_R = self._tilted(law, is_eos_RK, position)
        fresh_ends_R = ends_here(law, is_eos_RK, self.seeds_R, position)
        ends_R = torch.where(as_draft_R, ~self.movable_RT[:, position], fresh_ends_R)
        allowed_RK = is_eos_RK == ends_R.unsqueeze(-1)
        scores_RK = (logq_RK + self._noise(law, position)).masked_fill(~allowed_RK, -torch.inf)
        token_R = law.ids.gather(-1, scores_RK.argmax(-1, keepdim=True)).squeeze(-1)
        if self.options.coupling == "maximal":
            coupled_R = maximally_coupled(logq_RK, law, self.tokens_RT[:, position], self.seeds_R, position)
            token_R = torch.where(as_draft_R & ~ends_R, coupled_R, token_R)
        token_R = torch.where(as_draft_R & ends_R, self.tokens_RT[:, position], token_R)
        self.nats_R += nats_R.masked_fill(self.done_R, 0)
        self.done_R = self.done_R | ends_R
        same_R = (token_R == self.tokens_RT[:, position]) & self.inside_RT[:, position]
        self.unchanged_R = self.unchanged_R & same_R
        return token_R

    def _is_eos(self, ids: Tensor) -> Tensor:
        return is_any_of(ids, self.eos_ids)

    def _law_here(self, logits_RV: Tensor, as_draft_R: Tensor, position: int) -> Shortlist:
        """The reference's law here; on rows that still equal their draft, the one that the draft comes with."""
        law = truncate(logits_RV, self.sampling)
        use_R1, missing = as_draft_R.unsqueeze(-1), self.law.ids.shape[-1] - law.ids.shape[-1]
        return Shortlist(
            torch.where(use_R1, self.law.ids[:, position], pad(law.ids, (0, missing))),
            torch.where(use_R1, self.law.logps[:, position], pad(law.logps, (0, missing), value=-torch.inf)),
        )

    def _tilted(self, law: Shortlist, is_eos_RK: Tensor, position: int) -> tuple[Tensor, Tensor]:
        """Return log q [R, K] and the KL spent at this position [R], within the cap and within what is left."""
        bonus_RK = linear_bonus(self.table_VD, self.displacement_RTD[:, position], self.tokens_RT[:, position], law.ids)
        wanted_R = self.multiplier_R
        left_R = (self.nats - self.nats_R).clamp(min=0, max=self.max_token_nats)
        if self.options.multiplier == "token":  # as far as a token's own share of the nats allows
            barred_RK = is_eos_RK | torch.isinf(law.logps)
            bonus_RK = bonus_RK.masked_fill(barred_RK, 0)
            largest_R = bonus_RK.abs().amax(-1)
            wanted_R = _LARGEST_TILT / largest_R.clamp(min=1e-30) * (largest_R > 0) * (self.nats > 0)
            left_R = torch.minimum(left_R, self.nats / self.movable_RT.sum(-1).clamp(min=1))
        wanted_R = wanted_R * self.movable_RT[:, position]
        if self.options.after_change == "drop":
            wanted_R = wanted_R * self.unchanged_R
        logq_RK = tilt(
            law.logps, bonus_RK, capped_multiplier(law.logps, bonus_RK, wanted_R, is_eos_RK, left_R), is_eos_RK
        )
        return logq_RK, kl_divergence(logq_RK, law.logps)

    def _noise(self, law: Shortlist, position: int) -> Tensor:
        """Gumbel noise that picks the text: the draft's own, or fresh where the coupling has no use for it."""
        if self.options.coupling == "maximal":
            return gumbel_noise(self.seeds_R, position, law.ids)
        ids_RK = self.law.ids[:, position]
        without_RK = self._is_eos(ids_RK) | ~self.movable_RT[:, position].unsqueeze(-1)
        draft_law = Shortlist(ids_RK, self.law.logps[:, position].masked_fill(without_RK, -torch.inf))
        return draft_noise(law, draft_law, self.tokens_RT[:, position], self.coupled_R, self.seeds_R, position)
