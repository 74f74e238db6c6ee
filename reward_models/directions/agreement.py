"""Fidelity of a direction to the true reward, on responses to prompts that it was not fitted to.

At sampled positions t of sampled responses every candidate v of the reference's shortlist is put in place and scored:
a_t(v) = R(y with y_t := v) - R(y), and 0 for the token that stands there. Three figures:

    Spearman                rank correlation of b_t(v) - b_t(y_t) and a_t(v) over the substitutions of a response, mean
    top 8                   gain of the eight substitutions that b ranks first, over that of the true best eight
    weighted correlation    sum_t Cov_p(a_t, b_t) / sqrt(sum_t Var_p(a_t) sum_t Var_p(b_t))

The first two are those of `reward_models.fidelity`. The third is weighted by the reference's probabilities p within
each position (EOS left out): to second order a tilt p exp(s b) gains s Cov_p(a, b) for s^2 Var_p(b) / 2 nats, so it is
the share of the best gain at equal nats that the direction reaches. Intervals are 95% bootstrap intervals over prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from reward_models.directions.positions import Positions, bonuses_along
from reward_models.directions.reward import CountedReward
from reward_models.directions.targets import from_changes
from reward_models.fidelity import ExactChanges, compare_ranks, exact_changes
from vgf_llm.errors import DataError
from vgf_llm.statistics.intervals import Estimate, bootstrap_mean, bootstrap_of_sums
from vgf_llm.text.bonus import BonusSource

_TOP = 8


@dataclass(frozen=True)
class Agreement:
    """Fidelity of one direction; see the module's first lines.

    Attributes:
        spearman: Mean rank correlation, in [-1, 1].
        weighted_correlation: Pooled within positions, in [-1, 1]; 0 where the direction tells no tokens apart.
        top8_share: At most 1.
        prompts: Prompts measured on.
        responses: Responses that count: more than eight candidates with unequal change.
        positions: Positions measured.
    """

    spearman: Estimate
    weighted_correlation: Estimate
    top8_share: Estimate
    prompts: int
    responses: int
    positions: int

    def to_dict(self) -> dict[str, float | int]:
        """Return the figures flat, intervals as ``<name>_low`` and ``<name>_high``."""
        found: dict[str, float | int] = {}
        for name, value in asdict(self).items():
            if isinstance(value, dict):
                found |= {name: value["mean"], f"{name}_low": value["low"], f"{name}_high": value["high"]}
            else:
                found[name] = value
        return found


def whole_position_changes(
    reward: CountedReward, positions: Positions, substitutions: int, seed: int
) -> list[ExactChanges]:
    """Score every candidate at sampled positions, about `substitutions` per response.

    Raises:
        DataError: No response has a token that could be replaced.
    """
    responses, candidates_BNTK = positions.responses, positions.candidates_BNTK
    own_BNT1 = responses.tokens_BNT.unsqueeze(-1)
    per_position = max(1, int((candidates_BNTK != own_BNT1).sum(-1).max()))
    wanted = max(1, substitutions // per_position)
    order_BNT = torch.rand(responses.tokens_BNT.shape, generator=torch.Generator().manual_seed(seed))
    order_BNT = order_BNT.to(own_BNT1.device).masked_fill(~responses.movable_BNT, 2.0)
    taken_BNT1 = (order_BNT.argsort(-1).argsort(-1) < wanted).unsqueeze(-1)
    found = exact_changes(
        reward,
        responses.prompts,
        responses.tokens_BNT,
        responses.mask_BNT,
        torch.where(taken_BNT1, candidates_BNTK, own_BNT1),
        substitutions=wanted * per_position,
        seed=seed,
        eos_ids=responses.eos_ids,
        description="measuring",
    )
    if not found:
        raise DataError("no sampled response has a token that could be replaced; sample longer or more responses")
    return found


def measure_direction(source: BonusSource, positions: Positions, changes: Sequence[ExactChanges]) -> Agreement:
    """Compare a direction's bonuses with exact changes.

    Args:
        source: Any source of bonuses.
        positions: Responses to prompts that it was not fitted to.
        changes: Of `whole_position_changes`.

    Raises:
        DataError: No response has more than eight candidates with unequal change.
    """
    bonus_BNTK, ids_BNTK = bonuses_along(source, positions), positions.distribution.ids
    listed_BNTK = ~positions.distribution.logps.isinf()
    rows: list[tuple[int, tuple[float, float, float, float]]] = []
    compared = []
    for change in changes:
        at = (change.b, change.n, change.t_S)
        own_S = positions.responses.tokens_BNT[at]
        new_S, old_S = (
            _read(bonus_BNTK[at], ids_BNTK[at], listed_BNTK[at], token_S) for token_S in (change.v_S, own_S)
        )
        predicted = replace(change, exact_S=new_S - old_S)
        compared.append(predicted)
        if len(change.t_S) > _TOP:
            ranks = compare_ranks(predicted.exact_S.cpu(), change.exact_S.cpu())
            if ranks[0] == ranks[0] or bool((change.exact_S != change.exact_S[0]).any()):
                rows.append((change.b, ranks))
    if not rows:
        raise DataError(
            f"no response has more than {_TOP} candidates with unequal change of the reward, so fidelity cannot be "
            "measured; raise validation_substitutions or responses, or look at the reward"
        )
    spearman, share = _ranked(rows)
    return Agreement(
        spearman,
        _weighted_correlation(positions, changes, compared),
        share,
        prompts=len({change.b for change in changes}),
        responses=len(rows),
        positions=sum(len(change.t_S.unique()) for change in changes),
    )


def _read(bonus_SK: Tensor, ids_SK: Tensor, listed_SK: Tensor, token_S: Tensor) -> Tensor:
    column_S1 = ((ids_SK == token_S.unsqueeze(-1)) & listed_SK).long().argmax(-1, keepdim=True)
    return bonus_SK.gather(-1, column_S1).squeeze(-1)


def _ranked(rows: Sequence[tuple[int, tuple[float, float, float, float]]]) -> tuple[Estimate, Estimate]:
    """Return Spearman and the share of the best eight, with intervals; a constant prediction has a correlation of 0."""
    by_prompt: dict[int, list[tuple[float, float, float, float]]] = {}
    for b, ranks in rows:
        by_prompt.setdefault(b, []).append(ranks)
    means = [torch.tensor(found, dtype=torch.float64).nan_to_num(0.0).mean(0) for found in by_prompt.values()]
    table_P4 = torch.stack(means)
    return bootstrap_mean(table_P4[:, 0].tolist()), bootstrap_of_sums(table_P4[:, 1:3], _share)


def _share(sums: Tensor) -> Tensor:
    """Divide the gain of the direction's top eight by that of the best eight; 0 where nothing gains."""
    top, best = sums.unbind(-1)
    return torch.where(best > 0, top / best.clamp(min=1e-300), 0.0)


def _weighted_correlation(
    positions: Positions, changes: Sequence[ExactChanges], predicted: Sequence[ExactChanges]
) -> Estimate:
    exact, found = from_changes(positions, changes, even=0.0), from_changes(positions, predicted, even=0.0)
    weights_XK = exact.weights_XK.double()

    def moved(values_XK: Tensor) -> Tensor:
        values_XK = values_XK.double()
        return values_XK - (values_XK * weights_XK).sum(-1, keepdim=True)

    a_XK, b_XK = moved(exact.targets_XK), moved(found.targets_XK)
    parts_X3 = torch.stack(
        [(weights_XK * left * right).sum(-1) for left, right in ((a_XK, b_XK), (a_XK, a_XK), (b_XK, b_XK))], -1
    )
    prompts_P, number_X = exact.prompt_X.unique(return_inverse=True)
    sums_P3 = parts_X3.new_zeros(len(prompts_P), 3).index_add(0, number_X, parts_X3)

    def correlation(sums: Tensor) -> Tensor:
        scale = (sums[..., 1] * sums[..., 2]).sqrt()
        return torch.where(scale > 0, sums[..., 0] / scale.clamp(min=1e-300), 0.0)

    return bootstrap_of_sums(sums_P3, correlation)
