"""One-pass transported sampling: the reference's own draws, tilted token by token within a budget of nats.

With b_t the bonus of the tokens after the text so far (:mod:`vgf_llm.text.bonus`) and p_t the reference's distribution,

    q_t(v) ∝ p_t(v) exp(s_t b_t(v)) for text, q_t(EOS) = p_t(EOS),        y_t ~ q_t,

so a text costs one sample. Each text is an exact draw from q. Its nats, sum_t KL(q_t || p_t), are exact on its path.

The multiplier s_t is steered. At small tilts KL(q_t || p_t) = s^2 w_t / 2 with w_t the variance of b_t under p_t. One s
for all tokens that are left spends what is left of the nats, r, where

    s_t = sqrt(2 r / (n w)),

n the tokens that are expected to come and w the mean so far of 2 KL / s^2. That is w_t at small tilts, and less where
the tilt saturates or a cap binds. A token spends at most ``max_token_nats`` and never more than is left.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from vgf_llm.errors import require_finite
from vgf_llm.flow.budget import TransportBudget
from vgf_llm.settings import SamplingSettings
from vgf_llm.text.bonus import Bonus, BonusSource
from vgf_llm.text.distribution import Shortlist, truncate
from vgf_llm.text.noise import gumbel_noise
from vgf_llm.text.reference import TorchReference
from vgf_llm.text.responses import Responses, is_any_of
from vgf_llm.text.tilt import capped_multiplier, kl_divergence, tilt

_PRIOR_TOKENS = 4.0  # how many tokens the variance from elsewhere counts for
_NO_VARIANCE = 1e-12


@dataclass(frozen=True)
class Steering:
    """How the nats of a response are spent along it.

    Attributes:
        nats: KL budget of a response, at least 0.
        max_token_nats: Largest KL at one token.
        variance: Mean variance of the bonus under the reference, from elsewhere; None: from the text's own tokens.
        left_T: Tokens that are expected to come, this one included, at each position; None: up to the longest.
    """

    nats: float
    max_token_nats: float
    variance: float | None = None
    left_T: Tensor | None = None

    def __post_init__(self) -> None:
        """Check the ranges; raises SettingError."""
        require_finite("nats", self.nats, 0, "a finite number >= 0")
        if self.max_token_nats != math.inf:
            require_finite("max_token_nats", self.max_token_nats, 0, "a number > 0", above=True)


def steered_multiplier(left_R: Tensor, tokens_R: Tensor | float, variance_R: Tensor) -> Tensor:
    """Return s = sqrt(2 r / (n w)), [R]; 0 where the bonus does not vary.

    Args:
        left_R: Nats that are left, r.
        tokens_R: Tokens to come, n.
        variance_R: Nats per token that s = sqrt(2) spends, w.
    """
    found_R = (2 * left_R.clamp(min=0) / (tokens_R * variance_R.clamp(min=1e-30))).sqrt()
    return torch.where(variance_R > _NO_VARIANCE, found_R, torch.zeros_like(found_R))


def bonus_variance(logps_RK: Tensor, bonus_RK: Tensor, is_eos_RK: Tensor) -> Tensor:
    """Return the variance of the bonus over the tokens that are text, times their probability, [R]."""
    p_RK = logps_RK.exp().masked_fill(is_eos_RK, 0)
    mass_R1 = p_RK.sum(-1, keepdim=True).clamp(min=1e-30)
    mean_R1 = (p_RK * bonus_RK).sum(-1, keepdim=True) / mass_R1
    return (p_RK * (bonus_RK - mean_R1).square()).sum(-1)


@dataclass
class TiltedDraws:
    """The picker that draws from q; see the module's first lines.

    Attributes:
        sampling: The reference's distribution.
        seeds_R: int64, one seed a row.
        eos_ids: Ids that end a response.
        bonus: Of these rows.
        steering: How the nats are spent.
        reads_hidden: Whether the bonus reads the reference's hidden states.
        nats_R: KL spent so far.
        variance_R: Mean so far of 2 KL / s^2; at 0 nats, of the variance of the bonus.
    """

    sampling: SamplingSettings
    seeds_R: Tensor
    eos_ids: tuple[int, ...]
    bonus: Bonus
    steering: Steering
    reads_hidden: bool = False
    nats_R: Tensor = field(init=False)
    variance_R: Tensor = field(init=False)
    _hidden_RD: Tensor | None = None
    _last_R: Tensor | None = None

    def __post_init__(self) -> None:
        """Start with nothing spent."""
        self.nats_R = torch.zeros(len(self.seeds_R), device=self.seeds_R.device)
        self._done_R = torch.zeros_like(self.seeds_R, dtype=torch.bool)
        self._varied_R = torch.zeros_like(self.nats_R)
        known = self.steering.variance is not None
        self._weight_R = torch.full_like(self.nats_R, _PRIOR_TOKENS if known else 0.0)
        self.variance_R = torch.full_like(self.nats_R, self.steering.variance or 0.0)

    def __call__(self, logits_RV: Tensor, position: int) -> Tensor:
        """Draw the next token of every row."""
        p = truncate(logits_RV, self.sampling)
        is_eos_RK = is_any_of(p.ids, self.eos_ids)
        text = Shortlist(p.ids, p.logps.masked_fill(is_eos_RK, -torch.inf))
        bonus_RK = self.bonus(text, self._hidden_RD, self._last_R).masked_fill(is_eos_RK, 0)
        own_R = bonus_variance(p.logps, bonus_RK, is_eos_RK)
        variance_R = torch.where(self.variance_R > _NO_VARIANCE, self.variance_R, own_R)
        left_R = (self.steering.nats - self.nats_R).clamp(min=0)
        wanted_R = steered_multiplier(left_R, self._to_come(position), variance_R)
        cap_R = left_R.clamp(max=self.steering.max_token_nats)
        if self.steering.variance is None:  # the first tokens that vary say little of the others
            share_R = torch.minimum(cap_R, 2 * left_R / self._to_come(position))
            cap_R = torch.where(self._varied_R < _PRIOR_TOKENS, share_R, cap_R)
            self._varied_R = self._varied_R + (own_R > _NO_VARIANCE)
        multiplier_R = capped_multiplier(p.logps, bonus_RK, wanted_R, is_eos_RK, cap_R)
        logq_RK = tilt(p.logps, bonus_RK, multiplier_R, is_eos_RK)
        nats_R = kl_divergence(logq_RK, p.logps)
        self._learn(nats_R, wanted_R, own_R)
        self.nats_R = self.nats_R + nats_R.masked_fill(self._done_R, 0)
        scores_RK = logq_RK + gumbel_noise(self.seeds_R, position, p.ids)
        token_R = p.ids.gather(-1, scores_RK.argmax(-1, keepdim=True)).squeeze(-1)
        self._done_R = self._done_R | is_any_of(token_R, self.eos_ids)
        self._last_R = token_R.masked_fill(self._done_R, -1)
        return token_R

    @property
    def see_hidden(self) -> Callable[[Tensor], None] | None:
        """Takes what the reference's output layer reads; None where nothing needs it."""
        return self._see_hidden if self.reads_hidden else None

    def _see_hidden(self, hidden_RD: Tensor) -> None:
        self._hidden_RD = hidden_RD

    def _to_come(self, position: int) -> float:
        left_T = self.steering.left_T
        if left_T is None:
            return float(self.sampling.max_new_tokens - position)
        return float(left_T[min(position, len(left_T) - 1)])

    def _learn(self, nats_R: Tensor, wanted_R: Tensor, own_R: Tensor) -> None:
        """Add this token to the mean of 2 KL / s^2; where nothing was wanted, its variance."""
        seen_R = torch.where(wanted_R > 0, 2 * nats_R / wanted_R.square().clamp(min=1e-30), own_R)
        live_R = (~self._done_R).float()
        self._weight_R = self._weight_R + live_R
        self.variance_R = self.variance_R + live_R * (seen_R - self.variance_R) / self._weight_R.clamp(min=1)


@dataclass(frozen=True)
class Streamed:
    """Texts of one pass, and the KL(q || p) that each spent on its path, [B, N]."""

    responses: Responses
    nats_BN: Tensor


class StreamSampler:
    """Draws responses from the tilted reference in one pass.

    Args:
        reference: The frozen base model and its distribution, in this process.
        source: The bonus.
        steering: How the nats of a response are spent.
    """

    def __init__(self, reference: TorchReference, source: BonusSource, steering: Steering) -> None:
        self.reference, self.source, self.steering = reference, source, steering

    def stream(self, prompts: list[list[int]], seeds_BN: Tensor) -> Streamed:
        """Return N responses to each of B prompts, with their nats.

        Args:
            prompts: B lists of token ids.
            seeds_BN: int64, one seed a response, which alone decides it with its prompt. At 0 nats it is the response
                that the sampler of the reference draws from the same seed.
        """
        draws = self._draws(prompts, seeds_BN)
        written = self.reference.write(self.reference.prefix(prompts), seeds_BN.shape[1], draws)
        return Streamed(written, draws.nats_R.view(seeds_BN.shape))

    def calibrated(self, prompts: list[list[int]], seeds_BN: Tensor) -> StreamSampler:
        """Return the same, steered by the variance of the bonus and the lengths of N plain samples to each prompt."""
        plain = self.at(0.0)
        draws = plain._draws(prompts, seeds_BN)
        written = self.reference.write(self.reference.prefix(prompts), seeds_BN.shape[1], draws)
        left_T = expected_left(written.lengths_BN.flatten(), self.reference.sampling.max_new_tokens)
        steering = replace(self.steering, variance=float(draws.variance_R.mean()), left_T=left_T)
        return StreamSampler(self.reference, self.source, steering)

    def _draws(self, prompts: list[list[int]], seeds_BN: Tensor) -> TiltedDraws:
        return TiltedDraws(
            self.reference.sampling,
            seeds_BN.flatten().to(self.reference.device),
            tuple(self.reference.eos_ids),
            self.source.begin(prompts, seeds_BN.shape[1]),
            self.steering,
            self.source.reads_hidden,
        )

    def sample(self, prompts: list[list[int]], seeds_BN: Tensor) -> Responses:
        """Return the responses alone; see :class:`vgf_llm.text.sampler.Sampler`."""
        return self.stream(prompts, seeds_BN).responses

    def at(self, nats: float) -> StreamSampler:
        """Return the same with another number of nats."""
        return StreamSampler(self.reference, self.source, replace(self.steering, nats=nats))

    def within(self, budget: TransportBudget) -> StreamSampler:
        """Return the same with a budget's nats and their cap at a token; the rest of a budget is of no use here."""
        steering = replace(self.steering, nats=budget.nats, max_token_nats=budget.max_token_nats)
        return StreamSampler(self.reference, self.source, steering)


def expected_left(lengths_N: Tensor, longest: int, counts_N: Tensor | None = None) -> Tensor:
    """Return the mean number of tokens that are still to come where a response has not ended, float [T].

    Args:
        lengths_N: Tokens of base samples, their EOS included.
        longest: T, the limit on a response.
        counts_N: How often each length was seen, at least 0; None: once each.
    """
    counts_N = torch.ones(lengths_N.shape) if counts_N is None else counts_N
    counts_N, left = counts_N.to(lengths_N.device), []
    for position in range(longest):
        reaching_N = counts_N.double() * (lengths_N > position)
        total = float(reaching_N.sum())
        left.append(float((reaching_N * (lengths_N - position)).sum()) / total if total else float(longest - position))
    return torch.tensor(left)
