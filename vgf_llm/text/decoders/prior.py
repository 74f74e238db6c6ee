"""``prior``: the reference writes, the displacement only tilts it.

At position t of response y, over the reference's shortlist (plus y_t while nothing has changed),

    b_t(v) = <Delta_t, e_v - e_{y_t}>,        q_t(v) ∝ p_t(v) exp(s b_t(v)),

with one multiplier s a response calibrated on the original contexts to the budget in nats, a cap a token, and no
more than what is left of the budget on the path (:mod:`vgf_llm.text.tilt`). The token is argmax_v(log q_t(v) + g_t(v))
with the Gumbel noise of y's own sampling, drawn from its posterior given y (:mod:`vgf_llm.text.noise`), so that a zero
displacement gives y back token for token. Over y ~ p the noise is exactly Gumbel, so y' ~ q for a displacement that
does not depend on y's noise; a gradient taken at y does, a little, and from the second round on y itself is no draw
from p. The KL reported is that of the laws along the path that is written. It says nothing of the selection that
follows (best of N adds at most log N - (N-1)/N).

Whether a response ends is decided first and by the reference alone: an original that still stands keeps its EOS and
gets no other, a changed one ends with the reference's probability.

Departure from a plain logits processor: while a row still equals its original, the law of the parallel forward is used
in place of the sequential one, so that rounding cannot flip a token that nothing pushed.

Of a response that is to be drawn afresh (``coupled_BN`` false) only the displacement and the multiplier are used:
independent texts of one moved particle.

Cost a response: one sequential decode (2PT FLOPs, P parameters, T tokens), and one parallel forward (2PT) where the
sampler did not keep the laws of the original.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from vgf_llm.text.law import Shortlist, truncate
from vgf_llm.text.noise import gumbel_noise, maximum_noise, posterior_gumbel_noise
from vgf_llm.text.protocols import Decoded, Move, Work
from vgf_llm.text.reference import Reference, ReferencePrefix
from vgf_llm.text.responses import is_any_of
from vgf_llm.text.tilt import calibrate_multiplier, capped_multiplier, kl_divergence, linear_bonus, tilt

_ENDS, _GOES_ON = -1, -2  # the noise of "does it end here", beside that of the tokens


class PriorDecoder:
    """Reference-tilted autoregressive decoding with posterior-Gumbel coupling.

    Args:
        reference: The frozen base model and its law.
        table_VD: Input embeddings that the particles live in.
    """

    def __init__(self, reference: Reference, table_VD: Tensor) -> None:
        self.reference = reference
        self.table_VD = table_VD

    def prepare(self, prompts: list[list[int]]) -> ReferencePrefix:
        """Run the prompts through the reference once."""
        return self.reference.prefix(prompts)

    @torch.no_grad()
    def decode(self, context: ReferencePrefix, move: Move) -> Decoded:
        """Write every response again under the tilted law."""
        n = move.responses.tokens_BNT.shape[1]
        originals, law = move.responses, move.responses.law
        work = Work.none(len(originals.prompts))
        if law is None:  # written by someone else: one parallel forward
            law = self.reference.shortlists(context, originals)
            work = Work.of(originals.lengths_BN, reference=1)
        path = _Path(self, move, Shortlist(law.ids.flatten(0, -3), law.logps.flatten(0, -3)))
        written = self.reference.write(context, n, path.choose)
        return Decoded(written, path.nats_R.view(-1, n), work + Work.of(written.lengths_BN, reference=1))


@dataclass
class _Path:
    """The state of one decode: which rows still equal their original, and the nats spent so far.

    Everything of the originals is padded to the length that may be written, so that a position is one column of each.
    """

    decoder: PriorDecoder
    move: Move
    originals: Shortlist

    def __post_init__(self) -> None:
        responses = self.move.responses
        longest = max(self.decoder.reference.sampling.max_new_tokens, responses.tokens_BNT.shape[-1])
        missing = longest - responses.tokens_BNT.shape[-1]
        self.tokens_RT = pad(responses.tokens_BNT.flatten(0, 1), (0, missing), value=responses.pad_id)
        self.inside_RT = pad(responses.mask_BNT.flatten(0, 1), (0, missing), value=False)
        self.movable_RT = pad(responses.movable_BNT.flatten(0, 1), (0, missing), value=False)
        self.displacement_RTD = pad(self.move.displacement_BNTD.flatten(0, 1), (0, 0, 0, missing))
        self.originals = Shortlist(
            pad(self.originals.ids, (0, 0, 0, missing)), pad(self.originals.logps, (0, 0, 0, missing), value=-torch.inf)
        )
        self.seeds_R = self.move.seeds_BN.flatten().to(self.tokens_RT.device)
        self.coupled_R = self.move.coupled_BN.flatten()
        self.unchanged_R = self.coupled_R
        self.done_R = torch.zeros_like(self.coupled_R)
        self.nats_R = torch.zeros(len(self.seeds_R), device=self.tokens_RT.device)
        self.multiplier_R = calibrate_multiplier(
            self.originals.logps,
            linear_bonus(self.decoder.table_VD, self.displacement_RTD, self.tokens_RT, self.originals.ids),
            self._is_eos(self.originals.ids),
            self.movable_RT,
            self.move.nats,
            self.move.budget.max_token_nats,
        )

    def choose(self, logits_RV: Tensor, position: int) -> Tensor:
        """Pick the next token of every row: whether it ends by the reference's law, else text by the tilted law."""
        as_original_R = self.unchanged_R & self.inside_RT[:, position]
        law = self._law(logits_RV, as_original_R, position)
        is_eos_RK = self._is_eos(law.ids)
        logq_RK, nats_R = self._tilted(law, is_eos_RK, position)
        ends_R = torch.where(as_original_R, ~self.movable_RT[:, position], self._ends(law, is_eos_RK, position))
        allowed_RK = is_eos_RK == ends_R.unsqueeze(-1)
        scores_RK = (logq_RK + self._noise(law, position)).masked_fill(~allowed_RK, -torch.inf)
        token_R = law.ids.gather(-1, scores_RK.argmax(-1, keepdim=True)).squeeze(-1)
        token_R = torch.where(as_original_R & ends_R, self.tokens_RT[:, position], token_R)
        self.nats_R += nats_R.masked_fill(self.done_R, 0)
        self.done_R = self.done_R | ends_R
        self.unchanged_R = as_original_R & (token_R == self.tokens_RT[:, position])
        return token_R

    def _is_eos(self, ids: Tensor) -> Tensor:
        return is_any_of(ids, self.move.responses.eos_ids)

    def _law(self, logits_RV: Tensor, as_original_R: Tensor, position: int) -> Shortlist:
        """The reference's law here; on rows that still equal their original, that of the parallel forward."""
        law = truncate(logits_RV, self.decoder.reference.sampling)
        use_R1, missing = as_original_R.unsqueeze(-1), self.originals.ids.shape[-1] - law.ids.shape[-1]
        return Shortlist(
            torch.where(use_R1, self.originals.ids[:, position], pad(law.ids, (0, missing))),
            torch.where(use_R1, self.originals.logps[:, position], pad(law.logps, (0, missing), value=-torch.inf)),
        )

    def _tilted(self, law: Shortlist, is_eos_RK: Tensor, position: int) -> tuple[Tensor, Tensor]:
        """Return log q [R, K] and the KL spent at this position [R], within the cap and within what is left."""
        bonus_RK = linear_bonus(
            self.decoder.table_VD, self.displacement_RTD[:, position], self.tokens_RT[:, position], law.ids
        )
        wanted_R = self.multiplier_R * self.movable_RT[:, position]
        left_R = (self.move.nats - self.nats_R).clamp(min=0, max=self.move.budget.max_token_nats)
        logq_RK = tilt(
            law.logps, bonus_RK, capped_multiplier(law.logps, bonus_RK, wanted_R, is_eos_RK, left_R), is_eos_RK
        )
        return logq_RK, kl_divergence(logq_RK, law.logps)

    def _ends(self, law: Shortlist, is_eos_RK: Tensor, position: int) -> Tensor:
        """Decide by fresh noise, with the reference's probability of EOS, whether a row ends here."""
        noise_R2 = gumbel_noise(
            self.seeds_R, position, self.seeds_R.new_tensor([_ENDS, _GOES_ON]).expand(len(self.seeds_R), 2)
        )
        end_R = law.logps.masked_fill(~is_eos_RK, -torch.inf).logsumexp(-1) + noise_R2[:, 0]
        go_on_R = law.logps.masked_fill(is_eos_RK, -torch.inf).logsumexp(-1) + noise_R2[:, 1]
        return end_R > go_on_R

    def _noise(self, law: Shortlist, position: int) -> Tensor:
        """Gumbel noise of the original sampling where the original had this text on its list, fresh elsewhere."""
        ids_RK = self.originals.ids[:, position]
        logps_RK = self.originals.logps[:, position].masked_fill(self._is_eos(ids_RK), -torch.inf)
        logps_RK = logps_RK.masked_fill(~self.movable_RT[:, position].unsqueeze(-1), -torch.inf)
        known_RK = posterior_gumbel_noise(
            logps_RK,
            Shortlist(ids_RK, logps_RK).column_of(self.tokens_RT[:, position]),
            gumbel_noise(self.seeds_R, position, ids_RK),
            maximum_noise(self.seeds_R, position),
        )
        known_RJ = ~torch.isinf(logps_RK) & self.coupled_R.unsqueeze(-1)
        same_RKJ = (law.ids.unsqueeze(-1) == ids_RK.unsqueeze(-2)) & known_RJ.unsqueeze(-2)
        found_RK, where_RK = same_RKJ.any(-1), same_RKJ.long().argmax(-1)
        return torch.where(found_RK, known_RK.gather(-1, where_RK), gumbel_noise(self.seeds_R, position, law.ids))
