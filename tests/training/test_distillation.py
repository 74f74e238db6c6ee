"""What each distillation loss learns from, on a rollout small enough to check by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from vgf_llm.answering.implicit_policy import Outcome
from vgf_llm.text.protocols import Work
from vgf_llm.text.responses import Responses
from vgf_llm.training.batch import Counts
from vgf_llm.training.distillation import make_distillation
from vgf_llm.training.distillation.dpo import best_pair
from vgf_llm.training.rollout import PromptRow, Rollout
from vgf_llm.training.settings import VGFSettings

LOGPS = torch.tensor([[-1.0, -2.0], [-3.0, -1.0]])


def responses(tokens: list[list[int]]) -> Responses:
    ids = torch.tensor([tokens])
    return Responses([[1, 5]], ids, torch.ones_like(ids, dtype=torch.bool), (2,), 0)


def rollout(original: list[float], transported: list[float]) -> Rollout:
    """One prompt, two originals of two tokens; the second transported response is still its original."""
    before, after = responses([[6, 7], [8, 2]]), responses([[6, 9], [8, 2]])
    nothing: Tensor = torch.zeros(0, 1, 2)
    values = torch.zeros(1, 2)
    outcome = Outcome(before, after, values, values, nothing, nothing, before, values, values, Work.none(1))
    return Rollout(
        [PromptRow(0, [1, 5], "x")],
        outcome,
        {"reward": torch.tensor([original])},
        {"reward": torch.tensor([transported])},
    )


def test_weighted_likelihood_learns_from_all_that_changed_and_weighs_by_reward() -> None:
    """Rewards 0, 1 and 1 (the unchanged copy does not count), alpha 1: weights 1 : e : e over 1 + 2 e."""
    loss = make_distillation(VGFSettings(weight_temperature=1.0))
    batch, figures = loss.batch(rollout([0.0, 1.0], [1.0, 1.0]))
    e, total = math.e, 1 + 2 * math.e
    torch.testing.assert_close(batch.weights, torch.tensor([1 / total, e / total, e / total]))
    assert batch.rows.input_ids_RS[:, -2:].tolist() == [[6, 7], [8, 2], [6, 9]]
    assert not loss.needs_reference and batch.reference_logps_RT is None
    assert batch.counts.policy.item() == pytest.approx(2.0)  # every row has two tokens, and the weights sum to 1
    assert figures["distilled_reward"].tolist() == pytest.approx([2 * e / total])


def test_dpo_compares_a_transported_response_with_its_original() -> None:
    """beta 0.5; sums -3 and -4 against -2 and -2 of the reference: margin 0.5 ((-1) - (-2)) = 0.5."""
    loss = make_distillation(VGFSettings(loss="dpo", dpo_beta=0.5))
    done = rollout([0.0, 1.0], [1.0, 1.0])
    assert best_pair(done).tolist() == [[2, 0]]
    batch, _ = loss.batch(done)
    assert loss.needs_reference
    assert batch.rows.input_ids_RS[:, -2:].tolist() == [[6, 9], [6, 7]]
    assert batch.weights.tolist() == [1.0] and batch.counts.policy.item() == 1
    with pytest.raises(ValueError, match="no log-probabilities of the reference"):
        loss.loss(LOGPS, batch, batch.counts)
    found, figures = loss.loss(LOGPS, with_reference(batch), batch.counts)
    assert found.item() == pytest.approx(math.log(1 + math.exp(-0.5)))
    assert figures["dpo_margin"].item() == pytest.approx(0.5)


def test_a_pair_that_transport_did_not_raise_has_no_weight() -> None:
    batch, _ = make_distillation(VGFSettings(loss="dpo")).batch(rollout([1.0, 1.0], [1.0, 0.0]))
    assert batch.weights.tolist() == [0.0]


@pytest.mark.parametrize("name", ["weighted_nll", "dpo"])
def test_the_anchor_is_added_to_any_loss_over_its_own_count(name: Any) -> None:
    """d = 0 and 1, 2 and 0 at four tokens: (e - 2 + e^2 - 3) / 4, times 0.1."""
    plain, anchored = (make_distillation(VGFSettings(loss=name, kl_coefficient=k, kept=2)) for k in (0.0, 0.1))
    batch, _ = anchored.batch(rollout([0.0, 1.0], [1.0, 1.0]))
    assert anchored.needs_reference
    assert batch.counts.tokens.item() == 4
    batch = with_reference(batch)
    penalty = (math.e - 2 + math.e**2 - 3) / 4
    expected = plain.loss(LOGPS, batch, batch.counts)[0].item() + 0.1 * penalty
    assert anchored.loss(LOGPS, batch, batch.counts)[0].item() == pytest.approx(expected)


def test_counts_are_summed_as_one_tensor_and_named_again() -> None:
    counts = Counts.unstacked(Counts.of(torch.tensor(3.0)).stacked() * 2)
    assert (counts.policy.item(), counts.value.item()) == (6.0, 0.0)


def with_reference(batch: Any) -> Any:
    return replace(batch, reference_logps_RT=torch.tensor([[-1.0, -1.0], [-1.0, -1.0]]))
