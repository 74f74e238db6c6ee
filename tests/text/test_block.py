"""Drafting, transport and rewriting block by block: identities, budget, value, and what it has in common with prior."""

import dataclasses

import pytest
import torch

from reward_models.modelling import RewardModel
from tests.text.moves import make_move
from vgf_llm.answering.implicit_policy import ImplicitPolicy
from vgf_llm.evaluation.controls import flipped_gradient
from vgf_llm.flow.budget import TransportBudget
from vgf_llm.settings import SamplingSettings
from vgf_llm.text import BlockDecoder, Moved, PriorDecoder, TorchReference, row_seeds
from vgf_llm.text.distribution import truncate
from vgf_llm.text.responses import Responses
from vgf_llm.text.sampler import ReferenceSampler
from vgf_llm.text.tilt import calibrate_multiplier, tilt

PROMPTS = [[1, 10, 11, 12], [1, 20], [30, 31, 32, 33, 34, 35]]


@pytest.fixture
def reference(any_lm):
    return TorchReference(any_lm, SamplingSettings(top_k=12, max_new_tokens=9), eos_ids=(2, 5), pad_id=0)


@pytest.fixture
def value(any_lm):
    return RewardModel.from_base(any_lm, num_layers=1).freeze()


def run(reference, value, budget, decoder=None, prompts=PROMPTS, seeds=None, **options):
    decoder = decoder or BlockDecoder(reference, value.embedding_table_VD, block_tokens=3)
    policy = ImplicitPolicy(ReferenceSampler(reference), value, decoder, budget, **options)
    return policy(prompts, row_seeds(0, list(range(len(prompts))), 16) if seeds is None else seeds)


@pytest.mark.parametrize("block_tokens", [1, 4, 20])
@pytest.mark.parametrize("keep_distributions", [True, False])
def test_zero_displacement_gives_every_token_back(reference, value, block_tokens, keep_distributions):
    samples = ReferenceSampler(reference).sample(PROMPTS, row_seeds(0, [0, 1, 2], 16))
    samples = samples if keep_distributions else dataclasses.replace(samples, distribution=None)
    still = torch.zeros(*samples.tokens_BNT.shape, value.embedding_table_VD.shape[1])
    move = make_move(value, samples, still, nats=3.0, seeds_BN=row_seeds(9, [0, 1, 2], 16))
    decoder = BlockDecoder(reference, value.embedding_table_VD, block_tokens=block_tokens)
    decoded = decoder.decode(decoder.prepare(PROMPTS), move)
    assert torch.equal(decoded.responses.tokens_BNT, samples.tokens_BNT)
    assert torch.equal(decoded.responses.mask_BNT, samples.mask_BNT)
    assert (decoded.nats_BN == 0).all()
    tokens_B = samples.lengths_BN.sum(-1).double()
    torch.testing.assert_close(decoded.work.reference_B, tokens_B * (1 if keep_distributions else 2))


def test_zero_nats_gives_every_token_back(reference, value):
    outcome = run(reference, value, TransportBudget(nats=0.0))
    assert torch.equal(outcome.transported.tokens_BNT, outcome.originals.tokens_BNT)
    assert outcome.nats_BN.abs().max().item() < 1e-5


@pytest.mark.parametrize("draws", [1, 2])
def test_one_block_over_the_whole_response_is_prior(reference, value, draws):
    """Coupled texts agree token for token, their nats too; what is drawn afresh is drafted first and so differs."""
    budget = TransportBudget(nats=2.0)
    one = run(reference, value, budget, BlockDecoder(reference, value.embedding_table_VD, block_tokens=9), draws=draws)
    prior = run(reference, value, budget, PriorDecoder(reference, value.embedding_table_VD), draws=draws)
    length = min(one.transported.tokens_BNT.shape[-1], prior.transported.tokens_BNT.shape[-1])
    ours, theirs = (outcome.transported.tokens_BNT[:, ::draws, :length] for outcome in (one, prior))
    assert torch.equal(ours, theirs) and (ours != one.originals.tokens_BNT[..., :length]).any()
    assert torch.equal(one.nats_BN[:, ::draws], prior.nats_BN[:, ::draws])
    if draws == 1:
        assert torch.equal(one.work.reference_B, prior.work.reference_B)
        assert torch.equal(one.work.value_B, prior.work.value_B)


def test_the_gradient_raises_the_value_and_its_negative_lowers_it(reference, value):
    seeds, budget = row_seeds(0, [0, 1, 2], 64), TransportBudget(nats=2.0)
    up = run(reference, value, budget, seeds=seeds)
    down = run(reference, value, budget, seeds=seeds, gradient=flipped_gradient())
    base = up.original_values_BN.mean().item()
    assert down.transported_values_BN.mean().item() < base - 0.05
    assert up.transported_values_BN.mean().item() > base + 0.05


def test_nats_grow_with_the_budget_and_stay_within_it(reference, value):
    spent = []
    for nats in (0.3, 1.0, 3.0):
        outcome = run(reference, value, TransportBudget(nats=nats, max_token_nats=0.8))
        assert outcome.nats_BN.max().item() <= nats + 1e-4
        spent.append(outcome.nats_BN.mean().item())
    assert spent == sorted(spent) and spent[0] > 0.05


def test_a_result_does_not_depend_on_the_batch(reference, value):
    budget, seeds = TransportBudget(nats=2.0), row_seeds(3, [0, 1, 2], 8)
    together = run(reference, value, budget, seeds=seeds)
    alone = run(reference, value, budget, prompts=PROMPTS[1:2], seeds=seeds[1:2, 2:5])
    length = int(alone.transported.lengths_BN.max())
    assert torch.equal(together.transported.lengths_BN[1, 2:5], alone.transported.lengths_BN[0])
    assert torch.equal(together.transported.tokens_BNT[1, 2:5, :length], alone.transported.tokens_BNT[0, :, :length])
    torch.testing.assert_close(together.nats_BN[1, 2:5], alone.nats_BN[0], atol=1e-3, rtol=0)


def test_texts_end_at_the_first_eos_and_with_the_references_probability(reference, value):
    """Share of texts that have ended by token 3; the largest standard error is 0.011."""
    short = TorchReference(reference.model, dataclasses.replace(reference.sampling, max_new_tokens=3), (2, 5), 0)
    decoder = BlockDecoder(short, value.embedding_table_VD, block_tokens=1)
    table = value.embedding_table_VD
    samples = ReferenceSampler(short).sample(PROMPTS[:1], row_seeds(0, [0], 2_000))
    onto_eos = ((table[2] - table.mean(0)) * 3).expand(*samples.tokens_BNT.shape, -1)
    move = make_move(
        value, samples, onto_eos * samples.movable_BNT.unsqueeze(-1), nats=0.5, seeds_BN=row_seeds(7, [0], 2_000)
    )
    decoded = decoder.decode(decoder.prepare(PROMPTS[:1]), move)
    first = samples.tokens_BNT[0, :, 0]
    ends_at_once = torch.isin(first, torch.tensor([2, 5]))
    written = decoded.responses
    assert torch.equal(torch.isin(written.tokens_BNT[0, :, 0], torch.tensor([2, 5])), ends_at_once)
    assert torch.equal(written.tokens_BNT[0, ends_at_once, 0], first[ends_at_once])
    assert (written.eos_BNT.sum(-1) <= 1).all()
    assert (written.tokens_BNT[~written.mask_BNT] == 0).all()
    assert (decoded.nats_BN[0, ends_at_once] == 0).all()


def test_blocks_of_one_token_follow_the_tilted_distribution_of_the_text_that_was_written(reference, value):
    """Second tokens of rows whose draft was the original's, and of rows that were drafted anew.

    One direction for all, so q(. | w) is a distribution of the written w alone, with half of the nats each; of at least
    4,000 rows each the largest standard error is 0.008.
    """
    rows, nats, table = 20_000, 1.0, value.embedding_table_VD
    two = TorchReference(reference.model, SamplingSettings(top_k=12, max_new_tokens=2), (10_000,), 0)
    samples = ReferenceSampler(two).sample(PROMPTS[:1], row_seeds(0, [0], rows))
    direction = torch.randn(table.shape[1])
    delta = direction.expand(1, rows, 2, -1)
    move = make_move(None, samples, delta, nats=nats, max_token_nats=5.0, seeds_BN=row_seeds(8, [0], rows))
    zeros = torch.zeros(1, rows)
    move = dataclasses.replace(
        move, flow=lambda part: Moved(direction.expand(*part.tokens_BNT.shape, -1), zeros, zeros)
    )
    decoder = BlockDecoder(two, table, block_tokens=1)
    decoded = decoder.decode(decoder.prepare(PROMPTS[:1]), move)
    new, old = decoded.responses.tokens_BNT[0], samples.tokens_BNT[0]
    first = new[:, 0].unique()
    logits = reference.model(torch.tensor([[*PROMPTS[0], token] for token in first.tolist()])).logits[:, -1]
    distribution = truncate(logits, two.sampling)
    bonus, no_eos = (table @ direction)[distribution.ids], torch.zeros_like(distribution.ids, dtype=torch.bool)
    at_all = torch.ones(len(first), 1, dtype=torch.bool)
    s = calibrate_multiplier(distribution.logps[:, None], bonus[:, None], no_eos[:, None], at_all, nats / 2, 5.0)
    q = torch.zeros(len(first), len(table)).scatter_(
        1, distribution.ids, tilt(distribution.logps, bonus, s, no_eos).exp()
    )
    for changed in (False, True):
        here = (new[:, 0] != old[:, 0]) == changed
        assert here.sum() > 4_000
        found = torch.bincount(new[here, 1], minlength=len(table)) / here.sum()
        expected = q[torch.searchsorted(first, new[here, 0])].mean(0)
        assert (found - expected).abs().max().item() < 0.02
    assert decoded.nats_BN.max().item() < nats + 1e-4
    assert (decoded.nats_BN > nats - 0.02).float().mean() > 0.9


def test_every_block_is_moved_where_it_stands(reference, value):
    """The flow is asked for partial responses that grow by a block and begin with what was written."""
    samples = ReferenceSampler(reference).sample(PROMPTS, row_seeds(0, [0, 1, 2], 4))
    seen = []
    still = torch.zeros(*samples.tokens_BNT.shape, value.embedding_table_VD.shape[1])
    move = make_move(value, samples, still, nats=4.0, max_token_nats=4.0, seeds_BN=row_seeds(9, [0, 1, 2], 4))

    def flow(partial):
        seen.append(partial)
        generator = torch.Generator().manual_seed(len(seen))
        delta = torch.randn(*partial.tokens_BNT.shape, still.shape[-1], generator=generator) * 5
        return dataclasses.replace(move.flow(partial), displacement_BNTD=delta)

    decoder = BlockDecoder(reference, value.embedding_table_VD, block_tokens=4)
    decoded = decoder.decode(decoder.prepare(PROMPTS), dataclasses.replace(move, flow=flow))
    assert [partial.tokens_BNT.shape[-1] for partial in seen] == [4, 8, 9]
    final = decoded.responses
    for before, partial in zip((0, 4, 8), seen, strict=True):
        assert torch.equal(partial.tokens_BNT[..., :before], final.tokens_BNT[..., :before])
        assert torch.equal(partial.mask_BNT[..., :before], final.mask_BNT[..., :before])
    assert torch.equal(seen[0].tokens_BNT[samples.lengths_BN >= 4], samples.tokens_BNT[samples.lengths_BN >= 4][:, :4])
    assert (final.tokens_BNT[..., :4] != samples.tokens_BNT[..., :4]).any()


def test_a_foreign_text_without_eos_is_kept_and_written_on(reference, value):
    tokens = torch.tensor([[[10, 11, 12, 13, 14]]])
    foreign = Responses([PROMPTS[0]], tokens, torch.ones_like(tokens, dtype=torch.bool), (2, 5), 0)
    still = torch.zeros(1, 1, 5, value.embedding_table_VD.shape[1])
    move = make_move(value, foreign, still, nats=2.0, seeds_BN=row_seeds(0, [0], 1))
    decoder = BlockDecoder(reference, value.embedding_table_VD, block_tokens=2)
    written = decoder.decode(decoder.prepare(PROMPTS[:1]), move).responses
    assert written.tokens_BNT[0, 0, :5].tolist() == tokens[0, 0].tolist()
    assert written.lengths_BN.item() == 9 or written.eos_BNT.any()


def test_a_block_has_at_least_one_token(reference, value):
    with pytest.raises(ValueError, match="block_tokens must be at least 1, got 0"):
        BlockDecoder(reference, value.embedding_table_VD, block_tokens=0)
