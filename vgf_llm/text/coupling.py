"""Couplings: draw y' ~ q so that it stays close to a draft's token y ~ p, and equals it where q = p.

``gumbel``    y' = argmax_v(log q(v) + g_v), g the noise that chose y from p, drawn from its posterior given y
              (:mod:`vgf_llm.text.noise`). The same noise serves every q, so y' changes monotonically with the tilt and
              it is of use in another context too.
``maximal``   y' = y with probability min(1, q(y) / p(y)), else a draw from (q - p)+ / sum (q - p)+. No coupling keeps
              more tokens: P(y' = y) = sum_v min(p(v), q(v)) (the rejection step of speculative sampling, Leviathan et
              al. 2023).
"""

from __future__ import annotations

import torch
from torch import Tensor

from vgf_llm.text.distribution import Shortlist
from vgf_llm.text.noise import gumbel_noise, maximum_noise, posterior_gumbel_noise

_KEEPS = -3  # the noise of "is the token kept", beside that of the tokens


def draft_noise(
    distribution: Shortlist,
    draft_distribution: Shortlist,
    draft_token_R: Tensor,
    known_R: Tensor,
    seeds_R: Tensor,
    position: int | Tensor,
) -> Tensor:
    """Return the Gumbel noise of the draft's own sampling where the draft had a token on its list, fresh elsewhere.

    Args:
        distribution: The distribution [R, K] that is drawn from now.
        draft_distribution: The distribution [R, K'] that the draft's token was drawn from; ``-inf`` on columns without
            known noise.
        draft_token_R: The token that won.
        known_R: bool, rows whose noise is the draft's; the others' is fresh.
        seeds_R: int64, one seed a row.
        position: Place in the response: one for all rows, or int64 [R].
    """
    known_RK = posterior_gumbel_noise(
        draft_distribution.logps,
        draft_distribution.column_of(draft_token_R),
        gumbel_noise(seeds_R, position, draft_distribution.ids),
        maximum_noise(seeds_R, position),
    )
    known_RJ = ~torch.isinf(draft_distribution.logps) & known_R.unsqueeze(-1)
    same_RKJ = (distribution.ids.unsqueeze(-1) == draft_distribution.ids.unsqueeze(-2)) & known_RJ.unsqueeze(-2)
    found_RK, where_RK = same_RKJ.any(-1), same_RKJ.long().argmax(-1)
    return torch.where(found_RK, known_RK.gather(-1, where_RK), gumbel_noise(seeds_R, position, distribution.ids))


def maximally_coupled(
    logq_RK: Tensor, distribution: Shortlist, token_R: Tensor, seeds_R: Tensor, position: int | Tensor
) -> Tensor:
    """Return y' ~ q, int64 [R], that equals y ~ p as often as any coupling can.

    Args:
        logq_RK: log q over the columns of ``distribution``.
        distribution: p [R, K], y among its columns.
        token_R: y.
        seeds_R: int64, one seed a row.
        position: Place in the response: one for all rows, or int64 [R].
    """
    own_R1 = distribution.column_of(token_R).unsqueeze(-1)
    log_ratio_R = (logq_RK - distribution.logps).gather(-1, own_R1).squeeze(-1)
    residual_RK = (logq_RK.exp() - distribution.logps.exp()).clamp(min=0)
    log_uniform_R = -torch.exp(-gumbel_noise(seeds_R, position, torch.full_like(own_R1, _KEEPS)).squeeze(-1))
    kept_R = (log_uniform_R <= log_ratio_R) | (residual_RK == 0).all(-1)
    drawn_R1 = (residual_RK.log() + gumbel_noise(seeds_R, position, distribution.ids)).argmax(-1, keepdim=True)
    return torch.where(kept_R, token_R, distribution.ids.gather(-1, drawn_R1).squeeze(-1))
