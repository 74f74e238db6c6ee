"""One token of every row of a rewrite: from the tilted distribution at the first tokens, then from the reference's.

The step of the decoder ``pivot`` (:mod:`vgf_llm.text.decoders.pivot`) as a function of tensors, which all backends
share. With multiplier 1 within the cap per token,

    q(v) ∝ p(v) exp(<Delta, e_v - e_y>),       EOS keeps its probability,

y the old text's token here and Delta its displacement. The token is argmax_v(log q(v) + g_v), the noise hashed from
the new text's seed, the position and the token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vgf_llm.text.distribution import Shortlist
from vgf_llm.text.noise import combine_seeds, gumbel_noise
from vgf_llm.text.plans import PlanKind, PlannedRows, PlanTensor
from vgf_llm.text.responses import is_any_of
from vgf_llm.text.tilt import capped_multiplier, linear_bonus, tilt


def regrown_token(
    distribution: Shortlist,
    displacement_RD: Tensor,
    old_token_R: Tensor,
    is_tilted_R: Tensor,
    seeds_R: Tensor,
    position_R: Tensor,
    table_VD: Tensor,
    eos_ids: Sequence[int],
    cap_R: Tensor,
) -> Tensor:
    """Draw every row's next token, int64 [R]: tilted at and after the pivot, then by the reference's distribution.

    Args:
        distribution: The reference's distribution [R, K] here.
        displacement_RD: Delta of the old text here; 0 beyond its end.
        old_token_R: What stands here in the old text.
        is_tilted_R: Whether this position is one of the tilted.
        seeds_R: int64, seeds of the new text.
        position_R: Place in the response.
        table_VD: Input embeddings that the particles live in.
        eos_ids: Ids that end a response.
        cap_R: Largest KL at one token, in nats.
    """
    tilted = tilted_distribution(distribution, displacement_RD, old_token_R, table_VD, eos_ids, cap_R)
    logps_RK = torch.where(is_tilted_R.unsqueeze(-1), tilted.logps, distribution.logps)
    noise_RK = gumbel_noise(combine_seeds(seeds_R, position_R), 0, distribution.ids)
    return distribution.ids.gather(-1, (logps_RK + noise_RK).argmax(-1, keepdim=True)).squeeze(-1)


def tilted_distribution(
    distribution: Shortlist, displacement: Tensor, token: Tensor, table_VD: Tensor, eos_ids: Sequence[int], cap: Tensor
) -> Shortlist:
    """Return q at positions [...].

    Args:
        distribution: p [..., K].
        displacement: Delta [..., D].
        token: y, int64 [...].
        table_VD: Input embeddings that the particles live in.
        eos_ids: Ids that end a response.
        cap: Largest KL at a position, in nats, [...].
    """
    bonus = linear_bonus(table_VD, displacement, token, distribution.ids)
    is_eos = is_any_of(distribution.ids, eos_ids)
    multiplier = capped_multiplier(distribution.logps, bonus, torch.ones_like(distribution.logps[..., 0]), is_eos, cap)
    return Shortlist(distribution.ids, tilt(distribution.logps, bonus, multiplier, is_eos))


def _step(rows: PlannedRows, distribution: Shortlist, position_R: Tensor) -> tuple[Tensor, list[None]]:
    lengths = [len(plan.tensors["token"]) for plan in rows.plans]
    inside = [offset < length for offset, length in zip(rows.offsets, lengths, strict=True)]
    within = [min(offset, length - 1) for offset, length in zip(rows.offsets, lengths, strict=True)]
    token_R = regrown_token(
        distribution,
        rows.here("displacement", within),
        rows.here("token", within),
        torch.tensor(inside, device=position_R.device),
        rows.own("seed"),
        position_R,
        rows.table_VD,
        rows.rule("eos_ids"),
        rows.own("numbers")[:, 0],
    )
    return token_R, [None] * len(rows.plans)


REGROW = PlanKind(
    name="regrow",
    tensors={
        "displacement": PlanTensor(2, is_finite=True),
        "token": PlanTensor(1, torch.int64, is_token=True),
        "seed": PlanTensor(0, torch.int64),
        "start": PlanTensor(0, torch.int64),
        "numbers": PlanTensor(1, count=1),  # the cap
    },
    eos_rule="eos_ids",
    step=_step,
    needs_table=True,
)
"""Tensors hold the tilted positions alone: the old text's tokens and their displacement."""
