"""Two pretended processes with different numbers of rows and tokens learn what one with the whole batch learns.

Every engine averages the gradients of its processes. Losses are divided by counts of the whole step and multiplied by
the number of processes, so the average is the gradient of the whole batch, however uneven the parts are.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from reward_models.value_losses import value_loss
from vgf_llm.training.batch import Counts, Rows, TrainBatch, ValueBatch, without_effect
from vgf_llm.training.distillation.losses import dpo, kl_anchor, weighted_nll
from vgf_llm.training.rollout import PromptRow, own_rows

ROWS, TOKENS = 7, 9
PARTS = (slice(0, 2), slice(2, 7))
generator = torch.Generator().manual_seed(5)
FEATURES = torch.randn(ROWS, TOKENS, 3, generator=generator, dtype=torch.float64)
OTHERS = torch.randn(ROWS, TOKENS, generator=generator, dtype=torch.float64)
LENGTHS = torch.tensor([1, 2, 9, 8, 9, 7, 0])
MASK = torch.arange(TOKENS) < LENGTHS.unsqueeze(1)
WEIGHTS = torch.tensor([0.1, 0.9, 0.0, 0.5, 0.2, 0.3, 0.4], dtype=torch.float64)
PAIRS = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0], dtype=torch.float64)

Loss = Callable[[Tensor, slice, Tensor], Tensor]


def nll(outputs: Tensor, rows: slice, count: Tensor) -> Tensor:
    return weighted_nll(outputs, MASK[rows], WEIGHTS[rows], count)[0]


def preference(outputs: Tensor, rows: slice, count: Tensor) -> Tensor:
    sums, reference = outputs.masked_fill(~MASK[rows], 0).sum(-1), OTHERS[rows].sum(-1)
    return dpo(sums, 0.3 * sums.sin(), reference, -reference, 0.1, PAIRS[rows], count)[0]


def anchor(outputs: Tensor, rows: slice, count: Tensor) -> Tensor:
    return kl_anchor(outputs, OTHERS[rows], MASK[rows], count)[0]


def value(outputs: Tensor, rows: slice, count: Tensor) -> Tensor:
    return value_loss(outputs, OTHERS[rows], MASK[rows], 0.7, count)[0]


def gradient(loss: Loss, parts: tuple[slice, ...], count: Tensor) -> Tensor:
    """Mean over processes of the gradient of (loss * processes), as DDP forms it."""
    weight = torch.tensor([0.3, -0.7, 0.2], dtype=torch.float64, requires_grad=True)
    gradients = [torch.autograd.grad(loss(FEATURES[part] @ weight, part, count) * len(parts), weight) for part in parts]
    return torch.stack([found[0] for found in gradients]).mean(0)


@pytest.mark.parametrize(
    ("loss", "counts"),
    [
        (nll, (WEIGHTS.unsqueeze(1) * MASK).sum(1)),
        (preference, PAIRS),
        (anchor, MASK.sum(1).double()),
        (value, MASK.sum(1).double()),
    ],
)
def test_the_mean_of_uneven_parts_is_the_whole_batch(loss: Loss, counts: Tensor) -> None:
    """With counts of their own the parts would differ from it: checked, so that the test can fail.

    The value's errors are taken in float32, hence the tolerance.
    """
    whole = gradient(loss, (slice(0, ROWS),), counts.sum())
    torch.testing.assert_close(gradient(loss, PARTS, counts.sum()), whole, rtol=1e-6, atol=1e-7)
    own = torch.stack([gradient(loss, (part,), counts[part].sum()) for part in PARTS]).mean(0)
    assert (own - whole).abs().max() > 1e-3


def test_repeated_prompts_at_the_end_of_an_epoch_count_once() -> None:
    """Nine prompts, batches of two on two processes: the last forward has one prompt left and repeats three."""
    rows = [PromptRow(index, [5], "") for index in (8, 0)], [PromptRow(index, [5], "") for index in (1, 2)]
    assert own_rows(rows[0], 0, 1) == (rows[0][:1], True)
    assert own_rows(rows[1], 1, 1) == (rows[1][:1], False)
    assert own_rows(rows[1], 1, 3) == (rows[1][:1], True)
    assert own_rows(rows[1], 1, 0) == (rows[1], True)
    assert own_rows(rows[0][:1], 0, 0) == (rows[0][:1], True)


def test_a_process_without_prompts_of_its_own_adds_nothing() -> None:
    ids = torch.ones(2, 5, dtype=torch.long)
    counts = Counts(
        policy=torch.tensor(3.0), tokens=torch.tensor(5.0), value=torch.tensor(4.0), secant=torch.tensor(2.0)
    )
    value_batch = ValueBatch({}, OTHERS[:2], MASK[:2])
    batch = without_effect(TrainBatch(Rows(ids, ids, MASK[:2]), WEIGHTS[:2], counts, value=value_batch))
    assert batch.counts.stacked().tolist() == [0.0] * 4 and not batch.has_effect
    assert batch.value is not None
    outputs = torch.zeros(2, TOKENS, requires_grad=True)
    loss = weighted_nll(outputs, batch.rows.mask_RT, batch.weights, torch.tensor(7.0))[0]
    loss = loss + value_loss(outputs, OTHERS[:2], batch.value.mask_RT1, 0.5, torch.tensor(7.0))[0]
    loss = loss + kl_anchor(outputs, OTHERS[:2], batch.rows.mask_RT, torch.tensor(7.0))[0]
    loss.backward()
    assert loss.item() == 0
    assert outputs.grad is not None and outputs.grad.abs().max() == 0
