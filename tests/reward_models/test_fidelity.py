"""Gradient fidelity on values whose answer is known: linear is 1, sign-flipped is -1."""

from __future__ import annotations

import pytest
import torch

from reward_models.fidelity import (
    gradient_fidelity,
    reference_shortlist,
    sample_substitutions,
    score_gradient,
    spearman_correlation,
)
from reward_models.modelling import RewardModel

PROMPTS = [[5, 6, 7], [10, 11]]
TOKENS = torch.tensor([[[12, 13, 14], [15, 2, 0]], [[16, 17, 2], [18, 19, 20]]])
MASK = torch.tensor([[[1, 1, 1], [1, 1, 0]], [[1, 1, 1], [1, 1, 1]]]).bool()
SHORTLIST = torch.arange(5, 45).repeat(2, 2, 3, 1)


class LinearValue:
    """R = <w, sum of attended embeddings>: its gradient predicts every change exactly."""

    def __init__(self, vocabulary=60, width=8):
        self.table = torch.randn(vocabulary, width)
        self.w = torch.randn(width)

    def prefix(self, prompts):
        return _NoPrefix()

    def embed(self, tokens):
        return self.table[tokens]

    def score(self, prefix, responses, mask):
        u = responses if responses.is_floating_point() else self.embed(responses)
        return ((u @ self.w) * mask).sum(-1)


class _NoPrefix:
    def select(self, rows):
        return self


def test_a_linear_value_has_fidelity_one_and_its_flip_minus_one():
    value = LinearValue()
    found = gradient_fidelity(value, PROMPTS, TOKENS, MASK, SHORTLIST)
    assert found.spearman == pytest.approx(1.0) and found.n == 4
    assert found.low == pytest.approx(1.0) and found.high == pytest.approx(1.0)
    assert found.top8_gain == pytest.approx(found.best8_gain) and found.best8_gain > found.random8_gain
    plain = score_gradient(value, None, MASK)
    flipped = gradient_fidelity(
        value, PROMPTS, TOKENS, MASK, SHORTLIST, value_gradient=lambda u: (plain(u)[0], -plain(u)[1])
    )
    assert flipped.spearman == pytest.approx(-1.0) and flipped.top8_gain < flipped.random8_gain


def test_exact_changes_of_a_reward_model_equal_rescoring_whole_sequences(any_lm):
    """The best eight gains and the mean gain are those of a plain loop over `forward`."""
    model = RewardModel.from_base(any_lm, num_layers=1).freeze()
    shortlist = torch.arange(5, 25).repeat(1, 1, 2, 1)
    tokens, mask = torch.tensor([[[12, 30]]]), torch.ones(1, 1, 2, dtype=torch.bool)
    found = gradient_fidelity(model, PROMPTS[:1], tokens, mask, shortlist, substitutions=1000)
    base = model(torch.tensor([[5, 6, 7, 12, 30]]))
    changes = []
    for t in range(2):
        for v in range(5, 25):
            if v != int(tokens[0, 0, t]):
                changed = tokens[0, 0].tolist()
                changed[t] = v
                changes.append((model(torch.tensor([[5, 6, 7, *changed]])) - base).item())
    changes = torch.tensor(changes)
    assert len(changes) == 39
    assert found.best8_gain == pytest.approx(changes.topk(8).values.mean().item(), abs=1e-5)
    assert found.random8_gain == pytest.approx(changes.mean().item(), abs=1e-5)
    assert -1 <= found.spearman <= 1 and found.top8_gain <= found.best8_gain


def test_substitutions_are_distinct_and_never_the_token_itself_padding_or_eos():
    generator = torch.Generator().manual_seed(0)
    tokens, mask = torch.tensor([5, 2, 0]), torch.tensor([True, True, False])
    shortlist = torch.tensor([[5, 6, 2], [7, 8, 2], [9, 9, 9]])
    t, v = sample_substitutions(tokens, mask, shortlist, 100, generator, eos_ids=(2,))
    assert list(zip(t.tolist(), v.tolist(), strict=True)) == [(0, 6)]
    t, v = sample_substitutions(tokens, mask, shortlist, 100, generator)
    assert sorted(zip(t.tolist(), v.tolist(), strict=True)) == [(0, 2), (0, 6), (1, 7), (1, 8)]
    assert len(sample_substitutions(tokens, mask, shortlist, 2, generator)[0]) == 2


def test_the_same_seed_gives_the_same_figures(tiny_lm):
    model = RewardModel.from_base(tiny_lm, num_layers=1).freeze()
    one, two, other = (
        gradient_fidelity(model, PROMPTS, TOKENS, MASK, SHORTLIST, substitutions=20, seed=seed) for seed in (0, 0, 1)
    )
    assert one == two and one != other


def test_reference_shortlist_is_the_models_own_top_k(any_lm):
    found = reference_shortlist(any_lm, PROMPTS, TOKENS, k=4)
    for b, n in ((0, 0), (1, 1)):
        logits = any_lm(torch.tensor([PROMPTS[b] + TOKENS[b, n].tolist()])).logits[0, len(PROMPTS[b]) - 1 : -1]
        assert torch.equal(found[b, n], logits.topk(4).indices)


def test_spearman_by_hand():
    """Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: products 4.5, squares 4.5 and 5: 4.5 / sqrt(22.5) = 0.948683."""
    assert spearman_correlation(torch.tensor([1.0, 2, 2, 9]), torch.tensor([0.0, 1, 5, 7])) == pytest.approx(0.948683)
    assert spearman_correlation(torch.tensor([1.0, 2]), torch.tensor([2.0, 1])) == pytest.approx(-1)
    flat = spearman_correlation(torch.ones(3), torch.arange(3.0))
    assert flat != flat


def test_too_few_candidates_are_an_error():
    with pytest.raises(ValueError, match="no response has more than 8"):
        gradient_fidelity(LinearValue(), PROMPTS, TOKENS, MASK, SHORTLIST[..., :2])
