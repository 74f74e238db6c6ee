"""What a secant head learns from at one step of a value that is still moving: a few exact changes a response.

Where the value is fixed, its changes are scored once and fitted to (`secant_fit`). Trained along, the head is shown
fresh substitutions of fresh responses at every step, scored by the value of the moment. The head's unit stays 1: what
it predicts is in units of the reward.

Cost: S forwards of the value over each response.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reward_models.modelling import RewardModel
from reward_models.secant import base_direction, direction_scale
from vgf_llm.text.distribution import Shortlist
from vgf_llm.text.noise import gumbel_noise
from vgf_llm.text.responses import Responses, is_any_of

_ROWS = 128  # substituted responses scored in one forward


@dataclass(frozen=True)
class SecantRows:
    """S substitutions in each of R responses, as `value_losses.secant_loss` reads them.

    Attributes:
        features_RSF: Inputs of the head, float32 (`secant_features`).
        steps_RSD: (e_v - e_{y_t}) / rms of the table, float32.
        targets_RS: What the base direction leaves of the exact change, times T (1 for pooling "last"), float32.
        known_RS: What the base direction says, in the same units.
        mask_RS: bool, substitutions that there are: a short response may have fewer than S.
    """

    features_RSF: Tensor
    steps_RSD: Tensor
    targets_RS: Tensor
    known_RS: Tensor
    mask_RS: Tensor


@torch.no_grad()
def secant_rows(
    value: RewardModel, responses: Responses, distribution: Shortlist, seeds_BN: Tensor, substitutions: int, base: str
) -> SecantRows:
    """Draw substitutions, score them exactly, and return what a head is to make of them.

    Args:
        value: The value as it is now.
        responses: B x N responses, R = B * N.
        distribution: Shortlists of the responses' tokens, [..., T, K] in the order of the R responses.
        seeds_BN: int64; the draw is a function of them alone.
        substitutions: S, at least 1.
        base: What the head adds to: "skip" or "none".
    """
    t_RS, v_RS, mask_RS = draw_substitutions(responses, distribution, seeds_BN.flatten(), substitutions)
    prefix, u_BNTD = value.prefix(responses.prompts), value.embed(responses.tokens_BNT).detach()
    values_BN, base_BNTD, features = base_direction(value, prefix, u_BNTD, responses.mask_BNT, base)
    rows_R1 = torch.arange(len(t_RS), device=t_RS.device).unsqueeze(1)
    u_RSD = u_BNTD.flatten(0, 1)[rows_R1, t_RS]
    step_RSD = (value.embed(v_RS).detach() - u_RSD).float()
    exact_RS = _substituted_values(value, prefix, responses, t_RS, v_RS) - values_BN.flatten().unsqueeze(1)
    known_RS = (base_BNTD.flatten(0, 1)[rows_R1, t_RS] * step_RSD).sum(-1)
    unit_R1 = direction_scale(value, responses.mask_BNT).flatten().unsqueeze(1) * value.table_scale
    return SecantRows(
        features.flatten(0, 1)[rows_R1, t_RS],
        step_RSD / value.table_scale,
        ((exact_RS - known_RS) / unit_R1).masked_fill(~mask_RS, 0.0),
        (known_RS / unit_R1).masked_fill(~mask_RS, 0.0),
        mask_RS,
    )


def draw_substitutions(
    responses: Responses, distribution: Shortlist, seeds_R: Tensor, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw S pairs (position, new token) a response, uniformly and without replacement, from their shortlists.

    An EOS is neither moved nor put in, and no token replaces itself.

    Returns:
        Positions, tokens and whether there is such a pair, each [R, S] with S = min(count, T * K).
    """
    R, (T, K), device = len(seeds_R), distribution.ids.shape[-2:], distribution.ids.device
    ids_RTK, own_RT1 = distribution.ids.reshape(R, T, K), responses.tokens_BNT.reshape(R, T, 1)
    allowed_RTK = responses.movable_BNT.reshape(R, T, 1) & ~distribution.logps.reshape(R, T, K).isinf()
    allowed_RTK = allowed_RTK & (ids_RTK != own_RT1) & ~is_any_of(ids_RTK, responses.eos_ids)
    noise_RX = gumbel_noise(seeds_R.to(device), 0, torch.arange(T * K, device=device).expand(R, -1))
    noise_RS, pair_RS = noise_RX.masked_fill(~allowed_RTK.flatten(1), -torch.inf).topk(min(count, T * K), dim=-1)
    return pair_RS // K, ids_RTK.flatten(1).gather(1, pair_RS), ~noise_RS.isinf()


def substituted(responses: Responses, t_RS: Tensor, v_RS: Tensor) -> Responses:
    """Return every response with one token replaced, for all S replacements: N * S responses to each prompt.

    Args:
        responses: B x N responses, R = B * N.
        t_RS: int64, position of each replacement.
        v_RS: Its token.
    """
    B, N, T = responses.tokens_BNT.shape
    S = t_RS.shape[1]
    tokens_BNST = responses.tokens_BNT.unsqueeze(2).expand(B, N, S, T).clone()
    tokens_BNST.scatter_(-1, t_RS.view(B, N, S, 1), v_RS.view(B, N, S, 1))
    mask_BMT = responses.mask_BNT.repeat_interleave(S, 1)
    return Responses(responses.prompts, tokens_BNST.flatten(1, 2), mask_BMT, responses.eos_ids, responses.pad_id)


def _substituted_values(value: RewardModel, prefix: Any, responses: Responses, t_RS: Tensor, v_RS: Tensor) -> Tensor:
    """Score every response with one token replaced, for all its replacements: [R, S]."""
    swapped, at_once = substituted(responses, t_RS, v_RS), max(1, _ROWS // len(responses.prompts))
    chunks = zip(swapped.tokens_BNT.split(at_once, 1), swapped.mask_BNT.split(at_once, 1), strict=True)
    return torch.cat([value.score(prefix, tokens, mask) for tokens, mask in chunks], 1).view(t_RS.shape)
