"""The tilt of a reference distribution by a displacement, and the multipliers that make it spend a stated KL budget.

With p the distribution at one position over K tokens and b_v = <Delta, e_v - e_y> the bonus of token v,

    q_s(v) = p(v) exp(s b_v) / Z_s           for every v that is not EOS,        q_s(EOS) = p(EOS).

This is the form of the KL-regularised optimum with s = 1/alpha. One s serves a whole response, so positions where the
gradient is large spend more; s solves sum_t min(KL(q_s,t || p_t), cap) = nats by bisection, since every KL term grows
with s. The end of a response is the reference's business: EOS keeps its probability and takes no part in the KL.
"""

from __future__ import annotations

import torch
from torch import Tensor

_DOUBLINGS = 20
_BISECTIONS = 45
_NEWTON_STEPS, _CAP_SLACK, _NATS_ROUNDING = (
    12,
    2e-5,
    1e-6,
)  # a cap is met in three or four steps, unless the tilt saturates
_NUMBERS_PER_CHUNK = 2**24  # embeddings that are looked up at once: K * D for each position


def linear_bonus(table_VD: Tensor, displacement_XD: Tensor, token_X: Tensor, ids_XK: Tensor) -> Tensor:
    """Return b_v = <Delta, e_v - e_y> over a shortlist, float [..., K], a few positions at a time.

    Args:
        table_VD: Input embeddings that the particles live in.
        displacement_XD: Delta at each of X positions (any leading shape).
        token_X: The token y that stands there.
        ids_XK: Candidates v.
    """
    shape = ids_XK.shape
    delta_XD = displacement_XD.reshape(-1, displacement_XD.shape[-1]).float()
    ids_XK, token_X = ids_XK.reshape(-1, shape[-1]), token_X.reshape(-1)
    pieces = []
    at_once = max(1, _NUMBERS_PER_CHUNK // (shape[-1] * table_VD.shape[1]))
    for positions in torch.arange(len(ids_XK), device=ids_XK.device).split(at_once):
        delta_xD1 = delta_XD[positions].unsqueeze(-1)
        of_list_xK = (table_VD[ids_XK[positions]].float() @ delta_xD1).squeeze(-1)
        of_own_x = table_VD[token_X[positions]].float().unsqueeze(-2).matmul(delta_xD1).squeeze(-1)
        pieces.append(of_list_xK - of_own_x)
    return torch.cat(pieces).view(shape)


def tilt(logps: Tensor, bonus: Tensor, multiplier: Tensor, is_eos: Tensor) -> Tensor:
    """Return log q_s, float [..., K].

    Args:
        logps: log p, normalised over K; ``-inf`` outside the truncation.
        bonus: b [..., K].
        multiplier: s [...], at least 0.
        is_eos: bool [..., K], columns that keep their probability.
    """
    logps_text = logps.masked_fill(is_eos, -torch.inf)
    raised = logps_text + multiplier.unsqueeze(-1) * bonus.masked_fill(is_eos, 0)
    shift = logps_text.logsumexp(-1, keepdim=True) - raised.logsumexp(-1, keepdim=True)
    shift = shift.nan_to_num(nan=0.0)  # no token but EOS is left: nothing to tilt
    return torch.where(is_eos, logps, raised + shift)


def kl_divergence(logq: Tensor, logp: Tensor) -> Tensor:
    """Return KL(q || p) over the last dim, in nats; columns that q excludes count 0."""
    difference = torch.where(torch.isinf(logq), torch.zeros_like(logq), logq - logp)
    return (logq.exp() * difference).sum(-1).clamp(min=0)


def capped_multiplier(
    logps: Tensor, bonus: Tensor, multiplier: Tensor, is_eos: Tensor, max_nats: Tensor | float
) -> Tensor:
    """Return the largest multiplier, at most ``multiplier``, whose KL at a position is within its cap; [...].

    Where the cap binds, the KL is at most the cap and at least ``1 - 4e-5`` of it, up to float32's rounding.
    """
    max_nats = torch.as_tensor(max_nats, dtype=logps.dtype, device=logps.device).expand(multiplier.shape)
    spent = kl_divergence(tilt(logps, bonus, multiplier, is_eos), logps)
    over = spent > max_nats
    if not bool(over.any()):
        return multiplier
    high_X, cap_X = multiplier[over], max_nats[over]
    first_X = high_X * (cap_X / spent[over]).sqrt()
    return multiplier.masked_scatter(over, _at_cap(logps[over], bonus[over], is_eos[over], first_X, high_X, cap_X))


def _at_cap(
    logps_XK: Tensor, bonus_XK: Tensor, is_eos_XK: Tensor, s_X: Tensor, high_X: Tensor, cap_X: Tensor
) -> Tensor:
    """Return s in [0, high) with a KL just below the cap, from a first guess.

    Newton's method on sqrt(KL), which small tilts make linear in s, inside a bracket that is halved where a step leaves
    it. With m the probability of text and b centred, KL = m (s E_q[b] - log Z) and dKL/ds = m s Var_q[b]. Where
    rounding spoils that (huge multipliers), plain halving takes over.
    """
    wanted_X = high_X
    text_XK = logps_XK.masked_fill(is_eos_XK, -torch.inf)
    log_mass_X1 = text_XK.logsumexp(-1, keepdim=True)
    text_XK, mass_X = text_XK - log_mass_X1, log_mass_X1.exp().squeeze(-1)
    bonus_XK = bonus_XK.masked_fill(torch.isinf(text_XK), 0)
    bonus_XK = bonus_XK - (text_XK.exp() * bonus_XK).sum(-1, keepdim=True)
    low_X, goal_X, is_met_X = torch.zeros_like(s_X), cap_X * (1 - _CAP_SLACK), torch.zeros_like(s_X, dtype=torch.bool)
    for _ in range(_NEWTON_STEPS):
        raised_XK = text_XK + s_X.unsqueeze(-1) * bonus_XK
        log_z_X1 = raised_XK.logsumexp(-1, keepdim=True)
        q_XK = (raised_XK - log_z_X1).exp()
        mean_X, square_X = (q_XK * bonus_XK).sum(-1), (q_XK * bonus_XK.square()).sum(-1)
        nats_X = (mass_X * (s_X * mean_X - log_z_X1.squeeze(-1))).clamp(min=1e-30)
        is_under_X = nats_X <= cap_X
        low_X = torch.where(is_under_X & ~is_met_X, s_X, low_X)  # one that is met stays, so that none looks at others
        high_X = torch.where(is_under_X | is_met_X, high_X, s_X)
        is_met_X = is_met_X | (is_under_X & (nats_X >= cap_X * (1 - 2 * _CAP_SLACK)))
        is_met_X = is_met_X | (high_X - low_X <= 1e-6 * high_X)  # where rounding hides the cap
        if bool(is_met_X.all()):
            break
        slope_X = (mass_X * s_X * (square_X - mean_X.square())).clamp(min=1e-30)
        step_X = s_X + 2 * nats_X * ((goal_X / nats_X).sqrt() - 1) / slope_X
        is_inside_X = (step_X > low_X) & (step_X < high_X)
        s_X = torch.where(is_inside_X, step_X, (low_X + high_X) / 2)
    spent_X = kl_divergence(tilt(logps_XK, bonus_XK, low_X, is_eos_XK), logps_XK)
    is_off_X = ((spent_X - cap_X).abs() > 4 * _CAP_SLACK * cap_X + _NATS_ROUNDING) & (cap_X > 0)
    if not bool(is_off_X.any()):
        return low_X
    rows = [tensor[is_off_X] for tensor in (logps_XK, bonus_XK, is_eos_XK, wanted_X, cap_X)]
    return low_X.masked_scatter(is_off_X, _halved(*rows))


def _halved(logps_XK: Tensor, bonus_XK: Tensor, is_eos_XK: Tensor, high_X: Tensor, cap_X: Tensor) -> Tensor:
    """Return the largest s below ``high`` with a KL of at most the cap, by halving."""
    low_X = torch.zeros_like(high_X)
    for _ in range(_BISECTIONS):
        middle_X = (low_X + high_X) / 2
        too_far_X = kl_divergence(tilt(logps_XK, bonus_XK, middle_X, is_eos_XK), logps_XK) > cap_X
        low_X, high_X = torch.where(too_far_X, low_X, middle_X), torch.where(too_far_X, middle_X, high_X)
    return low_X


def calibrate_multiplier(
    logps_RTK: Tensor,
    bonus_RTK: Tensor,
    is_eos_RTK: Tensor,
    mask_RT: Tensor,
    nats: Tensor | float,
    max_token_nats: float,
) -> Tensor:
    """Return one multiplier a response, [R], that spends ``nats`` over the response's own contexts.

    Where the distribution cannot be tilted that far (every position is at its cap or certain), the result is large and
    the caps bind. A response without any bonus gets 0.

    Args:
        logps_RTK: log p at every position.
        bonus_RTK: b at every position.
        is_eos_RTK: bool.
        mask_RT: bool, positions that count.
        nats: KL budget of a response: a number, or one each [R].
        max_token_nats: Cap on one position.
    """

    def spent(s_R: Tensor) -> Tensor:
        s_RT = s_R.unsqueeze(-1).expand(mask_RT.shape)
        nats_RT = kl_divergence(tilt(logps_RTK, bonus_RTK, s_RT, is_eos_RTK), logps_RTK)
        return (nats_RT.clamp(max=max_token_nats) * mask_RT).sum(-1)

    live_RTK = mask_RT.unsqueeze(-1) & ~is_eos_RTK & ~torch.isinf(logps_RTK)
    largest_R = bonus_RTK.abs().masked_fill(~live_RTK, 0).flatten(1).amax(-1)
    high_R = torch.where(largest_R > 0, 1 / largest_R.clamp(min=1e-30), torch.zeros_like(largest_R))
    for _ in range(_DOUBLINGS):
        short_R = spent(high_R) < nats
        if not bool((short_R & (largest_R > 0)).any()):
            break
        high_R = torch.where(short_R, high_R * 2, high_R)
    low_R = torch.zeros_like(high_R)
    for _ in range(_BISECTIONS):
        middle_R = (low_R + high_R) / 2
        short_R = spent(middle_R) < nats
        low_R, high_R = torch.where(short_R, middle_R, low_R), torch.where(short_R, high_R, middle_R)
    return low_R
