"""`table`: a word list that a black box wrote. One number per token, from function calls alone.

A reward r_cv seen with token v in context c (a response and a place in it) is fitted by an additive model,

    r_cv = m_c + w_v + noise,    w_v = <g, e_v> / rms + d_v,
    minimise  sum_cv (r_cv - m_c - <g, e_v> / rms - d_v)^2 + shrink sum_v d_v^2,       b(v) = w_v,

so that w_v is the mean change that v brings in place of another token, over the contexts that it was seen in, drawn
towards what tokens with a similar embedding bring: what was seen n times keeps n / (n + shrink) of the difference. g is
the ridge solution (`constant`), found first; then m_c and d_v are solved by turns. shrink, and whether g is used at
all, are what predicts held-back contexts best. Source: two-way analysis of variance with random token effects (best
linear unbiased prediction, Henderson 1975).

Two stages: (i) tokens are put into contexts of the base's own samples, the tokens that the base proposes first, then
word-like ones, as many as the calls allow; (ii) exact changes in given responses, guided ones say, add contexts that
decoding really meets.

Cost: one call per token and context. Nothing is differentiated; in use, one look-up per candidate. It fails where the
sign of a token's effect depends on the text, and tokens that no call was spent on have what their embedding says.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reward_models.directions.constant import fit_constant
from reward_models.directions.positions import Positions
from reward_models.directions.reward import CountedReward
from reward_models.directions.targets import BonusTargets
from reward_models.fidelity import ExactChanges, substituted_scores
from vgf_llm.console.progress import track

SHRINKS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)  # observations' worth
_POOL = 64  # contexts that tokens are shared out over
_SWEEPS = 200
_HELD_BACK = 5  # one context in so many chooses shrink
_WORD = re.compile(r"\s?[^\W\d_]{3,}")


@dataclass(frozen=True)
class Observations:
    """Rewards of O texts, each a context with a token in it.

    Attributes:
        context_O: int64, number of the context.
        token_O: int64.
        reward_O: float32.
    """

    context_O: Tensor
    token_O: Tensor
    reward_O: Tensor

    def take(self, rows_O: Tensor) -> Observations:
        """Return some of them, by index or bool mask."""
        return Observations(self.context_O[rows_O], self.token_O[rows_O], self.reward_O[rows_O])

    def and_more(self, other: Observations) -> Observations:
        """Join two sets of observations, whose contexts are different ones."""
        shift = int(self.context_O.max()) + 1 if len(self.context_O) else 0
        return Observations(
            torch.cat([self.context_O, other.context_O + shift]),
            torch.cat([self.token_O, other.token_O]),
            torch.cat([self.reward_O, other.reward_O]),
        )


@dataclass(frozen=True)
class TableFit:
    """A table and how it was chosen.

    Attributes:
        bonus_V: w, float32, in units of the reward.
        count_V: int64, observations of each token.
        shrink: Observations' worth.
        held_back_error: Squared error in held-back contexts, over that of no difference between tokens.
    """

    bonus_V: Tensor
    count_V: Tensor
    shrink: float
    held_back_error: float


def fit_table(observations: Observations, table_VD: Tensor) -> TableFit:
    """Fit one number per token.

    Args:
        observations: In two contexts at least.
        table_VD: The reference's input embeddings.

    Raises:
        DataError: There is one context alone.
    """
    held_O = observations.context_O % _HELD_BACK == _HELD_BACK - 1
    fitted, held = observations.take(~held_O), observations.take(held_O)
    zero_V = torch.zeros(len(table_VD), dtype=torch.float64, device=table_VD.device)
    targets = targets_of(observations)
    priors = [(zero_V, zero_V)]
    if len(held.token_O):
        fitted_alone = fit_constant(targets.take(targets.prompt_X % _HELD_BACK != _HELD_BACK - 1), table_VD).bonus_V
        priors.append((fitted_alone.double(), fit_constant(targets, table_VD).bonus_V.double()))
    tried = [best_shrink(fitted, held, of_fitted_V) for of_fitted_V, _ in priors]
    number = min(range(len(tried)), key=lambda index: tried[index][1])
    (shrink, error), nothing = tried[number], left_error(zero_V, held)
    return TableFit(
        shrunk_table(observations, priors[number][1], shrink).float(),
        torch.bincount(observations.token_O, minlength=len(table_VD)),
        shrink,
        error / nothing if nothing > 0 else 1.0,
    )


def best_shrink(fitted: Observations, held: Observations, prior_V: Tensor) -> tuple[float, float]:
    """Return the value of the grid that predicts held-back observations best, and the squared error it leaves."""
    errors = {shrink: left_error(shrunk_table(fitted, prior_V, shrink), held) for shrink in SHRINKS}
    shrink = min(errors, key=errors.__getitem__)
    return shrink, errors[shrink]


def shrunk_table(observations: Observations, prior_V: Tensor, shrink: float) -> Tensor:
    """Return w [V], float64, drawn towards a prior [V] by `shrink` observations' worth."""
    left_O = observations.reward_O.double() - prior_V[observations.token_O]
    left = Observations(observations.context_O, observations.token_O, left_O)
    return prior_V + additive_table(left, len(prior_V), shrink)


def targets_of(observations: Observations) -> BonusTargets:
    """Read contexts as positions with equal weights; a context's number stands for its prompt."""
    order_O = observations.context_O.argsort(stable=True)
    context_X, row_O, count_X = observations.context_O[order_O].unique_consecutive(
        return_inverse=True, return_counts=True
    )
    column_O = torch.arange(len(row_O), device=row_O.device) - (count_X.cumsum(0) - count_X)[row_O]
    shape = (len(context_X), int(count_X.max()))
    ids_XK = torch.zeros(shape, dtype=torch.long, device=row_O.device)
    targets_XK, is_there_XK = (torch.zeros(shape, device=row_O.device) for _ in range(2))
    ids_XK[row_O, column_O] = observations.token_O[order_O]
    targets_XK[row_O, column_O] = observations.reward_O[order_O].float()
    is_there_XK[row_O, column_O] = 1.0
    nothing_X0 = targets_XK[:, :0]
    return BonusTargets(nothing_X0, ids_XK, is_there_XK / count_X.unsqueeze(-1), targets_XK, context_X)


def additive_table(observations: Observations, vocabulary: int, shrink: float) -> Tensor:
    """Return d [V], float64, of the additive model without g.

    Args:
        observations: Rewards of tokens in contexts.
        vocabulary: V.
        shrink: Above 0.
    """
    context_O, token_O, reward_O = observations.context_O, observations.token_O, observations.reward_O.double()
    contexts = int(context_O.max()) + 1 if len(context_O) else 0
    in_context_C = torch.bincount(context_O, minlength=contexts).clamp(min=1)
    count_V = torch.bincount(token_O, minlength=vocabulary)
    bonus_V = reward_O.new_zeros(vocabulary)
    for _ in range(_SWEEPS):
        mean_C = reward_O.new_zeros(contexts).index_add(0, context_O, reward_O - bonus_V[token_O]) / in_context_C
        left_V = reward_O.new_zeros(vocabulary).index_add(0, token_O, reward_O - mean_C[context_O])
        new_V = left_V / (count_V + shrink)
        done = bool((new_V - bonus_V).abs().max() <= 1e-9 * new_V.abs().max())
        bonus_V = new_V
        if done:
            break
    return bonus_V


def left_error(bonus_V: Tensor, held: Observations) -> float:
    """Return the squared error that a table leaves within contexts."""
    left_O = held.reward_O.double() - bonus_V[held.token_O]
    _, context_O, count_C = held.context_O.unique(return_inverse=True, return_counts=True)
    mean_C = left_O.new_zeros(len(count_C)).index_add(0, context_O, left_O) / count_C
    return float((left_O - mean_C[context_O]).square().sum())


def candidate_tokens(positions: Positions, tokenizer: Any, vocabulary: int, most: int) -> Tensor:
    """Return the tokens worth a call, int64: those that the base proposes, likeliest first, then word-like ones.

    Args:
        positions: Responses of the base with its shortlists.
        tokenizer: Tells word-like tokens: three letters or more, with or without a space before.
        vocabulary: Ids from there on are not tokens.
        most: Tokens returned at most.
    """
    distribution = positions.text_distribution
    logps, ids = distribution.logps[positions.responses.movable_BNT], distribution.ids[positions.responses.movable_BNT]
    mass_V = torch.zeros(vocabulary, dtype=torch.float64, device=ids.device)
    mass_V.index_add_(0, ids.flatten(), logps.exp().double().flatten())
    proposed = mass_V.argsort(descending=True, stable=True)[: int((mass_V > 0).sum())]
    special = set(tokenizer.all_special_ids) | set(positions.responses.eos_ids)
    found = [token for token in proposed.tolist() if token not in special]
    if len(found) < most:
        known = special | set(found)
        texts = tokenizer.batch_decode([[token] for token in range(vocabulary)])
        found += [v for v, text in enumerate(texts) if v not in known and _WORD.fullmatch(text)]
    return torch.tensor(found[:most], dtype=torch.long, device=ids.device)


@torch.no_grad()
def observe_tokens(
    reward: CountedReward, positions: Positions, tokens_V: Tensor, contexts: int, seed: int
) -> Observations:
    """Ask for the reward of every token in a few contexts of the base's samples.

    Args:
        reward: Any reward of token ids.
        positions: Responses of the base.
        tokens_V: Tokens to try.
        contexts: Calls per token; its contexts are drawn from a pool of 64.
        seed: Of the draws.
    """
    responses, generator = positions.responses, torch.Generator().manual_seed(seed)
    movable = responses.movable_BNT.nonzero()
    pool = movable[torch.randperm(len(movable), generator=generator)[:_POOL].to(movable.device)]
    order_VC = torch.rand(len(tokens_V), len(pool), generator=generator).argsort(-1)[:, :contexts].to(movable.device)
    prefix, parts = reward.prefix(responses.prompts), []
    for index in track(range(len(pool)), "asking for tokens", unit="contexts"):
        b, n, t = pool[index].tolist()
        tried_S = tokens_V[(order_VC == index).any(-1)]
        tokens_T, mask_T = responses.tokens_BNT[b, n], responses.mask_BNT[b, n]
        tried_S = torch.cat([tokens_T[t : t + 1], tried_S[tried_S != tokens_T[t]]])
        one = prefix.select(torch.tensor([b], device=tokens_T.device))
        places_S = torch.full_like(tried_S, t)
        reward_S = substituted_scores(reward, one, tokens_T, mask_T, places_S, tried_S)
        parts.append(Observations(torch.full_like(tried_S, index), tried_S, reward_S.float()))
    return Observations(*(torch.cat([getattr(part, name) for part in parts]) for name in Observations.__annotations__))


def observations_of(positions: Positions, changes: Sequence[ExactChanges]) -> Observations:
    """Read exact changes as observations; a context is a place in a response, and its own token was seen with 0."""
    N, T = positions.responses.tokens_BNT.shape[1:]
    at_S = torch.cat([(change.b * N + change.n) * T + change.t_S for change in changes])
    token_S, reward_S = (torch.cat([getattr(change, name) for change in changes]) for name in ("v_S", "exact_S"))
    at_C, context_S = at_S.unique(return_inverse=True)
    own_C = positions.responses.tokens_BNT.flatten()[at_C]
    return Observations(
        torch.cat([torch.arange(len(at_C), device=at_C.device), context_S]),
        torch.cat([own_C, token_S]),
        torch.cat([torch.zeros(len(at_C), device=at_C.device), reward_S.float()]),
    )
