"""`causal`: a direction per position, from the reference's own hidden state before the token.

    g_t = g0 + unit W2 gelu(W1 n(h_t) + b1) / sqrt(D),     b_t(v) = <g_t, e_v> / rms + d_v,     n = layer norm

h_t is what the reference's output layer reads at t, so nothing more is run: one-pass decoding has it. e are rows of the
reference's input table, rms their root mean square, unit the spread of the targets; by sqrt(D) a step of AdamW moves
a bonus as far in a wide table as in a narrow one. W2 starts at zero and g0 at the
`constant` direction; the state that predicts the held-back prompts best is kept, the first one included.

    minimise  mean_x sum_k w_xk smooth_l1( (b_xk - a_xk - their weighted means in the row) / unit )

by AdamW, cosine to zero, with d = 0. Then d_v is what single tokens keep of the rest, shrunk by count (`table`), where
that predicts the held-back prompts better than 0; with it the fitted head has to beat the constant again. Weights w and
targets a are those of `targets`: exact changes of any reward, or another source's bonuses.

Source: the amortised gradient network of Value Gradient Flow (arXiv 2604.14265), read before the token, not at it; the
tilt p exp(s b) of a reference by a scorer of prefixes is that of FUDGE (arXiv 2104.05218) and of controlled decoding
(arXiv 2310.17022). Departure: linear in e_v, so that one head scores the whole shortlist.

Cost in FLOPs per token: 2 H (D_h + D) for the head and 2 K D for K candidates, under a thousandth of a 135M-parameter
forward for H = 256, K = 50. It fails where the effect of a token cannot be read off the text before it, and with few
prompts, where it falls back to the constant.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, gelu, layer_norm, smooth_l1_loss

from reward_models.directions.constant import table_scale
from reward_models.directions.table import Observations, best_shrink, left_error, shrunk_table
from reward_models.directions.targets import BonusTargets, centred
from reward_models.secant_settings import SecantTraining
from vgf_llm.console.progress import track
from vgf_llm.text.bonus import Bonus
from vgf_llm.text.distribution import Shortlist

_LOOKS = 20  # times that the held-back prompts are looked at
_LEAST_WEIGHT = 0.1  # of an even share of its position's weight, with which a candidate counts for d
_NUMBERS = 2**24  # of embeddings looked up at once


class CausalHead(nn.Module):
    """Two layers from a hidden state to a direction; see the module's first lines.

    Args:
        hidden_width: D_h, of what the reference's output layer reads.
        width: D, of its input table.
        vocabulary: V, rows of that table.
        units: H, between the two layers, at least 1.
        seed: Of the first layer.
    """

    unit: Tensor
    constant: Tensor
    rest: Tensor

    def __init__(self, hidden_width: int, width: int, vocabulary: int, units: int = 256, seed: int = 0) -> None:
        super().__init__()
        self.hidden_width, self.width, self.units, self.vocabulary = hidden_width, width, units, vocabulary
        self.first, self.second = nn.Linear(hidden_width, units), nn.Linear(units, width)
        self.register_buffer("unit", torch.ones(()))
        self.register_buffer("constant", torch.zeros(width))
        self.register_buffer("rest", torch.zeros(vocabulary))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.first.weight.copy_(torch.randn(units, hidden_width, generator=generator) / hidden_width**0.5)
            self.first.bias.zero_()
            self.second.weight.zero_()
            self.second.bias.zero_()

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> CausalHead:
        """Return the head whose ``state_dict`` these are, frozen; torch's random state is left alone."""
        units, hidden_width = tensors["first.weight"].shape
        with torch.random.fork_rng(devices=[]):
            head = cls(hidden_width, len(tensors["constant"]), len(tensors["rest"]), units)
        head.load_state_dict(tensors)
        return head.to(tensors["constant"].device).eval().requires_grad_(False)

    def go_on_from(self, earlier: CausalHead) -> None:
        """Take the layers of another head, in this one's unit; constant and rest stay."""
        for own, other in ((self.first, earlier.first), (self.second, earlier.second)):
            own.load_state_dict(other.state_dict())
        with torch.no_grad():
            for parameter in self.second.parameters():
                parameter.mul_(earlier.unit / self.unit)

    def forward(self, hidden: Tensor, drop: float = 0.0) -> Tensor:
        """Map hidden states [..., D_h] to directions [..., D], float32, in units of the reward per rms of the table.

        Args:
            hidden: What the output layer reads, of any dtype.
            drop: Share of the normalised inputs that is dropped, in [0, 1), while fitting.
        """
        with torch.autocast(hidden.device.type, enabled=False):
            inputs = layer_norm(hidden.to(self.first.weight.dtype), hidden.shape[-1:])
            learned = self.second(gelu(self.first(dropout(inputs, drop, training=drop > 0))))
            found: Tensor = (self.constant + self.unit * learned / self.width**0.5).float()
            return found


@dataclass(frozen=True)
class CausalDirection:
    """A fitted head with the table that its directions are read in: a source of bonuses.

    Attributes:
        head: Frozen.
        table_VD: The reference's input embeddings, of any float type.
        rms: Their root mean square.
        reads_hidden: True.
        passes: 0: no forward of any value.
    """

    head: CausalHead
    table_VD: Tensor
    rms: float
    reads_hidden: bool = True
    passes: float = 0.0

    @classmethod
    def of(cls, head: CausalHead, table_VD: Tensor) -> CausalDirection:
        """Join a head and a table."""
        return cls(head, table_VD.detach(), table_scale(table_VD))

    def begin(self, prompts: list[list[int]], rows_per_prompt: int) -> Bonus:
        """Return the bonus, which keeps no state."""

        @torch.no_grad()
        def bonus(shortlist: Shortlist, hidden_RD: Tensor | None, last_token_R: Tensor | None) -> Tensor:
            if hidden_RD is None:
                raise ValueError("a causal direction reads the reference's hidden state, and was given none")
            return bonuses(self.head, hidden_RD, self.table_VD, shortlist.ids, self.rms)

        return bonus


def bonuses(
    head: CausalHead, hidden_XD: Tensor, table_VD: Tensor, ids_XK: Tensor, rms: float, drop: float = 0.0
) -> Tensor:
    """Return b of the module's first lines for the candidates of every row, [X, K], float32."""
    return inner_products(head(hidden_XD, drop), table_VD, ids_XK) / rms + head.rest[ids_XK]


def inner_products(direction_XD: Tensor, table_VD: Tensor, ids_XK: Tensor) -> Tensor:
    """Return <g_x, e_v> for the candidates of every row, [X, K], float32."""
    return torch.einsum("xd,xkd->xk", direction_XD.float(), table_VD[ids_XK].float())


def fit_causal(
    targets: BonusTargets,
    table_VD: Tensor,
    training: SecantTraining,
    constant_D: Tensor | None = None,
    start: CausalHead | None = None,
) -> tuple[CausalHead, dict[str, float | None]]:
    """Fit a head to bonus targets over a shortlist at positions.

    Args:
        targets: Of at least two prompts; changes of a reward, or bonuses of a teacher.
        table_VD: The reference's input embeddings.
        training: Steps, batch size in candidates, learning rate, weight decay, dropout, units and seed.
        constant_D: g0 (`constant.ConstantFit.direction_D`); zero when not given.
        start: An earlier head to continue from; None starts anew.

    Returns:
        The head, frozen, and figures: the step that was kept (0: the constant, -1: `start` as it came), the shrink of d
        (None: d is 0), and the loss on the held-back prompts there and at the constant, each with its d.

    Raises:
        DataError: The targets are of one prompt.
    """
    rms, (fitted, held) = table_scale(table_VD), targets.split()
    vocabulary, width = table_VD.shape
    head = CausalHead(targets.hidden_XD.shape[1], width, vocabulary, training.hidden, training.fit_seed)
    head = head.to(table_VD.device)
    head.unit.copy_(_spread(fitted))
    if constant_D is not None:
        head.constant.copy_(constant_D)
    optimizer = torch.optim.AdamW(head.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, training.steps)
    alone = copy.deepcopy(head.state_dict())
    if start is not None:
        head.go_on_from(start)
    kept_step = 0 if start is None else -1
    best, best_loss = copy.deepcopy(head.state_dict()), _held_loss(head, held, table_VD, rms)
    batches, every = _batches(fitted, training), max(1, training.steps // _LOOKS)
    torch.manual_seed(training.fit_seed)  # of the dropout
    for step in track(range(1, training.steps + 1), "fitting the causal head", unit="steps"):
        loss = row_losses(head, next(batches), table_VD, rms, training.dropout).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % every == 0 and (found := _held_loss(head, held, table_VD, rms)) < best_loss:
            best, best_loss, kept_step = copy.deepcopy(head.state_dict()), found, step
    ends = {0: _with_rest(head, alone, fitted, held, table_VD, rms)}
    if kept_step:
        ends[kept_step] = _with_rest(head, best, fitted, held, table_VD, rms)
    kept = min(ends, key=lambda step: ends[step][0])
    head.load_state_dict(best if kept else alone)
    loss_kept, shrink = ends[kept]
    if shrink is not None:
        left = _left_over(head, targets, table_VD, rms)
        head.rest.copy_(shrunk_table(left, torch.zeros_like(head.rest).double(), shrink))
    figures = {
        "kept_step": kept,
        "shrink": shrink,
        "held_back_loss": loss_kept,
        "held_back_loss_of_constant": ends[0][0],
    }
    return head.eval().requires_grad_(False), figures


def row_losses(head: CausalHead, targets: BonusTargets, table_VD: Tensor, rms: float, drop: float = 0.0) -> Tensor:
    """Return the loss of every position, [X], as the module's first lines have it."""
    bonus_XK = bonuses(head, targets.hidden_XD, table_VD, targets.ids_XK, rms, drop)
    apart_XK = centred(bonus_XK - targets.targets_XK, targets.weights_XK) / head.unit
    losses_XK = smooth_l1_loss(apart_XK, torch.zeros_like(apart_XK), reduction="none")
    return (losses_XK * targets.weights_XK).sum(-1)


@torch.no_grad()
def _left_over(head: CausalHead, targets: BonusTargets, table_VD: Tensor, rms: float) -> Observations:
    """Return what a head leaves of its targets, each position a context; candidates that hardly count are left out."""
    rows = _chunks(targets, table_VD)
    found = [bonuses(head, targets.hidden_XD[part], table_VD, targets.ids_XK[part], rms) for part in rows]
    count_X1 = (targets.weights_XK > 0).sum(-1, keepdim=True)
    is_there_XK = targets.weights_XK * count_X1 > _LEAST_WEIGHT
    context_XK = torch.arange(len(targets), device=is_there_XK.device).unsqueeze(1).expand_as(is_there_XK)
    left_XK = targets.targets_XK - torch.cat(found)
    return Observations(context_XK[is_there_XK], targets.ids_XK[is_there_XK], left_XK[is_there_XK])


@torch.no_grad()
def _with_rest(
    head: CausalHead, state: dict[str, Tensor], fitted: BonusTargets, held: BonusTargets, table_VD: Tensor, rms: float
) -> tuple[float, float | None]:
    """Return the held-back loss of a state with its d, and the shrink of d; None where d does not lower the error."""
    head.load_state_dict(state)
    left, held_left = (_left_over(head, part, table_VD, rms) for part in (fitted, held))
    zero_V = torch.zeros_like(head.rest).double()
    shrink, error = best_shrink(left, held_left, zero_V)
    if error >= left_error(zero_V, held_left):
        return _held_loss(head, held, table_VD, rms), None
    head.rest.copy_(shrunk_table(left, zero_V, shrink))
    return _held_loss(head, held, table_VD, rms), shrink


def _chunks(targets: BonusTargets, table_VD: Tensor) -> Sequence[Tensor]:
    """Split the rows so that not too many embeddings stand together."""
    at_once = max(1, _NUMBERS // (targets.ids_XK.shape[1] * table_VD.shape[1]))
    rows_X = torch.arange(len(targets), device=targets.ids_XK.device)
    return list(torch.split(rows_X, at_once))


@torch.no_grad()
def _held_loss(head: CausalHead, held: BonusTargets, table_VD: Tensor, rms: float) -> float:
    losses = [row_losses(head, held.take(part), table_VD, rms) for part in _chunks(held, table_VD)]
    return float(torch.cat(losses).mean())


def _batches(targets: BonusTargets, training: SecantTraining) -> Iterator[BonusTargets]:
    """Draw positions with about `batch_size` candidates together, for ever."""
    generator = torch.Generator().manual_seed(training.fit_seed)
    a_row = float((targets.weights_XK > 0).sum(-1).float().mean())
    rows = max(1, round(training.batch_size / max(a_row, 1.0)))
    while True:
        yield targets.take(torch.randint(len(targets), (rows,), generator=generator).to(targets.ids_XK.device))


def _spread(targets: BonusTargets) -> Tensor:
    """Return the weighted root mean square of the centred targets."""
    squares_XK = targets.weights_XK * centred(targets.targets_XK, targets.weights_XK).square()
    return squares_XK.sum(-1).mean().sqrt().clamp(min=1e-12)
