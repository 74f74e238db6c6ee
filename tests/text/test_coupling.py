"""Couplings of a draft's token with the tilted distribution, and the options of ``prior`` that choose them."""

import dataclasses
import itertools

import pytest
import torch

from reward_models.modelling import RewardModel
from tests.conftest import build_llama
from tests.text.moves import make_move
from vgf_llm.answering.implicit_policy import ImplicitPolicy
from vgf_llm.flow.budget import TransportBudget
from vgf_llm.settings import SamplingSettings
from vgf_llm.text import PriorDecoder, TorchReference, row_seeds
from vgf_llm.text.coupling import draft_noise, maximally_coupled
from vgf_llm.text.distribution import Shortlist
from vgf_llm.text.noise import combine_seeds, gumbel_noise
from vgf_llm.text.sampler import ReferenceSampler
from vgf_llm.text.tilt import kl_divergence, tilt

PROMPTS = [[1, 10, 11, 12], [1, 20], [30, 31, 32, 33, 34, 35]]
ROWS = 20_000
OPTIONS = [
    {"multiplier": multiplier, "coupling": coupling, "after_change": after_change}
    for multiplier, coupling, after_change in itertools.product(
        ("response", "token"), ("gumbel", "maximal"), ("keep", "drop")
    )
]


@pytest.fixture
def parts():
    model = build_llama()
    reference = TorchReference(model, SamplingSettings(top_k=12, max_new_tokens=9), eos_ids=(2, 5), pad_id=0)
    return reference, RewardModel.from_base(model, num_layers=1).freeze()


@pytest.mark.parametrize("coupling", ["gumbel", "maximal"])
def test_pairs_follow_both_distributions_and_maximal_keeps_the_most(coupling):
    """p = (.5, .3, .2), q = (.2, .3, .5): sum min(p, q) = .2 + .3 + .2 = .7; the standard error is 0.0035."""
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.3, 0.5])
    distribution = Shortlist(torch.tensor([7, 3, 9]).expand(ROWS, 3), p.log().expand(ROWS, 3))
    seeds = row_seeds(0, [0], ROWS)[0]
    column = (distribution.logps + gumbel_noise(combine_seeds(seeds, 1), 0, distribution.ids)).argmax(-1, keepdim=True)
    token, logq = distribution.ids.gather(-1, column).squeeze(-1), q.log().expand(ROWS, 3)
    if coupling == "maximal":
        new = maximally_coupled(logq, distribution, token, seeds, 0)
    else:
        noise = draft_noise(distribution, distribution, token, torch.ones(ROWS, dtype=torch.bool), seeds, 0)
        new = distribution.ids.gather(-1, (logq + noise).argmax(-1, keepdim=True)).squeeze(-1)
    found = torch.stack([(new == v).float().mean() for v in (7, 3, 9)])
    torch.testing.assert_close(found, q, atol=0.014, rtol=0)
    kept = (new == token).float().mean().item()
    assert kept == pytest.approx(0.7, abs=0.014) if coupling == "maximal" else 0.5 < kept < 0.7


@pytest.mark.parametrize("coupling", ["gumbel", "maximal"])
def test_equal_distributions_give_the_token_back(coupling):
    distribution = Shortlist(torch.arange(5).expand(500, 5), torch.randn(500, 5).log_softmax(-1))
    seeds, token = row_seeds(0, [0], 500)[0], torch.randint(5, (500,))
    if coupling == "maximal":
        assert torch.equal(maximally_coupled(distribution.logps, distribution, token, seeds, 3), token)
    else:
        noise = draft_noise(distribution, distribution, token, torch.ones(500, dtype=torch.bool), seeds, 3)
        assert torch.equal((distribution.logps + noise).argmax(-1), token)


def first_tokens(parts, nats, **options):
    """20,000 first tokens moved by one direction: before, after, and the distributions p and q over the vocabulary."""
    reference, value = parts
    one = TorchReference(reference.model, dataclasses.replace(reference.sampling, max_new_tokens=1), (2, 5), 0)
    table = value.embedding_table_VD
    samples = ReferenceSampler(one).sample(PROMPTS[:1], row_seeds(4, [0], ROWS))
    direction = torch.randn(table.shape[1])
    delta = direction.expand(1, ROWS, 1, -1) * samples.movable_BNT.unsqueeze(-1)
    decoder = PriorDecoder(one, table, **options)
    move = make_move(value, samples, delta, nats=nats, max_token_nats=10.0, seeds_BN=row_seeds(5, [0], ROWS))
    decoded = decoder.decode(decoder.prepare(PROMPTS[:1]), move)
    distribution = Shortlist(samples.distribution.ids[0, 0, 0], samples.distribution.logps[0, 0, 0])
    eos, low, high = torch.isin(distribution.ids, torch.tensor([2, 5])), 0.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        logq = tilt(distribution.logps, (table @ direction)[distribution.ids], torch.tensor(middle), eos)
        low, high = (middle, high) if kl_divergence(logq, distribution.logps) < nats else (low, middle)
    p, q = (
        torch.zeros(len(table)).scatter_add_(0, distribution.ids, logps.exp()) for logps in (distribution.logps, logq)
    )
    return samples.tokens_BNT.flatten(), decoded.responses.tokens_BNT.flatten(), p, q


@pytest.mark.parametrize("coupling", ["gumbel", "maximal"])
@pytest.mark.parametrize("multiplier", ["response", "token"])
def test_one_token_follows_its_tilted_distribution(parts, multiplier, coupling):
    before, after, p, q = first_tokens(parts, 0.4, multiplier=multiplier, coupling=coupling)
    found = torch.bincount(after, minlength=len(q)) / ROWS
    assert (found - q).abs().max().item() < 0.015
    kept, most = (before == after).float().mean().item(), torch.minimum(p, q).sum().item()
    assert kept == pytest.approx(most, abs=0.015) if coupling == "maximal" else kept < most + 0.01


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options.values()))
def test_zero_displacement_and_zero_nats_give_every_token_back(parts, options):
    reference, value = parts
    samples = ReferenceSampler(reference).sample(PROMPTS, row_seeds(0, [0, 1, 2], 16))
    decoder = PriorDecoder(reference, value.embedding_table_VD, **options)
    seeds = row_seeds(9, [0, 1, 2], 16)
    still = torch.zeros(*samples.tokens_BNT.shape, value.embedding_table_VD.shape[1])
    anywhere = torch.randn(still.shape) * samples.movable_BNT.unsqueeze(-1)
    for delta, nats in ((still, 3.0), (anywhere, 0.0)):
        move = make_move(value, samples, delta, nats=nats, seeds_BN=seeds)
        decoded = decoder.decode(decoder.prepare(PROMPTS), move)
        assert torch.equal(decoded.responses.tokens_BNT, samples.tokens_BNT)
        assert decoded.nats_BN.abs().max().item() < 1e-6


def moved_texts(parts, budget, **options):
    reference, value = parts
    decoder = PriorDecoder(reference, value.embedding_table_VD, **options)
    policy = ImplicitPolicy(ReferenceSampler(reference), value, decoder, budget)
    return policy(PROMPTS, row_seeds(0, [0, 1, 2], 32))


@pytest.mark.parametrize("options", OPTIONS[1:], ids=lambda options: "-".join(options.values()))
def test_every_combination_keeps_to_the_budget_and_raises_the_value(parts, options):
    outcome = moved_texts(parts, TransportBudget(nats=2.0), **options)
    assert outcome.nats_BN.mean().item() > 0.2 and outcome.nats_BN.max().item() < 2.0 + 1e-4
    assert outcome.transported_values_BN.mean() > outcome.original_values_BN.mean()


def test_a_multiplier_a_token_spends_the_same_at_every_one(parts):
    """Nine tokens and 0.9 nats: 0.1 each, as far as the distributions allow; a smaller cap binds instead."""
    outcome = moved_texts(parts, TransportBudget(nats=0.9), multiplier="token")
    full = (outcome.originals.movable_BNT.sum(-1) == 9) & (outcome.transported.movable_BNT.sum(-1) == 9)
    assert full.any()
    torch.testing.assert_close(outcome.nats_BN[full], torch.full_like(outcome.nats_BN[full], 0.9), atol=0.02, rtol=0)
    capped = moved_texts(parts, TransportBudget(nats=0.9, max_token_nats=0.05), multiplier="token")
    assert capped.nats_BN.max().item() < 0.451


@pytest.mark.parametrize("coupling", ["gumbel", "maximal"])
def test_dropping_the_tilt_spends_nothing_after_the_first_change(parts, coupling):
    """The first changed token is the same with and without the tilt after it, and 1 nat a token is the cap."""
    budget = TransportBudget(nats=4.0)
    kept = moved_texts(parts, budget, coupling=coupling)
    dropped = moved_texts(parts, budget, coupling=coupling, after_change="drop")
    assert (dropped.nats_BN <= kept.nats_BN + 1e-5).all() and (dropped.nats_BN < kept.nats_BN - 0.1).any()
    length = min(outcome.transported.tokens_BNT.shape[-1] for outcome in (kept, dropped))
    originals = kept.originals.tokens_BNT[..., :length]
    changed = (kept.transported.tokens_BNT[..., :length] != originals).long()
    up_to_change = changed.cumsum(-1) - changed == 0
    same = kept.transported.tokens_BNT[..., :length] == dropped.transported.tokens_BNT[..., :length]
    assert same[up_to_change].all() and not same.all()


@pytest.mark.parametrize("name", ["multiplier", "coupling", "after_change"])
def test_an_unknown_option_is_named(parts, name):
    with pytest.raises(ValueError, match=f"{name} must be .* or .*, got 'sometimes'"):
        PriorDecoder(parts[0], parts[1].embedding_table_VD, **{name: "sometimes"})
