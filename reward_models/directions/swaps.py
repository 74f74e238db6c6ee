"""Swaps: single tokens put in place of others, with what each does to a reward; a bounded stock that fits go back to.

A swap is a place in a response y of the reference, the token y_t that stands there and another, v, of its shortlist:

    a = R(y with y_t := v) - R(y)

Fits read each as a row of two candidates, y_t with target 0 and v with target a (`targets`), weighted half by the
reference's probabilities of the two and half alike. y_t is a draw from p and v any token of the list, so that

    correlation = sum p(v) a b / sqrt( sum p(v) a^2  sum p(v) b^2 ),        b = b_t(v) - b_t(y_t)

estimates the weighted correlation of `agreement`, sum_t Cov_p(a, b) / sqrt(sum_t Var_p(a) sum_t Var_p(b)), without the
whole list being scored anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from reward_models.directions.positions import Positions, bonuses_along
from reward_models.directions.table import Observations
from reward_models.directions.targets import BonusTargets, logps_of
from vgf_llm.text.bonus import BonusSource
from vgf_llm.text.distribution import Shortlist
from vgf_llm.text.stream import bonus_variance

_EVEN = 0.5  # share of equal weights in a fit, as in `targets`


@dataclass(frozen=True)
class Swaps:
    """O swaps.

    Attributes:
        prompt_O: int64, number of the prompt.
        response_O: int64, number of the response, another one for each that was ever sampled.
        ids_O2: int64, the token that stood there, and the one that was put in its place.
        logps_O2: The reference's log-probabilities of both, float32.
        change_O: a, float32, in units of the reward.
        hidden_OD: The reference's hidden state before the token, float32; D is 0 where no kind of direction reads it.
    """

    prompt_O: Tensor
    response_O: Tensor
    ids_O2: Tensor
    logps_O2: Tensor
    change_O: Tensor
    hidden_OD: Tensor

    def __len__(self) -> int:
        """Return the number of swaps."""
        return len(self.change_O)

    def take(self, rows_O: Tensor | slice) -> Swaps:
        """Return some of them, by index, mask or slice."""
        return Swaps(*(tensor[rows_O] for tensor in self.tensors().values()))

    def to(self, device: torch.device) -> Swaps:
        """Return them on another device."""
        return Swaps(*(tensor.to(device) for tensor in self.tensors().values()))

    def in_order(self) -> Swaps:
        """Return them in the order of their responses, whoever scored which."""
        return self.take(self.response_O.argsort(stable=True))

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by name, of which ``Swaps(**tensors)`` is the same again."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def can_be_split(self) -> bool:
        """Whether some can be held back: there are swaps of two responses at least."""
        return len(self.response_O.unique()) > 1

    @property
    def targets(self) -> BonusTargets:
        """What `constant` and `causal` are fitted to; a prompt's swaps are held back together, where there are two."""
        weights_O2 = (1 - _EVEN) * self.logps_O2.softmax(-1) + _EVEN / 2
        targets_O2 = torch.stack([torch.zeros_like(self.change_O), self.change_O], 1)
        one_prompt = bool((self.prompt_O == self.prompt_O[:1]).all())
        group_O = self.response_O if one_prompt else self.prompt_O
        return BonusTargets(self.hidden_OD, self.ids_O2, weights_O2, targets_O2, group_O)

    @property
    def observations(self) -> Observations:
        """What `table` is fitted to: two tokens in each context."""
        context_O2 = torch.arange(len(self), device=self.change_O.device).unsqueeze(1).expand(-1, 2)
        reward_O2 = torch.stack([torch.zeros_like(self.change_O), self.change_O], 1)
        return Observations(context_O2.flatten(), self.ids_O2.flatten(), reward_O2.flatten())


def thinned(swaps: Swaps, most: int, seed: int) -> Swaps:
    """Return at most so many, drawn evenly from all, in their order.

    Args:
        swaps: In an order that does not depend on who scored them.
        most: How many are kept.
        seed: Of the draw.
    """
    if len(swaps) <= most:
        return swaps
    drawn_O = torch.randperm(len(swaps), generator=torch.Generator().manual_seed(seed))[:most]
    return swaps.take(drawn_O.sort().values)


def join_swaps(parts: Sequence[Swaps]) -> Swaps:
    """Return the swaps of several, in order; there must be one part at least."""
    return Swaps(**{name: torch.cat([part.tensors()[name] for part in parts]) for name in parts[0].tensors()})


def swaps_of(
    positions: Positions, t_RS: Tensor, v_RS: Tensor, change_RS: Tensor, is_swap_RS: Tensor, numbers_R2: Tensor
) -> Swaps:
    """Put scored substitutions together with what stood before them.

    Args:
        positions: B x N responses, R = B * N.
        t_RS: int64, positions.
        v_RS: Tokens that were put there.
        change_RS: What each did to the reward.
        is_swap_RS: bool, the substitutions that there are.
        numbers_R2: int64, numbers of prompt and response.
    """
    T = positions.responses.tokens_BNT.shape[-1]
    row_O, column_O = is_swap_RS.nonzero(as_tuple=True)
    at_O = row_O * T + t_RS[row_O, column_O]
    ids_O2 = torch.stack([positions.responses.tokens_BNT.flatten()[at_O], v_RS[row_O, column_O]], 1)
    return Swaps(
        numbers_R2[row_O, 0],
        numbers_R2[row_O, 1],
        ids_O2,
        logps_of(positions, at_O, ids_O2),
        change_RS[row_O, column_O].float(),
        positions.hidden_BNTD.flatten(0, 2)[at_O],
    )


@torch.no_grad()
def swap_correlation(source: BonusSource, swaps: Swaps) -> float:
    """Return how a direction's differences go with the true changes; see the module's first lines.

    Args:
        source: A direction that keeps no state along a text: table, constant or causal.
        swaps: Best ones that it was not fitted to.

    Returns:
        In [-1, 1]; 0 where the direction tells no tokens apart, NaN where no swap changes the reward.
    """
    pairs = Shortlist(swaps.ids_O2, swaps.logps_O2)
    bonus_O2 = source.begin([], 1)(pairs, swaps.hidden_OD if source.reads_hidden else None, None).double()
    weight_O, a_O = swaps.logps_O2[:, 1].double().exp(), swaps.change_O.double()
    b_O = bonus_O2[:, 1] - bonus_O2[:, 0]
    of_reward, of_direction = float((weight_O * a_O.square()).sum()), float((weight_O * b_O.square()).sum())
    if of_reward == 0:
        return math.nan
    scale = math.sqrt(of_reward * of_direction)
    return float((weight_O * a_O * b_O).sum()) / scale if scale > 0 else 0.0


def bonus_variances(source: BonusSource, positions: Positions) -> Tensor:
    """Return the variance of the bonus at every token that is text, [X], as one-pass decoding measures it."""
    live_BNT = positions.responses.movable_BNT
    logps_XK = positions.text_distribution.logps[live_BNT]
    return bonus_variance(logps_XK, bonuses_along(source, positions)[live_BNT], logps_XK.isinf())
