"""The distributions that the sampler keeps are those of the parallel forward, and stay with their responses."""

import pytest
import torch

from vgf_llm.settings import SamplingSettings
from vgf_llm.text import TorchReference, row_seeds
from vgf_llm.text.responses import concatenate
from vgf_llm.text.sampler import ReferenceSampler

PROMPTS = [[1, 10, 11, 12], [1, 20], [30, 31, 32, 33, 34, 35]]


@pytest.fixture(params=[1.0, 0.8])
def reference(any_lm, request):
    sampling = SamplingSettings(top_k=12, top_p=request.param, temperature=0.9, max_new_tokens=9)
    return TorchReference(any_lm, sampling, eos_ids=(2, 5), pad_id=0)


def sample(reference, seed=0, n=8):
    return ReferenceSampler(reference).sample(PROMPTS, row_seeds(seed, [0, 1, 2], n))


def test_kept_distributions_are_those_of_the_parallel_forward(reference):
    samples = sample(reference)
    kept, mask = samples.distribution, samples.mask_BNT
    found = reference.shortlists(reference.prefix(PROMPTS), samples)
    ids, logps = (x.view(*mask.shape, -1)[mask] for x in (found.ids, found.logps))
    assert torch.isinf(logps[:, -1]).all()  # nothing had to be added: every token was drawn from its distribution
    kept_ids, kept_logps = kept.ids[mask], kept.logps[mask]
    inside = ~torch.isinf(kept_logps)
    assert torch.equal(inside, ~torch.isinf(logps[:, :-1]))
    torch.testing.assert_close(kept_logps[inside], logps[:, :-1][inside], atol=1e-4, rtol=0)
    gap = -kept_logps.nan_to_num(neginf=-99).diff(dim=-1)  # to the next token of the list
    clear = torch.cat([gap > 1e-3, torch.zeros_like(gap[:, :1], dtype=torch.bool)], 1)
    clear[:, 1:] &= gap > 1e-3
    assert clear.float().mean() > 0.5
    assert torch.equal(kept_ids[clear & inside], ids[:, :-1][clear & inside])


def test_every_token_is_on_its_distribution(reference):
    samples = sample(reference)
    on_distribution = (
        (samples.distribution.ids == samples.tokens_BNT.unsqueeze(-1)) & ~torch.isinf(samples.distribution.logps)
    ).any(-1)
    assert on_distribution[samples.mask_BNT].all()
    torch.testing.assert_close(samples.distribution.logps.exp().sum(-1), torch.ones(samples.mask_BNT.shape))


def test_distributions_survive_take_first_and_concatenate(reference):
    samples, other = sample(reference), sample(reference, seed=1, n=2)
    index = torch.tensor([[3, 3, 0], [1, 7, 2], [0, 5, 6]])
    taken = samples.take(index)
    for b in range(3):
        for m in range(3):
            assert torch.equal(taken.distribution.ids[b, m], samples.distribution.ids[b, index[b, m]])
            assert torch.equal(taken.distribution.logps[b, m], samples.distribution.logps[b, index[b, m]])
            assert torch.equal(taken.tokens_BNT[b, m], samples.tokens_BNT[b, index[b, m]])
    assert torch.equal(samples.first(5).distribution.ids, samples.distribution.ids[:, :5])
    assert torch.equal(samples.first(5).distribution.logps, samples.distribution.logps[:, :5])
    short = min(samples.tokens_BNT.shape[-1], other.tokens_BNT.shape[-1])
    joined = concatenate([samples, other])
    assert joined.distribution.ids.shape[:3] == joined.tokens_BNT.shape
    for part, columns in ((samples, slice(0, 8)), (other, slice(8, 10))):
        assert torch.equal(joined.distribution.ids[:, columns, :short], part.distribution.ids[:, :, :short])
        assert torch.equal(joined.distribution.logps[:, columns, :short], part.distribution.logps[:, :, :short])


def test_a_shorter_part_is_padded_with_distributions_that_draw_nothing(reference):
    samples = sample(reference)
    length = samples.tokens_BNT.shape[-1]
    longer = samples.distribution.padded(length + 2)
    assert torch.equal(longer.logps[..., :length, :], samples.distribution.logps)
    assert torch.isinf(longer.logps[..., length:, :]).all()


def test_a_distribution_is_lost_where_one_part_has_none(reference):
    samples = sample(reference)
    foreign = samples.with_tokens(samples.tokens_BNT)
    assert foreign.distribution is None and concatenate([samples, foreign]).distribution is None


def test_a_distribution_over_the_whole_of_a_large_vocabulary_is_not_kept(any_lm, monkeypatch):
    monkeypatch.setattr("vgf_llm.text.sampler._KEPT_COLUMNS", 11)
    assert sample(TorchReference(any_lm, SamplingSettings(top_k=12, max_new_tokens=3), (2, 5), 0)).distribution is None
    assert (
        sample(TorchReference(any_lm, SamplingSettings(top_k=11, max_new_tokens=3), (2, 5), 0)).distribution is not None
    )
