"""Gradient fidelity: does the value's input gradient rank token changes as the value itself does?

For a response y and substitutions (t, v), v from the reference's shortlist at position t,

    predicted(t, v) = <g_t, e_v - e_{y_t}>,    exact(t, v) = R(y with y_t := v) - R(y)

and the fidelity is Spearman's rank correlation of the two over the substitutions of one response, averaged over
responses. Beside it: the mean exact change of the eight substitutions that the gradient ranks first, of the true best
eight, and of eight at random (the mean of all).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vgf_llm.console.progress import track
from vgf_llm.flow.trajectory import ValueGradient, autograd_value
from vgf_llm.settings import SamplingSettings
from vgf_llm.statistics.intervals import normal_half_width
from vgf_llm.text.reference import TorchReference
from vgf_llm.text.responses import Responses, is_any_of

_TOP = 8
_ROWS = 128  # substituted responses scored in one forward


@dataclass(frozen=True)
class Fidelity:
    """Means over responses; gains in units of the value.

    Attributes:
        spearman: mean rank correlation of predicted and exact change, in [-1, 1].
        low: lower end of its 95% normal interval over responses.
        high: upper end.
        top8_gain: mean exact change of the eight substitutions that the gradient ranks first.
        best8_gain: of the eight with the largest exact change.
        random8_gain: of eight at random, in expectation.
        n: responses measured.
    """

    spearman: float
    low: float
    high: float
    top8_gain: float
    best8_gain: float
    random8_gain: float
    n: int

    @property
    def top8_share(self) -> float:
        """Share of the best eight's gain that the direction's first eight have; NaN where nothing gains."""
        return self.top8_gain / self.best8_gain if self.best8_gain > 0 else float("nan")

    def to_dict(self) -> dict[str, float | int]:
        """Return the fields as a dict."""
        return asdict(self)


def gradient_fidelity(
    value: Any,
    prompts: Sequence[Sequence[int]],
    tokens_BNT: Tensor,
    mask_BNT: Tensor,
    shortlist_BNTK: Tensor,
    *,
    substitutions: int = 120,
    seed: int = 0,
    value_gradient: ValueGradient | None = None,
    eos_ids: Sequence[int] = (),
    description: str | None = None,
) -> Fidelity:
    """Compare the linear prediction with the exact change for sampled one-token substitutions.

    Args:
        value: a reward model or ensemble (`prefix`, `score`, `embed`).
        prompts: B lists of token ids.
        tokens_BNT: response token ids, right padded.
        mask_BNT: bool, True where a response token stands.
        shortlist_BNTK: candidate ids at each position (`reference_shortlist`).
        substitutions: number sampled a response, without replacement, at least 9.
        seed: of that sample.
        value_gradient: particles_BNTD -> (values_BN, gradients_BNTD); None: autograd through `value.score`.
        eos_ids: ids that end a text; neither replaced nor put in.
        description: shows progress under that name.

    Returns:
        The means over responses that have at least nine candidates and whose exact changes are not all equal.

    Raises:
        ValueError: no response has enough candidates.
    """
    if value_gradient is None:
        value_gradient = score_gradient(value, value.prefix(prompts), mask_BNT)
    changes = exact_changes(
        value,
        prompts,
        tokens_BNT,
        mask_BNT,
        shortlist_BNTK,
        substitutions=substitutions,
        seed=seed,
        eos_ids=eos_ids,
        description=description,
    )
    return compare_changes(value, tokens_BNT, changes, value_gradient(value.embed(tokens_BNT).detach())[1])


@dataclass(frozen=True)
class ExactChanges:
    """Substitutions in one response and what each does to the value.

    Attributes:
        b: index of the prompt.
        n: index of the response.
        t_S: position of each substitution, int64.
        v_S: its new token.
        exact_S: R(y with y_t := v) - R(y), float32.
    """

    b: int
    n: int
    t_S: Tensor
    v_S: Tensor
    exact_S: Tensor


@torch.no_grad()
def exact_changes(
    value: Any,
    prompts: Sequence[Sequence[int]],
    tokens_BNT: Tensor,
    mask_BNT: Tensor,
    shortlist_BNTK: Tensor,
    *,
    substitutions: int,
    seed: int = 0,
    eos_ids: Sequence[int] = (),
    description: str | None = None,
) -> list[ExactChanges]:
    """Score sampled one-token substitutions; the arguments are those of `gradient_fidelity`.

    Costs `substitutions` forward passes a response. `description` shows progress under that name.

    Returns:
        One item a response that has a candidate, in order.
    """
    prefix = value.prefix(prompts)
    base_BN = value.score(prefix, tokens_BNT, mask_BNT)
    generator = torch.Generator().manual_seed(seed)
    found = []
    prompts_seen = range(tokens_BNT.shape[0])
    for b in track(prompts_seen, description, unit="prompts") if description else prompts_seen:
        one = prefix.select(torch.tensor([b], device=tokens_BNT.device))
        for n in range(tokens_BNT.shape[1]):
            tokens_T, mask_T = tokens_BNT[b, n], mask_BNT[b, n].bool()
            t_S, v_S = sample_substitutions(tokens_T, mask_T, shortlist_BNTK[b, n], substitutions, generator, eos_ids)
            if len(t_S):
                scores_S = substituted_scores(value, one, tokens_T, mask_T, t_S, v_S)
                found.append(ExactChanges(b, n, t_S, v_S, scores_S - base_BN[b, n]))
    return found


def compare_changes(value: Any, tokens_BNT: Tensor, changes: Sequence[ExactChanges], gradient_BNTD: Tensor) -> Fidelity:
    """Compare the linear prediction of a gradient with exact changes.

    Args:
        value: what was scored (`embed`).
        tokens_BNT: response token ids.
        changes: of `exact_changes`.
        gradient_BNTD: any gradient at the responses' embeddings.

    Raises:
        ValueError: no response has enough candidates.
    """
    rows = []
    for change in changes:
        if len(change.t_S) > _TOP:
            old_S = tokens_BNT[change.b, change.n, change.t_S]
            step_SD = (value.embed(change.v_S) - value.embed(old_S)).detach().float()
            predicted_S = (gradient_BNTD[change.b, change.n, change.t_S].float() * step_SD).sum(-1)
            rows.append(compare_ranks(predicted_S.cpu(), change.exact_S.cpu()))
    table = torch.tensor([row for row in rows if row[0] == row[0]], dtype=torch.float64)
    if len(table) == 0:
        raise ValueError(
            f"gradient_fidelity: no response has more than {_TOP} candidate substitutions with unequal change"
        )
    spearman, top, best, random = table.mean(dim=0).tolist()
    half = normal_half_width(table[:, 0].std().item() if len(table) > 1 else 0.0, len(table))
    return Fidelity(spearman, spearman - half, spearman + half, top, best, random, len(table))


def score_gradient(value: Any, prefix: Any, mask_BNT: Tensor) -> ValueGradient:
    """Return the plain input gradient of `value.score` as particles_BNTD -> (values_BN, gradients_BNTD)."""
    return autograd_value(lambda u_BNTD: value.score(prefix, u_BNTD, mask_BNT))


def sample_substitutions(
    tokens_T: Tensor,
    mask_T: Tensor,
    shortlist_TK: Tensor,
    count: int,
    generator: torch.Generator,
    eos_ids: Sequence[int] = (),
) -> tuple[Tensor, Tensor]:
    """Draw (position, new token) pairs without replacement, never the token that stands there; at most `count`."""
    allowed_TK = mask_T[:, None] & (shortlist_TK != tokens_T[:, None])
    if eos_ids:
        allowed_TK = allowed_TK & ~is_any_of(shortlist_TK, eos_ids) & ~is_any_of(tokens_T, eos_ids)[:, None]
    candidates_C2 = allowed_TK.nonzero()
    order_C = torch.randperm(len(candidates_C2), generator=generator)[:count].to(candidates_C2.device)
    t_S, k_S = candidates_C2[order_C].unbind(dim=1)
    return t_S, shortlist_TK[t_S, k_S]


@torch.no_grad()
def reference_shortlist(
    lm: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    tokens_BNT: Tensor,
    k: int = 30,
    pad_token_id: int = 0,
    vocabulary: int | None = None,
) -> Tensor:
    """Return the reference's k likeliest tokens at each response position, shortlist_BNTK.

    Args:
        lm: causal language model.
        prompts: B lists of token ids.
        tokens_BNT: response token ids, right padded; what stands at padding gives candidates of no meaning.
        k: shortlist length, at most the vocabulary.
        pad_token_id: any valid id.
        vocabulary: only ids below it are listed; None lists any row of the model's table.
    """
    distribution = SamplingSettings(top_k=k)
    reference = TorchReference(lm, distribution, eos_ids=(), pad_id=pad_token_id, vocabulary=vocabulary)
    everywhere_BNT = torch.ones_like(tokens_BNT, dtype=torch.bool)
    responses = Responses([list(prompt) for prompt in prompts], tokens_BNT, everywhere_BNT, (), pad_token_id)
    ids_RTK = reference.shortlists(reference.prefix(responses.prompts), responses).ids[..., :k]
    return ids_RTK.view(*tokens_BNT.shape, k)


def spearman_correlation(x_S: Tensor, y_S: Tensor) -> float:
    """Correlate ranks (ties share their average rank); NaN where one side is constant."""
    x_S, y_S = _average_ranks(x_S), _average_ranks(y_S)
    x_S, y_S = x_S - x_S.mean(), y_S - y_S.mean()
    scale = (x_S.square().sum() * y_S.square().sum()).sqrt()
    return float((x_S * y_S).sum() / scale) if scale > 0 else float("nan")


def _average_ranks(x_S: Tensor) -> Tensor:
    _, inverse_S, counts_U = torch.unique(x_S.double(), return_inverse=True, return_counts=True)
    ranks_U: Tensor = counts_U.cumsum(0).double() - (counts_U.double() - 1) / 2
    return ranks_U[inverse_S]


def compare_ranks(predicted_S: Tensor, exact_S: Tensor) -> tuple[float, float, float, float]:
    """Return (Spearman, gain of the predicted top 8, gain of the true top 8, mean gain) of S > 8 substitutions."""
    top = exact_S[predicted_S.topk(_TOP).indices].mean().item()
    best = exact_S.topk(_TOP).values.mean().item()
    return spearman_correlation(predicted_S, exact_S), top, best, exact_S.mean().item()


@torch.no_grad()
def substituted_scores(value: Any, prefix: Any, tokens_T: Tensor, mask_T: Tensor, t_S: Tensor, v_S: Tensor) -> Tensor:
    """Score a response with one token replaced, for all S replacements: [S].

    Args:
        value: anything that scores token ids (`score`).
        prefix: `value.prefix` of the one prompt.
        tokens_T: the response, right padded.
        mask_T: bool, True on its tokens; at least one.
        t_S: position of each replacement, int64.
        v_S: its token.
    """
    length = int(mask_T.nonzero().max()) + 1
    rows_ST = tokens_T[:length].repeat(len(t_S), 1)
    rows_ST[torch.arange(len(t_S), device=t_S.device), t_S] = v_S
    scores = [
        value.score(prefix, chunk[None], mask_T[:length].expand(1, len(chunk), length))[0]
        for chunk in rows_ST.split(_ROWS)
    ]
    return torch.cat(scores)
