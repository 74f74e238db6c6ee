"""Temperature, top-k and top-p, against transformers' own warpers."""

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from vgf_llm.settings import SamplingSettings
from vgf_llm.text.distribution import truncate


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 5, 1.0), (0.7, 8, 0.9), (1.5, 0, 0.8), (1.0, 0, 1.0)]
)
def test_agrees_with_the_warpers_of_transformers(temperature, top_k, top_p):
    logits = torch.randn(16, 20) * 2
    expected = TemperatureLogitsWarper(temperature)(None, logits)
    expected = TopKLogitsWarper(top_k)(None, expected) if top_k else expected
    expected = TopPLogitsWarper(top_p)(None, expected) if top_p < 1 else expected
    distribution = truncate(logits, SamplingSettings(temperature=temperature, top_k=top_k, top_p=top_p))
    mine = torch.zeros_like(logits).scatter_(-1, distribution.ids, distribution.logps.exp())
    torch.testing.assert_close(mine, expected.softmax(-1), atol=1e-6, rtol=0)


def test_including_adds_a_token_with_its_true_odds_and_leaves_known_ones_alone():
    """p(3) over the best two: adding it to the list keeps every ratio of probabilities."""
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    distribution = truncate(logits, SamplingSettings(top_k=2))
    added = distribution.including(torch.tensor([3]), logits, 1.0)
    assert added.ids.tolist() == [[0, 1, 3]]
    torch.testing.assert_close(added.logps, torch.tensor([[2.0, 1.0, -1.0]]).log_softmax(-1))
    known = distribution.including(torch.tensor([1]), logits, 1.0)
    torch.testing.assert_close(known.logps[:, :2], distribution.logps)
    assert known.logps[0, 2] == -torch.inf
    nothing = distribution.including(torch.tensor([-1]), logits, 1.0)
    assert nothing.logps[0, 2] == -torch.inf
    assert added.column_of(torch.tensor([3])).item() == 2
    assert known.column_of(torch.tensor([1])).item() == 1


@pytest.mark.parametrize("top_p", [1e-9, 1e-46, 1e-300])
def test_the_most_probable_token_is_kept_however_small_the_nucleus(top_p):
    logits = torch.randn(5, 40)
    distribution = truncate(logits, SamplingSettings(top_k=8, top_p=top_p))
    assert torch.equal(distribution.logps.exp(), torch.eye(8)[:1].expand(5, -1))
    assert torch.equal(distribution.ids[:, 0], logits.argmax(-1))
