"""``pivot``: one token is replaced, the reference regrows what follows, and an exact test decides.

A round draws a position i of each response y from rho(. | y), large where the reference is undecided and the
displacement is long, then a token from the tilted distribution at i (multiplier 1 within the cap a token), a = y_i,

    q_y(b) ∝ p(b | y_<i) exp(<Delta_i, e_b - e_a>),       EOS keeps its probability,

lets the reference write the rest of y' after b, and keeps y' with probability

    A = min{1, [p(b)/p(a)] [q_y'(a)/q_y(b)] [rho(i | y')/rho(i | y)] exp((R(y') - R(y)) / alpha)}.

The suffixes are drawn from p and cancel, so the stationary distribution is p(y | x) exp(R(y) / alpha), p the sampling
distribution: the KL-regularised optimum at temperature alpha, whatever the number of rounds. With ``tilted_tokens``
above 1 the tokens after the pivot are drawn from the tilted distribution too, and their ratios p(y'_t) q_y'(y_t) /
(p(y_t) q_y(y'_t)) join A; Delta is that of y at the same place, 0 beyond its end.

    rho(i | y) = (1 - u) H_i |Delta_i| / sum_j H_j |Delta_j| + u / |y|,      u = 0.2,
    H_i the entropy of the distribution at i.

Source: suffix regrowth under Metropolis-Hastings is QUEST and QAlign (Faria et al. 2024, 2025), with a uniform position
and no gradient; the tilt of the pivot by the value's gradient is ours.

What is exact is so in exact arithmetic, for a direction that depends on the response alone (no kernel between
particles).

Cost a response and round, for P_ref and P_val parameters and T tokens: 2 P_ref T FLOPs (what is kept is run in
parallel, the rest token by token) and the flow at y' (4 P_val T with the value's own gradient, 2 P_val T with a secant
head); the first round 2 P_ref T more where the sampler did not keep the distributions. Rows of a batch wait for the
longest rewrite, which is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from vgf_llm.text.distribution import Shortlist, truncate
from vgf_llm.text.noise import combine_seeds, gumbel_noise
from vgf_llm.text.path import Path, chosen, own_logps, path_of
from vgf_llm.text.plans import RowPlan, distribution_rule
from vgf_llm.text.protocols import Decoded, Move, Moved, Prefix, Reference, Work, check_no_kernel
from vgf_llm.text.regrown_step import REGROW, regrown_token, tilted_distribution
from vgf_llm.text.responses import Responses

_UNIFORM_SHARE = 0.2
_POSITION, _TEST, _TEXT = 0, 1, 2


class PivotDecoder:
    """Suffix regrowth from a tilted token, under Metropolis-Hastings.

    Args:
        reference: The frozen base model and its distribution.
        table_VD: Input embeddings that the particles live in.
        tilted_tokens: Tokens from the pivot on that are drawn from the tilted distribution, at least 1.
    """

    def __init__(self, reference: Reference, table_VD: Tensor, *, tilted_tokens: int = 1) -> None:
        if tilted_tokens < 1:
            raise ValueError(f"tilted_tokens must be at least 1, got {tilted_tokens}")
        self.reference = reference
        self.table_VD = table_VD
        self.tilted_tokens = tilted_tokens

    def prepare(self, prompts: list[list[int]]) -> Prefix:
        """Run the prompts through the reference once."""
        return self.reference.prefix(prompts)

    @torch.no_grad()
    def decode(self, context: Prefix, move: Move) -> Decoded:
        """Regrow each response from a pivot, test it and keep it or not."""
        check_no_kernel("pivot", move.budget)
        length = self.reference.sampling.max_new_tokens
        responses, path, work = _padded(move.responses, length), move.state, Work.none(len(move.responses.prompts))
        if path is None:
            path, work = path_of(self.reference, context, responses)
            path = Path(path.distribution.padded(length), pad(path.own_BNT, (0, length - path.own_BNT.shape[-1])))
        here = _padded_moved(move.moved, length)
        seeds_BN = move.seeds_BN.to(responses.tokens_BNT.device)
        rho_BNT = _position_distribution(path, responses, here.displacement_BNTD)
        pivot_BN = _draw(rho_BNT, combine_seeds(seeds_BN, _POSITION))
        regrowth = _Regrowth(self, move, responses, here.displacement_BNTD, path.distribution, pivot_BN, seeds_BN)
        written = self.reference.rewrite(context, responses, pivot_BN, regrowth)
        new_path = Path(regrowth.distribution, own_logps(regrowth.distribution, written))
        there = _padded_moved(move.flow(written), length)
        work += Work.of(written.lengths_BN, reference=1, value=move.flow_passes)

        forward_BN = self._tilted_logps(move, responses, here, new_path.distribution, written, pivot_BN)
        backward_BN = self._tilted_logps(move, written, there, path.distribution, responses, pivot_BN)
        tilted_BNT = self._is_tilted(pivot_BN, length)
        log_a_BN = (
            (new_path.own_BNT - path.own_BNT).masked_fill(~tilted_BNT, 0).sum(-1)
            + (backward_BN - forward_BN)
            + (
                _log_at(_position_distribution(new_path, written, there.displacement_BNTD), pivot_BN)
                - _log_at(rho_BNT, pivot_BN)
            )
            + (there.values_BN - here.values_BN) / move.budget.temperature
        )
        uniform_BN = torch.exp(-torch.exp(-_noise(combine_seeds(seeds_BN, _TEST), 1).squeeze(-1)))
        kept_BN = uniform_BN.log() < log_a_BN
        moved = here.where(kept_BN, there)
        return Decoded(
            responses=chosen(kept_BN, written, responses),
            nats_BN=torch.full(kept_BN.shape, torch.nan, device=kept_BN.device),
            work=work,
            values_BN=moved.values_BN,
            moved=moved,
            state=path.where(kept_BN, new_path),
        )

    def _is_tilted(self, pivot_BN: Tensor, length: int) -> Tensor:
        """Positions that are drawn from the tilted distribution, bool [B, N, T]."""
        offset_BNT = torch.arange(length, device=pivot_BN.device) - pivot_BN.unsqueeze(-1)
        return (offset_BNT >= 0) & (offset_BNT < self.tilted_tokens)

    def _tilted_logps(
        self, move: Move, start: Responses, moved: Moved, distribution: Shortlist, end: Responses, pivot_BN: Tensor
    ) -> Tensor:
        """Log-probability of the tilted tokens of ``end`` regrown from ``start``; ``distribution`` is along ``end``."""
        some_BNT = self._is_tilted(pivot_BN, end.tokens_BNT.shape[-1]) & end.mask_BNT
        distribution_XK = Shortlist(distribution.ids[some_BNT], distribution.logps[some_BNT])
        tilted_XK = self.tilted_distribution(
            move, distribution_XK, moved.displacement_BNTD[some_BNT], start.tokens_BNT[some_BNT]
        )
        same_XK = (distribution_XK.ids == end.tokens_BNT[some_BNT].unsqueeze(-1)) & ~torch.isinf(distribution_XK.logps)
        own_X = tilted_XK.logps.masked_fill(~same_XK, -torch.inf).amax(-1)
        return torch.zeros_like(distribution.logps[..., 0]).masked_scatter(some_BNT, own_X).sum(-1)

    def tilted_distribution(
        self, move: Move, distribution: Shortlist, displacement: Tensor, token: Tensor
    ) -> Shortlist:
        """Return q at positions [...]: the distribution tilted by the displacement, within the cap a token."""
        cap = torch.full_like(distribution.logps[..., 0], move.budget.max_token_nats)
        return tilted_distribution(distribution, displacement, token, self.table_VD, move.responses.eos_ids, cap)


@dataclass
class _Regrowth:
    """The state of one rewrite: the distributions that were met, and the noise that picks the tokens."""

    decoder: PivotDecoder
    move: Move
    start: Responses
    displacement_BNTD: Tensor
    old_distribution: Shortlist
    pivot_BN: Tensor
    seeds_BN: Tensor
    distribution: Shortlist = field(init=False)

    def __post_init__(self) -> None:
        # What is kept keeps its distributions; the rest is filled in as it is written.
        before_BNT1 = (
            torch.arange(self.old_distribution.ids.shape[2], device=self.pivot_BN.device) < self.pivot_BN.unsqueeze(-1)
        ).unsqueeze(-1)
        self.distribution = Shortlist(
            self.old_distribution.ids.clone(), self.old_distribution.logps.masked_fill(~before_BNT1, -torch.inf)
        )
        self.text_seeds_R = combine_seeds(self.seeds_BN.flatten(), _TEXT)

    def __call__(self, logits_RV: Tensor, position_R: Tensor) -> Tensor:
        """Draw every row's next token, from the tilted distribution at the pivot and the reference's after it."""
        return self._drawn(truncate(logits_RV, self.decoder.reference.sampling), position_R, None)

    def follow(self, distribution: Shortlist, position_R: Tensor, token_R: Tensor, live_R: Tensor) -> Tensor:
        """Take over the distributions that an engine met; see :class:`vgf_llm.text.choosing.TokenPicker`."""
        return self._drawn(distribution, position_R, live_R)

    def _drawn(self, distribution: Shortlist, position_R: Tensor, live_R: Tensor | None) -> Tensor:
        missing = self.old_distribution.ids.shape[-1] - distribution.ids.shape[-1]
        distribution = Shortlist(
            pad(distribution.ids, (0, missing)), pad(distribution.logps, (0, missing), value=-torch.inf)
        )
        inside_R = position_R < self.old_distribution.ids.shape[2]
        live_R = inside_R if live_R is None else inside_R & live_R
        position_R = position_R.clamp(max=self.old_distribution.ids.shape[2] - 1)
        rows_R = torch.arange(len(position_R), device=position_R.device)
        self.distribution.ids.flatten(0, 1)[rows_R[live_R], position_R[live_R]] = distribution.ids[live_R]
        self.distribution.logps.flatten(0, 1)[rows_R[live_R], position_R[live_R]] = distribution.logps[live_R]
        return regrown_token(
            distribution,
            self.displacement_BNTD.flatten(0, 1)[rows_R, position_R],
            self.start.tokens_BNT.flatten(0, 1)[rows_R, position_R],
            position_R - self.pivot_BN.flatten() < self.decoder.tilted_tokens,
            self.text_seeds_R,
            position_R,
            self.decoder.table_VD,
            self.move.responses.eos_ids,
            torch.full_like(distribution.logps[..., 0], self.move.budget.max_token_nats),
        )

    def plans(self, start_R: Tensor, tokens: int) -> list[RowPlan]:
        """Return the displacement and the old tokens of each row's tilted positions, its noise and its cap."""
        rule = {**distribution_rule(self.decoder.reference.sampling), "eos_ids": list(self.move.responses.eos_ids)}
        displacement_RTD, tokens_RT = self.displacement_BNTD.flatten(0, 1), self.start.tokens_BNT.flatten(0, 1).int()
        tilted, plans = min(self.decoder.tilted_tokens, tokens), []
        for row, start in enumerate(start_R.tolist()):
            tensors = {
                "displacement": pad(displacement_RTD[row, start : start + tilted], (0, 0, 0, tilted))[:tilted],
                "token": pad(tokens_RT[row, start : start + tilted], (0, tilted))[:tilted],
                "seed": self.text_seeds_R[row],
                "start": start_R[row].long(),
                "numbers": displacement_RTD.new_tensor([self.move.budget.max_token_nats]).float(),
            }
            plans.append(RowPlan(REGROW, rule, tensors))
        return plans


def _position_distribution(path: Path, responses: Responses, displacement_BNTD: Tensor) -> Tensor:
    """Return rho(i | y), [B, N, T]; 0 beyond the response."""
    logps = path.distribution.logps
    entropy_BNT = -(logps.exp() * logps.masked_fill(torch.isinf(logps), 0)).sum(-1)
    weight_BNT = (entropy_BNT * displacement_BNTD.float().norm(dim=-1)).masked_fill(~responses.mask_BNT, 0)
    total_BN1 = weight_BNT.sum(-1, keepdim=True)
    uniform_BNT = responses.mask_BNT / responses.mask_BNT.sum(-1, keepdim=True)
    directed_BNT = torch.where(total_BN1 > 0, weight_BNT / total_BN1.clamp(min=1e-30), uniform_BNT)
    return (1 - _UNIFORM_SHARE) * directed_BNT + _UNIFORM_SHARE * uniform_BNT


def _noise(seeds_BN: Tensor, columns: int) -> Tensor:
    """Standard Gumbel noise [B, N, columns]."""
    columns_RX = torch.arange(columns, device=seeds_BN.device).expand(seeds_BN.numel(), -1)
    return gumbel_noise(seeds_BN.flatten(), 0, columns_RX).view(*seeds_BN.shape, columns)


def _draw(probability_BNT: Tensor, seeds_BN: Tensor) -> Tensor:
    return (probability_BNT.log() + _noise(seeds_BN, probability_BNT.shape[-1])).argmax(-1)


def _log_at(probability_BNT: Tensor, position_BN: Tensor) -> Tensor:
    return probability_BNT.gather(-1, position_BN.unsqueeze(-1)).squeeze(-1).log()


def _padded(responses: Responses, length: int) -> Responses:
    missing = length - responses.tokens_BNT.shape[-1]
    return Responses(
        responses.prompts,
        pad(responses.tokens_BNT, (0, missing), value=responses.pad_id),
        pad(responses.mask_BNT, (0, missing), value=False),
        responses.eos_ids,
        responses.pad_id,
        None if responses.distribution is None else responses.distribution.padded(length),
    )


def _padded_moved(moved: Moved, length: int) -> Moved:
    missing = length - moved.displacement_BNTD.shape[2]
    return Moved(pad(moved.displacement_BNTD, (0, 0, 0, missing)), moved.values_BN, moved.distance_BN)
