"""What the reference writes when something is kept: rewrite and extend against writing from the start."""

import pytest
import torch
from torch.nn.functional import pad

from vgf_llm.settings import SamplingSettings
from vgf_llm.text import TorchReference, row_seeds
from vgf_llm.text.distribution import truncate
from vgf_llm.text.noise import combine_seeds, gumbel_noise
from vgf_llm.text.sampler import ReferenceSampler

PROMPTS = [[1, 10, 11, 12], [1, 20], [30, 31, 32, 33, 34, 35]]


@pytest.fixture
def reference(any_lm):
    return TorchReference(any_lm, SamplingSettings(top_k=12, max_new_tokens=9), eos_ids=(2, 5), pad_id=0)


@pytest.fixture
def samples(reference):
    return ReferenceSampler(reference).sample(PROMPTS, row_seeds(0, [0, 1, 2], 8))


def picker(reference, seeds_BN, forced_RT=None, keep_R=None):
    """Sample with hashed noise, whether rows share their position or not; optionally forced to begin with a text."""

    def choose(logits_RV, position):
        distribution = truncate(logits_RV, reference.sampling)
        noise = gumbel_noise(combine_seeds(seeds_BN.flatten(), position), 0, distribution.ids)
        token_R = distribution.ids.gather(-1, (distribution.logps + noise).argmax(-1, keepdim=True)).squeeze(-1)
        return token_R if forced_RT is None else torch.where(position < keep_R, forced_RT[:, position], token_R)

    return choose


def test_keeping_nothing_is_writing(reference, samples):
    prefix, seeds = reference.prefix(PROMPTS), row_seeds(5, [0, 1, 2], 8)
    written = reference.write(prefix, 8, picker(reference, seeds))
    nothing = torch.zeros(3, 8, dtype=torch.long)
    rewritten = reference.rewrite(prefix, samples, nothing, picker(reference, seeds))
    length = written.tokens_BNT.shape[-1]
    assert torch.equal(rewritten.tokens_BNT[..., :length], written.tokens_BNT)
    assert torch.equal(rewritten.mask_BNT[..., :length], written.mask_BNT)
    assert not rewritten.mask_BNT[..., length:].any()


def test_what_is_kept_stays_and_the_rest_is_written_after_it(reference, samples):
    """Any number kept in a batch: the same as writing all of it with the kept tokens forced."""
    prefix, seeds = reference.prefix(PROMPTS), row_seeds(5, [0, 1, 2], 8)
    keep = torch.minimum(torch.arange(24).view(3, 8) % 9, samples.lengths_BN - 1)
    assert keep.max() >= 6 and (keep == 0).any()
    rewritten = reference.rewrite(prefix, samples, keep, picker(reference, seeds))
    kept = torch.arange(samples.tokens_BNT.shape[-1]) < keep.unsqueeze(-1)
    length = samples.tokens_BNT.shape[-1]
    assert torch.equal(rewritten.tokens_BNT[..., :length][kept], samples.tokens_BNT[kept])
    padded_RT = pad(samples.tokens_BNT, (0, 9 - length)).flatten(0, 1)
    forced = reference.write(prefix, 8, picker(reference, seeds, padded_RT, keep.flatten()))
    length = forced.tokens_BNT.shape[-1]
    assert torch.equal(rewritten.tokens_BNT[..., :length], forced.tokens_BNT)
    assert torch.equal(rewritten.mask_BNT[..., :length], forced.mask_BNT)
    assert (rewritten.tokens_BNT[..., :1] != samples.tokens_BNT[..., :1])[keep == 0].any()


def test_extending_in_pieces_is_writing_at_once(reference):
    """Some rows end in the first piece; the state before a piece is left as it is."""
    prefix, seeds = reference.prefix(PROMPTS), row_seeds(6, [0, 1, 2], 8)
    choose = picker(reference, seeds)
    written = reference.write(prefix, 8, choose).tokens_BNT.flatten(0, 1)
    rows = prefix.select(torch.arange(24) // 8)
    first, after = reference.extend(rows, range(4), choose)
    again, _ = reference.extend(rows, range(4), choose)
    assert torch.equal(first, again)
    done = torch.isin(first, torch.tensor([2, 5])).any(-1)
    assert done.any() and not done.all()
    second, _ = reference.extend(after, range(4, 9), choose, done)
    assert torch.equal(torch.cat([first, second], 1)[:, : written.shape[1]], written)
    some = torch.tensor([20, 3, 11])[~done[[20, 3, 11]]]
    alone, _ = reference.extend(after.select(some), range(4, 9), picker(reference, seeds.flatten()[some]))
    assert torch.equal(alone, second[some][:, : alone.shape[1]])
