"""Token pickers: every row's next token, from logits here, or from a plan in an engine's own process.

A picker is called with the logits of a position wherever the model runs in this process. An engine (vLLM) runs it in
another one. It is given each row's :class:`vgf_llm.text.plans.RowPlan`, numbers that say all there is to know, picks by
the same functions of tensors, and hands back tokens and distributions. The picker then follows what was picked, which
brings its own state (nats spent, distributions met) to where calling it would have brought it. It also says what it
would have picked itself, so that an engine that does something else is noticed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from vgf_llm.settings import SamplingSettings
from vgf_llm.text.distribution import Shortlist, ends_here, truncate
from vgf_llm.text.noise import gumbel_noise
from vgf_llm.text.plans import PlanKind, PlannedRows, PlanTensor, RowPlan, distribution_rule
from vgf_llm.text.responses import is_any_of


class TokenPicker(Protocol):
    """Picks the next token of R rows."""

    def __call__(self, logits_RV: Tensor, position: Any, /) -> Tensor:
        """Return the tokens, int64 [R], at ``position`` (one for all rows, or int64 [R])."""
        ...

    def plans(self, start_R: Tensor, tokens: int) -> list[RowPlan]:
        """Return the plan of each row for at most ``tokens`` tokens from its place ``start_R`` in the response on."""
        ...

    def follow(self, distribution: Shortlist, position: Any, token_R: Tensor, live_R: Tensor, /) -> Tensor:
        """Take over the tokens that were picked at ``position``; returns those that this picker would have picked.

        Args:
            distribution: The reference's distribution [R, K] there.
            position: As in a call.
            token_R: What was picked.
            live_R: bool, rows that were written to; the others are left alone.
        """
        ...


def drawn_token(
    distribution: Shortlist, seeds_R: Tensor, position: int | Tensor, ends_first: Sequence[int] = ()
) -> Tensor:
    """Return argmax_v(log p(v) + g_v), int64 [R], with the noise hashed from seed, position and token.

    Args:
        distribution: p [R, K].
        seeds_R: int64, one seed a row.
        position: Place in the response: one for all rows, or int64 [R].
        ends_first: EOS ids, where whether a row ends is to be decided by noise of its own, before the text is.
    """
    scores_RK = distribution.logps + gumbel_noise(seeds_R, position, distribution.ids)
    if ends_first:
        is_eos_RK = is_any_of(distribution.ids, ends_first)
        barred_RK = is_eos_RK != ends_here(distribution, is_eos_RK, seeds_R, position).unsqueeze(-1)
        scores_RK = scores_RK.masked_fill(barred_RK, -torch.inf)
    return distribution.ids.gather(-1, scores_RK.argmax(-1, keepdim=True)).squeeze(-1)


def _step(rows: PlannedRows, distribution: Shortlist, position_R: Tensor) -> tuple[Tensor, list[None]]:
    return drawn_token(distribution, rows.own("seed"), position_R, rows.rule("ends_first")), [None] * len(rows.plans)


DRAW = PlanKind(
    name="draw",
    tensors={"seed": PlanTensor(0, torch.int64), "start": PlanTensor(0, torch.int64)},
    eos_rule="ends_first",
    step=_step,
)


@dataclass
class Draws:
    """The picker that draws from the reference; it keeps the distributions that it met, one a position.

    Attributes:
        sampling: The reference's distribution.
        seeds_R: int64, one seed a row.
        ends_first: As for :func:`drawn_token`.
        kept_columns: A longer shortlist is not kept.
        distributions: What was met.
    """

    sampling: SamplingSettings
    seeds_R: Tensor
    ends_first: tuple[int, ...] = ()
    kept_columns: int = 512  # 12 bytes a column and token
    distributions: list[Shortlist] = field(default_factory=list)

    def __call__(self, logits_RV: Tensor, position: int) -> Tensor:
        """Draw the next token of every row."""
        return self._drawn(truncate(logits_RV, self.sampling), position)

    def plans(self, start_R: Tensor, tokens: int) -> list[RowPlan]:
        """Return a seed and a place for each row."""
        rule = {**distribution_rule(self.sampling), "ends_first": list(self.ends_first)}
        where = zip(self.seeds_R.cpu(), start_R.cpu().long(), strict=True)
        return [RowPlan(DRAW, rule, {"seed": seed, "start": start}) for seed, start in where]

    def follow(self, distribution: Shortlist, position: int, token_R: Tensor, live_R: Tensor) -> Tensor:
        """Keep the distribution; see :class:`TokenPicker`."""
        return self._drawn(distribution, position)

    def _drawn(self, distribution: Shortlist, position: int) -> Tensor:
        if distribution.ids.shape[-1] <= self.kept_columns:
            self.distributions.append(distribution)
        return drawn_token(distribution, self.seeds_R, position, self.ends_first)

    def distribution(self) -> Shortlist | None:
        """Return the distributions [R, T, K] of what was written; None where they were not kept."""
        if not self.distributions:
            return None
        ids, logps = (
            [distribution.ids for distribution in self.distributions],
            [distribution.logps for distribution in self.distributions],
        )
        return Shortlist(torch.stack(ids, 1), torch.stack(logps, 1))
