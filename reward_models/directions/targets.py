"""Bonus targets over a shortlist at positions: what a direction is fitted to, whoever knows the targets.

A row x is a position: candidates v with weights w_xv that sum to 1 and targets a_xv. A tilt p exp(s b) / Z does not
change when b is shifted at a position, so only differences within rows are fitted:

    minimise  sum_x sum_v w_xv rho( b_x(v) - sum_u w_xu b_x(u) - (a_xv - sum_u w_xu a_xu) )

The gain of a tilt, s Cov_p(a, b) to first order, weighs candidates by the reference's probabilities. A fit mixes these
evenly with equal weights, because the rarer candidates show what tokens are worth and would hardly count.
Targets are exact changes of a reward (`from_changes`: the token that stands there has 0) or the bonuses of another
source (`from_source`: a lookahead, say, is distilled so).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from reward_models.directions.positions import Positions, bonuses_along
from reward_models.fidelity import ExactChanges
from vgf_llm.errors import DataError
from vgf_llm.flow.shapes import check_shapes
from vgf_llm.text.bonus import BonusSource

_HELD_BACK = 5  # one prompt in so many chooses penalties and the step that is kept


@dataclass(frozen=True)
class BonusTargets:
    """X positions with K candidates each.

    Attributes:
        hidden_XD: The reference's hidden state before the token, float32.
        ids_XK: int64, candidates.
        weights_XK: float32, at least 0, summing to 1 in each row; 0 where there is no candidate.
        targets_XK: float32, bonuses up to a constant per row, in units of the reward; 0 where there is no candidate.
        prompt_X: int64, number of the prompt, by which rows are held back.
    """

    hidden_XD: Tensor
    ids_XK: Tensor
    weights_XK: Tensor
    targets_XK: Tensor
    prompt_X: Tensor

    def __post_init__(self) -> None:
        """Check that the shapes belong together; raises ValueError."""
        check_shapes(
            hidden_XD=self.hidden_XD,
            ids_XK=self.ids_XK,
            weights_XK=self.weights_XK,
            targets_XK=self.targets_XK,
            prompt_X=self.prompt_X,
        )

    def __len__(self) -> int:
        """Return the number of positions."""
        return len(self.ids_XK)

    def take(self, rows_X: Tensor) -> BonusTargets:
        """Return some of the rows, by index or bool mask."""
        return BonusTargets(
            self.hidden_XD[rows_X],
            self.ids_XK[rows_X],
            self.weights_XK[rows_X],
            self.targets_XK[rows_X],
            self.prompt_X[rows_X],
        )

    def numbered(self, numbers_B: Tensor) -> BonusTargets:
        """Return the rows with other numbers of their prompts, int64; a prompt that comes twice is to have one."""
        return replace(self, prompt_X=numbers_B.to(self.prompt_X.device)[self.prompt_X])

    def and_more(self, other: BonusTargets) -> BonusTargets:
        """Join two sets of positions; prompts of the same number are the same prompt, and held back together."""
        K = max(self.ids_XK.shape[1], other.ids_XK.shape[1])

        def joined(name: str) -> Tensor:
            mine, others = getattr(self, name), getattr(other, name)
            return torch.cat([pad(part, (0, K - part.shape[1])) for part in (mine, others)])

        return BonusTargets(
            torch.cat([self.hidden_XD, other.hidden_XD]),
            joined("ids_XK"),
            joined("weights_XK"),
            joined("targets_XK"),
            torch.cat([self.prompt_X, other.prompt_X]),
        )

    def split(self) -> tuple[BonusTargets, BonusTargets]:
        """Return the rows of four prompts in five, and those of the fifth, which choose what is kept.

        Raises:
            DataError: There is one prompt alone.
        """
        check_split(self.prompt_X)
        found_P, number_X = self.prompt_X.unique(return_inverse=True)
        held_X = number_X % _HELD_BACK == min(_HELD_BACK, len(found_P)) - 1
        return self.take(~held_X), self.take(held_X)


def check_split(prompt_X: Tensor) -> None:
    """Refuse the numbers of one prompt alone.

    Raises:
        DataError: There are not two different numbers.
    """
    if len(prompt_X.unique()) < 2:
        raise DataError(
            "a direction is fitted to responses to two prompts at least, one of them held back; give more prompts"
        )


def centred(values_XK: Tensor, weights_XK: Tensor) -> Tensor:
    """Subtract each row's weighted mean."""
    return values_XK - (values_XK * weights_XK).sum(-1, keepdim=True)


def from_changes(positions: Positions, changes: Sequence[ExactChanges], even: float = 0.5) -> BonusTargets:
    """Group exact changes by position; the first candidate is the token that stands there, with target 0.

    Args:
        positions: The responses that were changed.
        changes: Of `exact_changes` or `regrown_changes`; tokens come from the positions' shortlist.
        even: Share of equal weights in the mixture, in [0, 1]; 0 weighs by the reference's probabilities alone.
    """
    B, N, T = positions.responses.tokens_BNT.shape
    device = positions.responses.tokens_BNT.device
    at_S = torch.cat([(change.b * N + change.n) * T + change.t_S for change in changes])
    v_S, exact_S = (torch.cat([getattr(change, name) for change in changes]) for name in ("v_S", "exact_S"))
    order_S = at_S.argsort(stable=True)
    at_X, row_S, count_X = at_S[order_S].unique_consecutive(return_inverse=True, return_counts=True)
    column_S = torch.arange(len(row_S), device=device) - (count_X.cumsum(0) - count_X)[row_S] + 1
    shape = (len(at_X), int(count_X.max()) + 1)
    ids_XK = torch.zeros(shape, dtype=torch.long, device=device)
    targets_XK = torch.zeros(shape, device=device)
    is_there_XK = torch.zeros(shape, dtype=torch.bool, device=device)
    ids_XK[:, 0], is_there_XK[:, 0] = positions.responses.tokens_BNT.flatten()[at_X], True
    ids_XK[row_S, column_S], targets_XK[row_S, column_S] = v_S[order_S], exact_S[order_S].float()
    is_there_XK[row_S, column_S] = True
    logps_XK = logps_of(positions, at_X, ids_XK).masked_fill(~is_there_XK, -torch.inf)
    equal_XK = is_there_XK / is_there_XK.sum(-1, keepdim=True)
    weights_XK = (1 - even) * logps_XK.softmax(-1) + even * equal_XK
    return BonusTargets(positions.hidden_BNTD.flatten(0, 2)[at_X], ids_XK, weights_XK, targets_XK, at_X // (N * T))


def from_source(source: BonusSource, positions: Positions) -> BonusTargets:
    """Take the bonuses of another source at all positions of given responses as targets.

    Args:
        source: The teacher, asked in order, as decoding asks it.
        positions: Responses along which it is asked.
    """
    distribution = positions.text_distribution
    bonus_BNTK = bonuses_along(source, positions)
    movable_BNT = positions.responses.movable_BNT
    weights_XK = distribution.logps[movable_BNT].softmax(-1)
    prompt_X = movable_BNT.nonzero()[:, 0]
    ids_XK = distribution.ids[movable_BNT]
    targets_XK = bonus_BNTK[movable_BNT].masked_fill(weights_XK == 0, 0.0)
    return BonusTargets(positions.hidden_BNTD[movable_BNT], ids_XK, weights_XK, targets_XK, prompt_X)


def logps_of(positions: Positions, at_X: Tensor, ids_XK: Tensor) -> Tensor:
    """Look up the reference's log-probability of tokens at positions (flat index); ``-inf`` off its list."""
    listed_XJ = positions.distribution.ids.flatten(0, 2)[at_X]
    logps_XJ = positions.distribution.logps.flatten(0, 2)[at_X]
    same_XKJ = (ids_XK.unsqueeze(-1) == listed_XJ.unsqueeze(-2)) & ~logps_XJ.isinf().unsqueeze(-2)
    return torch.where(same_XKJ, logps_XJ.unsqueeze(-2), -torch.inf).amax(-1)
