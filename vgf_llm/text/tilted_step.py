"""One token of every row under the tilted distribution, as a function of tensors: what all backends share.

Over the draft's shortlist (plus y_t while nothing has changed), else over the reference's,

    b_t(v) = <Delta_t, e_v - e_{y_t}>,        q_t(v) ∝ p_t(v) exp(s b_t(v)),

the KL capped a token and kept within what is left of the row's nats, and the token is argmax_v(log q_t(v) + g_t(v))
with the draft's own Gumbel noise, drawn from its posterior given y_t (or coupled maximally:
:mod:`vgf_llm.text.coupling`).
Rows may stand at different positions and have different budgets: nothing of a row depends on another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args, get_type_hints

import torch
from torch import Tensor
from torch.nn.functional import pad

from vgf_llm.text.coupling import draft_noise, maximally_coupled
from vgf_llm.text.distribution import Shortlist, ends_here
from vgf_llm.text.noise import gumbel_noise
from vgf_llm.text.plans import PlanKind, PlannedRows, PlanTensor
from vgf_llm.text.responses import is_any_of
from vgf_llm.text.tilt import capped_multiplier, kl_divergence, linear_bonus, tilt

_OPTIONS = ("multiplier", "coupling", "after_change")
_LARGEST_TILT = 2.0**20  # nats between two tokens; more than any distribution leaves room for


@dataclass(frozen=True)
class TiltOptions:
    """How a distribution is tilted and how its draws are coupled; :class:`vgf_llm.text.PriorDecoder` says what is what.

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


@dataclass(frozen=True)
class DraftTokens:
    """What the drafts hold at the positions that R rows stand at.

    Attributes:
        token_R: y_t; of no meaning where ``inside_R`` is false.
        inside_R: Whether the draft has a token here.
        movable_R: Whether that token is text: not an EOS.
        displacement_RD: Delta_t; 0 where nothing moved.
        distribution: The shortlist [R, K] that y_t was drawn from; ``-inf`` beyond the draft's end.
    """

    token_R: Tensor
    inside_R: Tensor
    movable_R: Tensor
    displacement_RD: Tensor
    distribution: Shortlist


@dataclass(frozen=True)
class TiltedRows:
    """What R rows are to do and how far they have come.

    Attributes:
        seeds_R: int64, one seed a row.
        coupled_R: Whether the row is tied to its draft's noise; else it is drawn afresh.
        unchanged_R: Whether the row still equals its draft.
        multiplier_R: s.
        left_R: Nats that the row may still spend.
        cap_R: Largest KL at one token, in nats.
        share_R: The row's nats divided by the tokens of its draft, for ``multiplier="token"``.
    """

    seeds_R: Tensor
    coupled_R: Tensor
    unchanged_R: Tensor
    multiplier_R: Tensor
    left_R: Tensor
    cap_R: Tensor
    share_R: Tensor


@dataclass(frozen=True)
class TiltedToken:
    """The token of each row, int64 [R], and the KL(q || p) spent on it, in nats [R]."""

    token_R: Tensor
    nats_R: Tensor


def tilted_token(
    distribution: Shortlist,
    draft: DraftTokens,
    rows: TiltedRows,
    position: int | Tensor,
    table_VD: Tensor,
    eos_ids: Sequence[int],
    options: TiltOptions,
) -> TiltedToken:
    """Pick every row's next token: an end by the reference's distribution, else text by the tilted one.

    Args:
        distribution: The reference's distribution here, [R, K']; K' is at most the K of the drafts' distribution. Rows
            that still equal their draft take the one that the draft comes with.
        draft: What the drafts hold here.
        rows: The rows.
        position: Place in the response: one for all rows, or int64 [R].
        table_VD: Input embeddings that the particles live in.
        eos_ids: Ids that end a response.
        options: How to tilt and couple.
    """
    as_draft_R = rows.unchanged_R & rows.coupled_R & draft.inside_R
    distribution = _distribution_here(distribution, draft.distribution, as_draft_R)
    is_eos_RK = is_any_of(distribution.ids, eos_ids)
    logq_RK, nats_R = _tilted(distribution, is_eos_RK, draft, rows, table_VD, options)
    fresh_ends_R = ends_here(distribution, is_eos_RK, rows.seeds_R, position)
    ends_R = torch.where(as_draft_R, ~draft.movable_R, fresh_ends_R)
    allowed_RK = is_eos_RK == ends_R.unsqueeze(-1)
    scores_RK = (logq_RK + _noise(distribution, draft, rows, position, eos_ids, options)).masked_fill(
        ~allowed_RK, -torch.inf
    )
    token_R = distribution.ids.gather(-1, scores_RK.argmax(-1, keepdim=True)).squeeze(-1)
    if options.coupling == "maximal":
        coupled_R = maximally_coupled(logq_RK, distribution, draft.token_R, rows.seeds_R, position)
        token_R = torch.where(as_draft_R & ~ends_R, coupled_R, token_R)
    return TiltedToken(torch.where(as_draft_R & ends_R, draft.token_R, token_R), nats_R)


def _distribution_here(distribution: Shortlist, draft_distribution: Shortlist, as_draft_R: Tensor) -> Shortlist:
    use_R1, missing = as_draft_R.unsqueeze(-1), draft_distribution.ids.shape[-1] - distribution.ids.shape[-1]
    return Shortlist(
        torch.where(use_R1, draft_distribution.ids, pad(distribution.ids, (0, missing))),
        torch.where(use_R1, draft_distribution.logps, pad(distribution.logps, (0, missing), value=-torch.inf)),
    )


def _tilted(
    distribution: Shortlist,
    is_eos_RK: Tensor,
    draft: DraftTokens,
    rows: TiltedRows,
    table_VD: Tensor,
    options: TiltOptions,
) -> tuple[Tensor, Tensor]:
    """Return log q [R, K] and the KL spent at this position [R], within the cap and within what is left."""
    bonus_RK = linear_bonus(table_VD, draft.displacement_RD, draft.token_R, distribution.ids)
    wanted_R = rows.multiplier_R
    left_R = torch.minimum(rows.left_R.clamp(min=0), rows.cap_R)
    if options.multiplier == "token":  # as far as a token's own share of the nats allows
        barred_RK = is_eos_RK | torch.isinf(distribution.logps)
        bonus_RK = bonus_RK.masked_fill(barred_RK, 0)
        largest_R = bonus_RK.abs().amax(-1)
        wanted_R = _LARGEST_TILT / largest_R.clamp(min=1e-30) * (largest_R > 0) * (rows.share_R > 0)
        left_R = torch.minimum(left_R, rows.share_R)
    wanted_R = wanted_R * draft.movable_R
    if options.after_change == "drop":
        wanted_R = wanted_R * rows.unchanged_R
    multiplier_R = capped_multiplier(distribution.logps, bonus_RK, wanted_R, is_eos_RK, left_R)
    logq_RK = tilt(distribution.logps, bonus_RK, multiplier_R, is_eos_RK)
    return logq_RK, kl_divergence(logq_RK, distribution.logps)


def _noise(
    distribution: Shortlist,
    draft: DraftTokens,
    rows: TiltedRows,
    position: int | Tensor,
    eos_ids: Sequence[int],
    options: TiltOptions,
) -> Tensor:
    """Gumbel noise that picks the text: the draft's own, or fresh where the coupling has no use for it."""
    if options.coupling == "maximal":
        return gumbel_noise(rows.seeds_R, position, distribution.ids)
    without_RK = is_any_of(draft.distribution.ids, eos_ids) | ~draft.movable_R.unsqueeze(-1)
    draft_distribution = Shortlist(draft.distribution.ids, draft.distribution.logps.masked_fill(without_RK, -torch.inf))
    return draft_noise(distribution, draft_distribution, draft.token_R, rows.coupled_R, rows.seeds_R, position)


class _State(NamedTuple):
    """How far one row has come: nats spent, and whether it still equals its draft."""

    spent: float
    unchanged: bool


def _start(tensors: Mapping[str, Tensor]) -> _State:
    return _State(0.0, bool(tensors["unchanged"]))


def _step(rows: PlannedRows, distribution: Shortlist, position_R: Tensor) -> tuple[Tensor, list[_State]]:
    device = position_R.device
    spent_R = torch.tensor([state.spent for state in rows.states], device=device)
    unchanged_R = torch.tensor([state.unchanged for state in rows.states], device=device)
    multiplier_R, left_R, cap_R, share_R = rows.own("numbers").unbind(-1)
    draft = DraftTokens(
        rows.here("token"),
        rows.here("inside"),
        rows.here("movable"),
        rows.here("displacement"),
        Shortlist(rows.here("distribution_ids"), rows.here("distribution_logps")),
    )
    state = TiltedRows(
        rows.own("seed"), rows.own("coupled"), unchanged_R, multiplier_R, left_R - spent_R, cap_R, share_R
    )
    options = _options({name: rows.rule(name) for name in _OPTIONS})
    picked = tilted_token(distribution, draft, state, position_R, rows.table_VD, rows.rule("eos_ids"), options)
    unchanged_R = unchanged_R & draft.inside_R & (picked.token_R == draft.token_R)
    after = zip((spent_R + picked.nats_R).tolist(), unchanged_R.tolist(), strict=True)
    return picked.token_R, [_State(spent, unchanged) for spent, unchanged in after]


def _options(rule: Mapping[str, Any]) -> TiltOptions:
    return TiltOptions(*(rule[name] for name in _OPTIONS))


TILT = PlanKind(
    name="tilt",
    tensors={
        "token": PlanTensor(1, torch.int64, is_token=True),
        "inside": PlanTensor(1, torch.bool),
        "movable": PlanTensor(1, torch.bool),
        "displacement": PlanTensor(2, is_finite=True),
        "distribution_ids": PlanTensor(2, torch.int64, is_token=True),
        "distribution_logps": PlanTensor(2, like="distribution_ids"),
        "seed": PlanTensor(0, torch.int64),
        "start": PlanTensor(0, torch.int64),
        "coupled": PlanTensor(0, torch.bool),
        "unchanged": PlanTensor(0, torch.bool),
        "numbers": PlanTensor(1, count=4),  # multiplier, nats left, cap, share
    },
    eos_rule="eos_ids",
    options=_OPTIONS,
    step=_step,
    start=_start,
    check_rule=_options,
    needs_table=True,
    lasts="token",
    width="distribution_ids",
)
"""Tensors hold the draft from the row's first token on, as :class:`DraftTokens` and :class:`TiltedRows` name them."""
