"""The ensemble's numbers by hand, and its agreement with its members."""

from __future__ import annotations

import pytest
import torch

from reward_models.ensemble import RewardEnsemble, reduce_scores
from reward_models.modelling import RewardModel
from vgf_llm.errors import ModelError

PROMPTS = [[5, 6, 7], [10, 11]]
TOKENS = torch.tensor([[[12, 13], [15, 2]], [[16, 2], [18, 19]]])
MASK = torch.ones(2, 2, 2, dtype=torch.bool)


@pytest.fixture
def members(any_lm):
    return [RewardModel.from_base(any_lm, num_layers=1, seed=seed).freeze() for seed in (1, 2, 3)]


def test_reductions_by_hand():
    """Scores 1, 2, 6: min 1; mean 3, population variance (4 + 1 + 9) / 3 = 14 / 3, std 2.160247."""
    scores = torch.tensor([[1.0], [2.0], [6.0]])
    assert reduce_scores(scores, "min", 0.0).item() == 1
    assert reduce_scores(scores, "mean_minus_std", 0.5).item() == pytest.approx(3 - 0.5 * 2.160247, abs=1e-5)
    assert reduce_scores(scores, "mean_minus_std", 0.0).item() == pytest.approx(3)


def test_one_member_is_the_member_itself(members):
    for reduce in ("min", "mean_minus_std"):
        ensemble = RewardEnsemble(members[:1], reduce)
        expected = members[0].score(members[0].prefix(PROMPTS), TOKENS, MASK)
        torch.testing.assert_close(ensemble.score(ensemble.prefix(PROMPTS), TOKENS, MASK), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("reduce", ["min", "mean_minus_std"])
def test_scores_of_ids_embeddings_and_whole_sequences_agree(members, reduce):
    ensemble = RewardEnsemble(members, reduce, scales=[(0.1, 1.0), (-0.2, 2.0), (0.0, 0.5)])
    own = torch.stack([m.score(m.prefix(PROMPTS), TOKENS, MASK) for m in members])
    scaled = (own - torch.tensor([0.1, -0.2, 0.0])[:, None, None]) / torch.tensor([1.0, 2.0, 0.5])[:, None, None]
    expected = reduce_scores(scaled, reduce, 1.0)
    prefix = ensemble.prefix(PROMPTS)
    torch.testing.assert_close(ensemble.score(prefix, TOKENS, MASK), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(ensemble.score(prefix, ensemble.embed(TOKENS), MASK), expected, atol=1e-5, rtol=0)
    whole = torch.tensor([[5, 6, 7, 12, 13], [5, 6, 7, 15, 2]])
    torch.testing.assert_close(ensemble(whole), expected[0], atol=1e-5, rtol=0)
    swapped = ensemble.score(prefix.select(torch.tensor([1, 0])), TOKENS.flip(0), MASK)
    torch.testing.assert_close(swapped, expected.flip(0), atol=1e-5, rtol=0)


def test_gradient_is_finite_where_members_agree(any_lm):
    twin = [RewardModel.from_base(any_lm, num_layers=1, seed=1).freeze() for _ in range(2)]
    ensemble = RewardEnsemble(twin, "mean_minus_std")
    u = ensemble.embed(TOKENS).requires_grad_(True)
    (gradient,) = torch.autograd.grad(ensemble.score(ensemble.prefix(PROMPTS), u, MASK).sum(), u)
    assert torch.isfinite(gradient).all() and gradient.abs().sum() > 0


def test_members_that_cannot_share_particles_are_refused(members):
    with torch.no_grad():
        members[1].get_input_embeddings().weight[4, 0] += 1
    with pytest.raises(ModelError, match="member 1 has another input embedding table"):
        RewardEnsemble(members)
    with pytest.raises(ModelError, match="at least one"):
        RewardEnsemble([])
    with pytest.raises(ValueError, match='"min" or "mean_minus_std", got \'max\''):
        RewardEnsemble(members[:1], "max")
    with pytest.raises(ModelError, match="std > 0"):
        RewardEnsemble(members[:1], scales=[(0.0, 0.0)])
