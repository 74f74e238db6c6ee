"""``prior``: the reference writes, the displacement only tilts it.

At position t of response y, over the reference's shortlist (plus y_t while nothing has changed),

    b_t(v) = <Delta_t, e_v - e_{y_t}>,        q_t(v) ∝ p_t(v) exp(s b_t(v)),

with one multiplier s a response calibrated on the original contexts to the budget in nats, and a cap a token
(:mod:`vgf_llm.text.tilt`). The token is argmax_v(log q_t(v) + g_t(v)) with the Gumbel noise of y's own sampling, drawn
from its posterior given y (:mod:`vgf_llm.text.noise`): over y ~ p the noise is exactly Gumbel, so y' ~ q, and a zero
displacement gives y back token for token. The KL is summed on the path that is written, so the distance spent is
measured; it says nothing of the selection that follows (best of N adds at most log N - (N-1)/N).

Departure from a plain logits processor: while a row still equals its original, the law of the parallel forward is used
in place of the sequential one, so that rounding cannot flip a token that nothing pushed.

Cost a response: one parallel forward (2PT FLOPs) and one sequential decode (2PT), P parameters, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vgf_llm.text.law import Shortlist, truncate
from vgf_llm.text.noise import gumbel_noise, maximum_noise, posterior_gumbel_noise
from vgf_llm.text.protocols import Decoded, Move
from vgf_llm.text.reference import Reference, ReferencePrefix
from vgf_llm.text.responses import is_any_of
from vgf_llm.text.tilt import calibrate_multiplier, capped_multiplier, kl_divergence, tilt

_POSITIONS_PER_CHUNK = 512  # K * D numbers each


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
        originals = self.reference.shortlists(context, move.responses)
        path = _Path(self, move, originals)
        written = self.reference.write(context, n, path.choose)
        return Decoded(written, path.nats_R.view(-1, n))

    def bonus(self, displacement_XD: Tensor, token_X: Tensor, ids_XK: Tensor) -> Tensor:
        """Return b_v = <Delta, e_v - e_y> over a shortlist, float [..., K], a few positions at a time."""
        shape = ids_XK.shape
        delta_XD = displacement_XD.reshape(-1, displacement_XD.shape[-1]).float()
        ids_XK, token_X = ids_XK.reshape(-1, shape[-1]), token_X.reshape(-1)
        pieces = []
        for positions in torch.arange(len(ids_XK), device=ids_XK.device).split(_POSITIONS_PER_CHUNK):
            delta_xD1 = delta_XD[positions].unsqueeze(-1)
            of_list_xK = (self.table_VD[ids_XK[positions]].float() @ delta_xD1).squeeze(-1)
            pieces.append(
                of_list_xK - self.table_VD[token_X[positions]].float().unsqueeze(-2).matmul(delta_xD1).squeeze(-1)
            )
        return torch.cat(pieces).view(shape)


@dataclass
class _Path:
    """The state of one decode: which rows still equal their original, and the nats spent so far."""

    decoder: PriorDecoder
    move: Move
    originals: Shortlist

    def __post_init__(self) -> None:
        responses = self.move.responses
        self.tokens_RT = responses.tokens_BNT.flatten(0, 1)
        self.mask_RT = responses.mask_BNT.flatten(0, 1)
        self.movable_RT = responses.movable_BNT.flatten(0, 1)
        self.displacement_RTD = self.move.displacement_BNTD.flatten(0, 1)
        self.seeds_R = self.move.seeds_BN.flatten().to(self.tokens_RT.device)
        self.unchanged_R = torch.ones_like(self.seeds_R, dtype=torch.bool)
        self.done_R = torch.zeros_like(self.unchanged_R)
        self.nats_R = torch.zeros(len(self.seeds_R), device=self.tokens_RT.device)
        bonus_RTK = self.decoder.bonus(self.displacement_RTD, self.tokens_RT, self.originals.ids)
        self.multiplier_R = calibrate_multiplier(
            self.originals.logps,
            bonus_RTK,
            is_any_of(self.originals.ids, responses.eos_ids),
            self.movable_RT,
            self.move.nats,
            self.move.max_token_nats,
        )

    def choose(self, logits_RV: Tensor, position: int) -> Tensor:
        """Pick the next token of every row from the tilted law, with the noise of the original sampling."""
        law = self._law(logits_RV, position)
        logq_RK, nats_R = self._tilted(law, position)
        winner_R1 = (logq_RK + self._noise(law, position)).argmax(-1, keepdim=True)
        token_R = law.ids.gather(-1, winner_R1).squeeze(-1)
        self.nats_R += nats_R.masked_fill(self.done_R, 0)
        self.done_R = self.done_R | is_any_of(token_R, self.move.responses.eos_ids)
        self.unchanged_R = self.unchanged_R & self._inside(position) & (token_R == self._token(position))
        return token_R

    def _inside(self, position: int) -> Tensor:
        """True on rows whose original has a token at this position."""
        if position >= self.mask_RT.shape[1]:
            return torch.zeros_like(self.unchanged_R)
        return self.mask_RT[:, position]

    def _token(self, position: int) -> Tensor:
        if position >= self.tokens_RT.shape[1]:
            return torch.full_like(self.seeds_R, -1)
        return self.tokens_RT[:, position]

    def _law(self, logits_RV: Tensor, position: int) -> Shortlist:
        """The reference's law here; on rows that still equal their original, that of the parallel forward."""
        reference = self.decoder.reference
        law = truncate(logits_RV, reference.sampling)
        law = Shortlist(_pad(law.ids, 0), _pad(law.logps, -torch.inf))
        if position >= self.tokens_RT.shape[1]:
            return law
        use_R1 = (self.unchanged_R & self._inside(position)).unsqueeze(-1)
        return Shortlist(
            torch.where(use_R1, self.originals.ids[:, position], law.ids),
            torch.where(use_R1, self.originals.logps[:, position], law.logps),
        )

    def _tilted(self, law: Shortlist, position: int) -> tuple[Tensor, Tensor]:
        """Return log q [R, K] and the KL spent at this position [R]."""
        if position >= self.tokens_RT.shape[1]:
            return law.logps, torch.zeros_like(self.nats_R)
        bonus_RK = self.decoder.bonus(self.displacement_RTD[:, position], self.tokens_RT[:, position], law.ids)
        is_eos_RK = is_any_of(law.ids, self.move.responses.eos_ids)
        wanted_R = self.multiplier_R * self.movable_RT[:, position]
        multiplier_R = capped_multiplier(law.logps, bonus_RK, wanted_R, is_eos_RK, self.move.max_token_nats)
        logq_RK = tilt(law.logps, bonus_RK, multiplier_R, is_eos_RK)
        return logq_RK, kl_divergence(logq_RK, law.logps)

    def _noise(self, law: Shortlist, position: int) -> Tensor:
        """Gumbel noise of the original sampling where the original had this token on its list, fresh elsewhere."""
        fresh_RK = gumbel_noise(self.seeds_R, position, law.ids)
        if position >= self.tokens_RT.shape[1]:
            return fresh_RK
        ids_RK, logps_RK = self.originals.ids[:, position], self.originals.logps[:, position]
        winner_R = Shortlist(ids_RK, logps_RK).column_of(self.tokens_RT[:, position])
        known_RK = posterior_gumbel_noise(
            logps_RK, winner_R, gumbel_noise(self.seeds_R, position, ids_RK), maximum_noise(self.seeds_R, position)
        )
        same_RKJ = (law.ids.unsqueeze(-1) == ids_RK.unsqueeze(-2)) & ~torch.isinf(logps_RK).unsqueeze(-2)
        same_RKJ &= self._inside(position)[:, None, None]
        found_RK, where_RK = same_RKJ.any(-1), same_RKJ.long().argmax(-1)
        return torch.where(found_RK, known_RK.gather(-1, where_RK), fresh_RK)


def _pad(x_RK: Tensor, value: float) -> Tensor:
    return torch.nn.functional.pad(x_RK, (0, 1), value=value)
